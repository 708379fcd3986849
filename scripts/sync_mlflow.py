"""Takes a run to MLflow: metrics.jsonl of an output folder, afterwards or while it trains; the report and the answers as artifacts.

    pip install mlflow
    python scripts/sync_mlflow.py output [--experiment NAME] [--name NAME] [--follow]

MLFLOW_TRACKING_URI (a server, or such as sqlite:///mlflow.db) and MLFLOW_EXPERIMENT_NAME are heeded. --follow goes on until the run has
written its adapter and its last line. The same folder is the same run: its id is kept in OUTPUT/mlflow-run-id, so that a second call
adds what is new.
"""

import argparse
import os
import time
from pathlib import Path

from sync_run import entries, is_finished, rewritten, settings

# What the server takes in one request, and as a parameter's value.
BATCH = 1000
LONGEST = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--experiment", default=os.environ.get("MLFLOW_EXPERIMENT_NAME", "qlora"))
    parser.add_argument("--name")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    args = parser.parse_args()

    import mlflow
    from mlflow.entities import Metric, Param

    mlflow.set_experiment(args.experiment)
    kept = args.output / "mlflow-run-id"
    client = mlflow.MlflowClient()
    if kept.exists():
        run = client.get_run(kept.read_text().strip())
    else:
        experiment = mlflow.get_experiment_by_name(args.experiment).experiment_id
        run = client.create_run(experiment, run_name=args.name or args.output.resolve().name)
        kept.write_text(run.info.run_id)
        values = {key: str(value) for key, value in settings(args.output).items()}
        params = [Param(key, value) for key, value in values.items() if 0 < len(value) <= LONGEST]
        for first in range(0, len(params), 100):
            client.log_batch(run.info.run_id, params=params[first : first + 100])
    run_id = run.info.run_id
    seen = int(run.data.tags.get("qlora.lines", 0))
    waiting: list[Metric] = []
    number = 0

    def send() -> None:
        for first in range(0, len(waiting), BATCH):
            client.log_batch(run_id, metrics=waiting[first : first + BATCH])
        waiting.clear()
        client.set_tag(run_id, "qlora.lines", number)

    for number, entry in enumerate(entries(args.output, follow=args.follow), 1):
        if number <= seen:
            continue
        now = int(time.time() * 1000)
        waiting += [Metric(key, value, now, entry["step"]) for key, value in rewritten(entry).items()]
        if len(waiting) >= BATCH or args.follow:
            send()
    send()
    for name in ["report.html", "loss.svg", "samples.jsonl", "adapter_config.json"]:
        if (args.output / name).exists():
            client.log_artifact(run_id, str(args.output / name))
    client.set_terminated(run_id, "FINISHED" if is_finished(args.output) else "KILLED")
    print(f"{max(number - seen, 0)} entries")


if __name__ == "__main__":
    main()
