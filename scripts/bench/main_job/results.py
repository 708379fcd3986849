"""The results file of the main job, and what its rows say. Python's standard library only."""

import csv
import datetime
import os
import pathlib
import subprocess

COLUMNS = "system case settings budget_gb tok_s peak_gb predicted_gb trained_tokens gpu driver commit date".split()
OURS = "qlora"


def commit() -> str:
    """$QLORA_COMMIT where the files travelled without their repository."""
    if os.environ.get("QLORA_COMMIT"):
        return os.environ["QLORA_COMMIT"]
    here = pathlib.Path(__file__).parent
    try:
        result = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return result.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def place() -> dict:
    """Where and when: the last columns."""
    gpu, driver = "CPU", ""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0 and result.stdout.strip():
            gpu, driver = (word.strip() for word in result.stdout.splitlines()[0].split(","))
    except OSError:
        pass
    date = datetime.datetime.now(datetime.UTC) if hasattr(datetime, "UTC") else datetime.datetime.utcnow()
    return {"gpu": gpu, "driver": driver, "commit": commit(), "date": date.date().isoformat()}


def append(path: pathlib.Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        if new:
            writer.writeheader()
        writer.writerow({name: row.get(name, "") for name in COLUMNS})


def read(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def best_peer(rows: list[dict], case: str, gpu: str) -> dict | None:
    peers = [row for row in rows if row["system"] != OURS and row["case"] == case and row["gpu"] == gpu and row["tok_s"]]
    return max(peers, key=lambda row: float(row["tok_s"]), default=None)


def table(header: list[str], lines: list[list[str]]) -> str:
    """Left-aligned text, right-aligned numbers."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def aligned(cell: str, width: int) -> str:
        is_number = cell.replace(",", "").replace(".", "").replace("%", "").replace("+", "").replace("-", "").isdigit()
        return cell.rjust(width) if is_number or not cell else cell.ljust(width)

    rows = ["  ".join(aligned(cell, width) for cell, width in zip(line, widths)).rstrip() for line in [header, *lines]]
    return "\n".join(rows)


def summary(path: pathlib.Path) -> str:
    """Our rows without a budget against the best peer of the file."""
    rows, lines = read(path), []
    for row in rows:
        peer = best_peer(rows, row["case"], row["gpu"])
        if row["system"] != OURS or row["budget_gb"] or peer is None or not row["tok_s"]:
            continue
        ratio = float(row["tok_s"]) / float(peer["tok_s"])
        name = f"{peer['system']} ({peer['settings']})"
        lines.append([row["case"], row["settings"], row["tok_s"], name, peer["tok_s"], f"{ratio:.2f}"])
    header = ["case", "settings", "tok/s", "best peer", "tok/s", "ratio"]
    return table(header, lines) if lines else "no case has both our rows and a peer's"
