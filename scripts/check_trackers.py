"""Takes a run to MLflow and Weights & Biases on this machine and compares what arrived with metrics.jsonl.

    pip install mlflow wandb
    python scripts/check_trackers.py output

MLflow is a database in a temporary folder, Weights & Biases works offline; the output folder is copied before anything is written to it.
Each script runs more than once: a call without anything new must add nothing, and one after an evaluation of the last step that line.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sync_run import entries, rewritten

SCRIPTS = Path(__file__).resolve().parent


def synced(script: str, output: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), str(output), *options],
        cwd=output.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def points(output: Path) -> dict[str, set[tuple[int, float]]]:
    """The log by the trackers' names."""
    expected: dict[str, set[tuple[int, float]]] = {}
    for entry in entries(output):
        for key, value in rewritten(entry).items():
            expected.setdefault(key, set()).add((entry["step"], float(value)))
    return expected


def check_mlflow(output: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{output.parent}/mlflow.db"
    print("mlflow:", synced("sync_mlflow.py", output))
    assert synced("sync_mlflow.py", output) == "0 entries"
    import mlflow

    client = mlflow.MlflowClient()
    run_id = (output / "mlflow-run-id").read_text()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and "training.learning_rate" in run.data.params, run
    expected = points(output)
    assert run.data.metrics.keys() == expected.keys(), run.data.metrics.keys() ^ expected.keys()
    for key, wanted in expected.items():
        found = {(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)}
        assert found == wanted, (key, found ^ wanted)
    print(f"mlflow: {len(expected)} metrics, {len(run.data.params)} parameters: as logged")


def records(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log with a header of 7 bytes, in blocks of 32 KiB, of pieces with their kind."""
    block, whole, first, last = 32768, 1, 2, 4
    at, gathered = 7, b""
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        piece = log[at + 7 : at + 7 + length]
        gathered = piece if kind in (whole, first) else gathered + piece
        if kind in (whole, last):
            yield gathered
        at += 7 + length


def check_wandb(output: Path) -> None:
    log = output / "metrics.jsonl"
    # A call between the line of a step and that of its evaluation, one without anything new, one after the evaluation.
    last = next(reversed(list(entries(output))))
    evaluation = {"step": last["step"], "epoch": last["epoch"], "eval_loss": 1.5}
    print("wandb:", synced("sync_wandb.py", output, "--offline"))
    assert synced("sync_wandb.py", output, "--offline") == "0 entries, 0 answers"
    with log.open("a") as file:
        file.write(json.dumps(evaluation) + "\n")
    assert synced("sync_wandb.py", output, "--offline") == "1 entries, 0 answers"
    from wandb.proto.wandb_internal_pb2 import Record

    # Lists, in which nothing may be twice.
    found: dict[str, list[tuple[int, float]]] = {}
    for file in output.glob("wandb/offline-run-*/run-*.wandb"):
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if key.startswith(("train/", "eval/")) and key != "train/global_step":
                    found.setdefault(key, []).append((row["train/global_step"], float(value)))
    expected: dict[str, list[tuple[int, float]]] = {}
    for entry in entries(output):
        for key, value in rewritten(entry).items():
            expected.setdefault(key, []).append((entry["step"], float(value)))
    assert {key: sorted(of) for key, of in found.items()} == {key: sorted(of) for key, of in expected.items()}, (
        found.keys() ^ expected.keys()
    )
    print(f"wandb: {len(expected)} metrics: as logged")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        shutil.copytree(sys.argv[1], output, ignore=shutil.ignore_patterns("wandb*", "mlflow*"))
        check_mlflow(output)
        check_wandb(output)


if __name__ == "__main__":
    main()
