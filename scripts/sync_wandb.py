"""Takes a run to Weights & Biases: metrics.jsonl and samples.jsonl of an output folder, afterwards or while it trains.

    pip install wandb
    python scripts/sync_wandb.py output [--project NAME] [--name NAME] [--follow] [--offline]

--follow goes on until the run has written its adapter and its last line. --offline writes a folder that `wandb sync` uploads later;
otherwise `wandb login` or WANDB_API_KEY says who you are. WANDB_PROJECT is heeded (default: huggingface, as in transformers). The same
folder is the same run: its id, and how many lines were sent, are kept in OUTPUT/wandb-run-id, so that a second call adds what is new.
"""

import argparse
import os
import secrets
from pathlib import Path

from sync_run import entries, is_finished, rewritten, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "huggingface"))
    parser.add_argument("--name")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--offline", action="store_true", help="write a folder for `wandb sync`")
    args = parser.parse_args()

    import wandb

    kept = args.output / "wandb-run-id"
    # The id, and the lines of the log and of the answers that were sent. Steps do not tell what was sent: one has a line of training
    # and may have one of an evaluation, and offline there is nobody to ask.
    words = kept.read_text().split() if kept.exists() else []
    run_id = words[0] if words else secrets.token_hex(4)
    sent, sent_answers = (int(words[1]), int(words[2])) if len(words) == 3 else (0, 0)

    def keep(lines: int, answers: int) -> None:
        kept.write_text(f"{run_id} {lines} {answers}\n")

    keep(sent, sent_answers)
    run = wandb.init(
        project=args.project,
        name=args.name or args.output.resolve().name,
        id=run_id,
        resume="allow",
        mode="offline" if args.offline else "online",
        dir=args.output,
        config=settings(args.output),
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    lines = sent
    for number, entry in enumerate(entries(args.output, follow=args.follow), 1):
        if number <= sent:
            continue
        run.log({**rewritten(entry), "train/global_step": entry["step"]})
        lines = number
        if args.follow:
            keep(lines, sent_answers)
    samples = list(entries(args.output, "samples.jsonl"))
    if len(samples) > sent_answers:
        columns = ["step", "prompt", "completion", "expected"]
        run.log({"samples": wandb.Table(columns, [[sample.get(column) for column in columns] for sample in samples])})
    run.finish(exit_code=0 if is_finished(args.output) else 1)
    keep(lines, max(len(samples), sent_answers))
    print(f"{lines - sent} entries, {max(len(samples) - sent_answers, 0)} answers")


if __name__ == "__main__":
    main()
