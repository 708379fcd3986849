"""Reads the TensorBoard event files of a run with TensorBoard's own reader and compares them with metrics.jsonl.

    pip install tensorboard
    qlora train qlora.toml --report-to tensorboard
    python scripts/check_tensorboard.py output [LOGGING_DIR]

Every number of every line of metrics.jsonl must be a point under its tag, with no other point beside it: also after a run was
interrupted and resumed, where later points of earlier files are dropped. Texts are compared with samples.jsonl.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def tag_of(key: str) -> str:
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    output = Path(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else output / "runs"
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for entry in lines(output / "metrics.jsonl"):
        for key, value in entry.items():
            if key != "step" and isinstance(value, (int, float)):
                expected.setdefault(tag_of(key), []).append((entry["step"], float(np.float32(value))))
    found = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for tag, points in expected.items():
        assert len(points) == len(found[tag]), (tag, points, found[tag])
        for (step, value), (found_step, found_value) in zip(points, found[tag]):
            assert step == found_step and math.isclose(value, found_value, rel_tol=1e-7), (tag, step, value, found_value)
    texts = {tag: board.Tensors(tag) for tag in board.Tags()["tensors"]}
    assert "args/text_summary" in texts, texts.keys()
    rounds: dict[int, list[dict]] = {}
    for sample in lines(output / "samples.jsonl"):
        rounds.setdefault(sample["step"], []).append(sample)
    for step, samples in rounds.items():
        for place, sample in enumerate(samples, 1):
            events = [event for event in texts[f"samples/{place}/text_summary"] if event.step == step]
            assert len(events) == 1, (step, place, events)
            text = events[0].tensor_proto.string_val[0].decode()
            assert sample["completion"] in text and sample["prompt"] in text, (sample, text)
    points = sum(map(len, found.values()))
    files = len(list(folder.glob("events.out.tfevents.*")))
    print(f"{folder}: {files} files, {len(found)} tags, {points} points, {sum(map(len, rounds.values()))} answers: as logged")


if __name__ == "__main__":
    main()
