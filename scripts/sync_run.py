"""The files of a run for the scripts that take it to trackers: lines as they come, names as transformers' trackers have them."""

import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path


def is_finished(output: Path) -> bool:
    """Whether the run has written its adapter after its last line; an interrupted one has checkpoints alone."""
    adapter, log = output / "adapter_model.safetensors", output / "metrics.jsonl"
    return adapter.exists() and log.exists() and adapter.stat().st_mtime_ns >= log.stat().st_mtime_ns


def entries(output: Path, name: str = "metrics.jsonl", follow: bool = False) -> Iterator[dict]:
    """The lines of a log; with `follow` also those that are still to come, until the run has ended."""
    done, rest = 0, b""
    while True:
        ended = is_finished(output)
        path = output / name
        content = path.read_bytes() if path.exists() else b""
        # A line without its end is being written.
        whole = content[: content.rfind(b"\n") + 1].splitlines()
        # A run that was resumed has cut the file back to its checkpoint: what was sent cannot be taken back.
        yield from (json.loads(line) for line in whole[done:])
        done = max(done, len(whole))
        if not follow or ended:
            return
        time.sleep(2)


def rewritten(entry: dict) -> dict[str, float]:
    """The numbers of an entry by the names that transformers' trackers give them: eval_x is eval/x, anything else train/x."""
    numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float)) and key != "step"}
    return {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value for key, value in numbers.items()}


def settings(output: Path) -> dict[str, object]:
    """The configuration in the run's last checkpoint, as section.key; nothing before the first checkpoint."""
    files = sorted(output.glob("checkpoint-*/*.toml"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    if not files:
        return {}
    sections = tomllib.loads(files[-1].read_text())
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
