#!/usr/bin/env python3
"""Makes the pictures of the book: `qlora init`, `data`, `train` and `chat` on a terminal, and the report of a run in a browser.

    cargo build --release -p qlora-cli
    scripts/pictures.py [PROGRAM]

The demo task is prepared, trained and tried on the demo model (scripts/demo-model.sh) on a pseudo-terminal; questions of the program are
answered as a person would. What it wrote is shown by xterm.js (fetched by npm) in a headless Chromium, which takes the pictures, also
that of report.html. Needs npm and chromium (`apt-get install chromium`; CHROMIUM names another one). PNGs are written to
book/src/images.
"""

import base64
import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "book/src/images"
XTERM = "@xterm/xterm@5.5.0"
ROWS, COLUMNS = 26, 100
STEPS, SHOWN = 40, 28
# Seconds of silence after which what was written is a whole frame.
SILENCE = 0.01


def begin(command: list[str], folder: Path, rows: int) -> tuple[int, int]:
    """Process and terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        os.execv(command[0], command)
    return pid, terminal


def record(command: list[str], folder: Path) -> bytes:
    """What the program has written when the view shows step SHOWN."""
    pid, terminal = begin(command, folder, ROWS)
    written, frame, shown = b"", b"", b""
    last = time.monotonic()
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        now = time.monotonic()
        if now - last > SILENCE:
            written, frame = written + frame, b""
            if not shown and any(f"step {step}/{STEPS}  epoch".encode() in written for step in range(SHOWN, STEPS)):
                shown = written
        frame += part
        last = now
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written + frame
    assert shown, "the view was never seen"
    return shown


def converse(command: list[str], folder: Path, rows: int, turns: list[tuple[str, str]], last: str) -> bytes:
    """What a command and its program have written when the program waits after its last words: each turn is what the program says (an
    expression) and what is typed then."""
    pid, terminal = begin(command, folder, rows)
    written, seen = b"", 0
    for expected, typed in [*turns, (last, "\x04")]:
        deadline = time.monotonic() + 300
        while not (found := re.search(expected.encode(), written[seen:])):
            assert time.monotonic() < deadline, (expected, written)
            ready, _, _ = select.select([terminal], [], [], 1)
            try:
                part = os.read(terminal, 65536) if ready else b""
            except OSError:  # The program has ended.
                part = b""
                deadline = min(deadline, time.monotonic() + 1)
            written += part
        seen += found.end()
        shown = written
        try:
            os.write(terminal, typed.encode())
        except OSError:
            pass
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written
    words = [Path(command[0]).name, *(f'"{word}"' if " " in word else word for word in command[1:])]
    return b"\x1b[2m$\x1b[0m " + " ".join(words).encode() + b"\r\n" + shown


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "no chromium: apt-get install chromium"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
             "--virtual-time-budget=5000", f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
    size = picture.stat().st_size
    assert 0 < size < 150_000, f"{picture} has {size} bytes"
    print(f"{picture.relative_to(ROOT)}: {size // 1000} KB")


def terminal_page(written: bytes, folder: Path, rows: int) -> Path:
    if not (folder / "package").exists():
        subprocess.run(["npm", "pack", "--silent", XTERM], cwd=folder, check=True, capture_output=True)
        archive = next(folder.glob("xterm-xterm-*.tgz"))
        subprocess.run(["tar", "xzf", archive.name], cwd=folder, check=True)
    page = folder / "terminal.html"
    page.write_text(
        f"""<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="package/css/xterm.css">
<style>body {{ margin: 0; background: #14171c }} #terminal {{ padding: 12px }}</style><div id="terminal"></div>
<script src="package/lib/xterm.js"></script><script>
const terminal = new Terminal({{ rows: {rows}, cols: {COLUMNS}, fontSize: 14, lineHeight: 1.125, fontFamily: "DejaVu Sans Mono, monospace",
  cursorInactiveStyle: "none", theme: {{ background: "#14171c", foreground: "#d6dae0", blue: "#6cb6ff", cyan: "#56d4dd" }} }});
terminal.open(document.getElementById("terminal"));
terminal.write(Uint8Array.from(atob("{base64.b64encode(written).decode()}"), c => c.charCodeAt(0)));
</script>"""
    )
    return page


def main() -> None:
    program = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "target/release/qlora").resolve()
    model = subprocess.run([ROOT / "scripts/demo-model.sh"], capture_output=True, text=True, check=True).stdout.split()[-1]
    IMAGES.mkdir(exist_ok=True)
    data = ROOT / "examples/data"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = (data / "demo_heldout.jsonl").read_text().splitlines(keepends=True)
        (folder / "heldout.jsonl").write_text("".join(rows[:4]))
        (folder / "SmolLM2-135M-Instruct.gguf").symlink_to(model)
        (folder / "orders.jsonl").symlink_to(data / "demo_train.jsonl")
        base = "SmolLM2-135M-Instruct.gguf"

        def photograph_terminal(name: str, written: bytes, rows: int) -> None:
            # 18 pixels a row, and the margin.
            photograph(terminal_page(written, folder, rows), IMAGES / name, 880, 18 * rows + 24)

        turns = [(r"Model \(", base + "\r"), (r"Data.*: ", "orders.jsonl\r"), (r"Layers to adapt.*: ", "all-linear\r")]
        init = [str(program), "init", "--device", "cpu", "--max-length", "256"]
        photograph_terminal("init.png", converse(init, folder, 8, turns, r"next: qlora data[^\n]*\n"), 8)
        shown = converse([str(program), "data", "qlora.toml", "--rows", "2"], folder, 33, [], r"80 to 89[^\n]*\n")
        photograph_terminal("data.png", shown, 33)
        command = [str(program), "train", base, "orders.jsonl", "--device", "cpu"]
        options = {
            "target-modules": "all-linear", "max-length": 256, "max-steps": STEPS, "per-device-train-batch-size": 1,
            "gradient-accumulation-steps": 1, "learning-rate": "1e-3", "lr-scheduler-type": "cosine", "save-steps": 20,
            "validation-file": "heldout.jsonl", "eval-steps": 10, "sample-every": 20, "sample-max-new-tokens": 32,
        }  # fmt: skip
        for key, value in options.items():
            command += [f"--{key}", str(value)]
        photograph_terminal("train.png", record(command, folder), ROWS)
        photograph(folder / "output/report.html", IMAGES / "report.png", 960, 1900)
        chat = [str(program), "chat", "--model", base, "--adapter", "output", "--device", "cpu", "--system", "Turn the order into JSON."]
        order = "Order for Dr. Weber: three boxes of tea, to Vienna on Friday. Please hurry."
        turns = [(r"> ", order + "\r"), (r"\}[^>]*> ", "/stats\r")]
        photograph_terminal("chat.png", converse(chat, folder, 14, turns, r"new tokens at[^\n]*\n"), 14)


if __name__ == "__main__":
    main()
