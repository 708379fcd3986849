#!/usr/bin/env python3
"""What batches of ever new lengths cost: the case docs8 of the main job (main_job.py), two questions.

    python3 epoch.py --finetune target/release/examples/finetune --model MODEL [--steps 500] [--budget GB]

1. An epoch of shuffled rows against the same batches, each made twice in a row, of which the second counts: then everything
   that a batch's lengths need is there already. The first may take at most 5% longer.
2. A run of --steps steps over shuffled epochs with `-vv`: in which steps memory, plans or graphs were made. After step 50
   there should be none.

Standard library only. MODEL is a folder made by model.py.
"""

import argparse
import json
import pathlib
import random
import re

import rows
from main_job import Process, read_metrics

HERE = pathlib.Path(__file__).resolve().parent
BATCH = 8
WARM = 50
SEED = 11


def run(args, name: str, lines: list[str], changes: list[str], steps: int) -> tuple[list[float], list[str]]:
    """Seconds of every step, and what the program said."""
    folder = args.work / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(lines))
    if not (folder / "model").exists():
        (folder / "model").symlink_to(args.model.resolve())
    command = [args.finetune.resolve(), HERE / "docs8.toml", "-vv"]
    for change in [f"training.max_steps={steps}", "training.save_steps=0", "training.overwrite_output_dir=true", *changes]:
        command += ["--set", change]
    if args.budget:
        command += ["--memory-budget", args.budget]
    process = Process(command, folder, folder / "log.txt")
    if process.wait(process.start + args.limit) != 0:
        raise SystemExit(f"{name}: {process.last_words()}")
    metrics = read_metrics(folder / "output" / "metrics.jsonl")
    return [entry["tokens"] / entry["tokens_per_second"] for entry in metrics], process.lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finetune", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="of the long run; 0 leaves it out")
    parser.add_argument("--budget", help="GB")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/main_job_epoch"))
    parser.add_argument("--limit", type=float, default=400, help="seconds of one run")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    rows.write_rows(args.work)
    lines = (args.work / "rows.jsonl").read_text().splitlines(keepends=True)
    random.Random(SEED).shuffle(lines)
    batches = [lines[at : at + BATCH] for at in range(0, len(lines) - len(lines) % BATCH, BATCH)]
    order = ["training.train_sampling_strategy=sequential"]
    once, _ = run(args, "once", sum(batches, []), order, len(batches))
    twice, _ = run(args, "twice", [line for batch in batches for line in batch + batch], order, 2 * len(batches))
    # The first three steps look at every gradient.
    epoch, warm = sum(once[3:]), sum(twice[7::2])
    print(f"{len(once)} shuffled batches: {epoch:.3f} s; each repeated: {warm:.3f} s; {100 * (epoch / warm - 1):+.1f}%")

    if args.steps:
        seconds, said = run(args, "long", lines, [], args.steps)
        colour = re.compile(r"\x1b\[[0-9;]*m")
        made = [colour.sub("", line) for line in said if "made in this" in line]
        found = [(int(step[1]), line) for line in made if (step := re.search(r"\bstep=(\d+)", line))]
        late = [line for step, line in found if step > WARM]
        print(f"{len(seconds)} steps: something was made in {len(found)} of them, after step {WARM} in {len(late)}")
        print(*late[:10], *[line for line in made if "in this run" in line], sep="\n")
        print(json.dumps({"made_in_steps": [step for step, _ in found]}))


if __name__ == "__main__":
    main()
