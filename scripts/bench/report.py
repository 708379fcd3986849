#!/usr/bin/env python3
"""The benchmark tables of the book and of the README, and the book's picture, from the raw results.

    python3 report.py [--check] [--root REPOSITORY]

Reads benches/results/train_step.csv, kernels.csv, decode.csv and startup.csv, whose first lines are

    system,case,mode,tok_s,peak_gb,gpu,driver,commit,date,targets,rank
    system,kernel,shape,time_us,rate,unit,floor_share,gpu,driver,commit,date
    system,case,tok_s,gpu,driver,commit,date
    system,case,seconds,gpu,driver,commit,date

and replaces what stands between `<!-- bench:start -->` and `<!-- bench:end -->`: in book/src/benchmarks.md by all of it, in
README.md by a few rows. Where a system was measured several times in the same case, the last line counts. The peer of a row is the one with the most tokens per
second (for a kernel or a start: the shortest time) on the same card. The same input gives the same bytes; `--check` writes
nothing and fails when a file is not what would be written. Of the files, only
train_step.csv has to be there.
"""

import argparse
import csv
import pathlib
import sys
from typing import NamedTuple
from xml.sax.saxutils import escape

STEP = ["system", "case", "mode", "tok_s", "peak_gb", "gpu", "driver", "commit", "date", "targets", "rank"]
DECODE = ["system", "case", "tok_s", "gpu", "driver", "commit", "date"]
STARTUP = ["system", "case", "seconds", "gpu", "driver", "commit", "date"]
KERNEL = ["system", "kernel", "shape", "time_us", "rate", "unit", "floor_share", "gpu", "driver", "commit", "date"]
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = "qlora"
OURS_FP8 = "qlora-fp8"
TARGETS = {"all": "all linear layers", "qkvo": "q, k, v, o"}
PAGE = "book/src/benchmarks.md"
PICTURE = "book/src/bench.svg"
RESULTS = "https://github.com/qlora-rs/qlora/blob/main/benches/results"
# The rows that the README shows: a step's case and mode, a case of generation, a case of starting.
SHORT_STEPS = [("4x2048", "free"), ("1x2048", "lean"), ("2x512", "lean")]
SHORT_DECODE = ["decode batch 1", "decode batch 8"]
SHORT_STARTUP = ["first step 1x2048"]


def read(path: pathlib.Path, columns: list[str], numbers: list[str]) -> list[dict]:
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != columns:
            sys.exit(f"{path}: the first line must be {','.join(columns)}")
        rows = list(lines)
    for row in rows:
        try:
            if None in row or None in row.values():
                raise ValueError(f"{len(columns)} columns expected")
            row.update({name: float(row[name]) for name in numbers if row[name]})
        except ValueError as error:
            sys.exit(f"{path}, line {rows.index(row) + 2}: {error}")
    return rows


def paired(rows: list[dict], key: list[str], best) -> list[tuple[dict, dict | None]]:
    """Our last measurement of every case, and the best of the peers' last ones in the same case."""
    latest = {}
    for row in rows:
        latest[(*(row[name] for name in key), row["system"])] = row
    pairs = []
    for (*case, system), row in latest.items():
        if system == OURS:
            peers = [other for (*where, name), other in latest.items() if where == case and name not in (OURS, OURS_FP8)]
            pairs.append((row, best(peers) if peers else None))
    return pairs


def beside_fp8(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Our last measurement of every case in fp8, and the one without fp8."""
    latest = {(row["gpu"], row["case"], row["mode"], row["targets"], row["rank"], row["system"]): row for row in rows}
    found = [(row, latest.get((*case, OURS))) for (*case, system), row in latest.items() if system == OURS_FP8]
    return sorted(((row, plain) for row, plain in found if plain), key=step_order)


def fastest_step(peers: list[dict]) -> dict:
    return max(peers, key=lambda row: (row["tok_s"], row["system"]))


def fastest_kernel(peers: list[dict]) -> dict:
    return min(peers, key=lambda row: (row["time_us"], row["system"]))


def fastest_start(peers: list[dict]) -> dict:
    return min(peers, key=lambda row: (row["seconds"], row["system"]))


def step_order(pair) -> tuple:
    row = pair[0]
    sequences, length = (int(part) for part in row["case"].split("x"))
    first = ["free", "lean"]
    mode = first.index(row["mode"]) if row["mode"] in first else len(first)
    return (row["gpu"], row["targets"], int(row["rank"]), mode, row["mode"], sequences * length, length)


def settings(row: dict) -> str:
    return f"{TARGETS.get(row['targets'], row['targets'])}, r = {row['rank']}"


def table(head: list[str], rows: list[list[str]], left: int) -> list[str]:
    line = "|" + "|".join("---" if column < left else "--:" for column in range(len(head))) + "|"
    # A bar within a cell would begin another.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", line] + [f"| {' | '.join(row)} |" for row in cells]


def where(pairs) -> str:
    """Which card, driver and days the figures are from."""
    places = {}
    for pair in pairs:
        for row in pair:
            if row:
                places.setdefault((row["gpu"], row["driver"]), set()).add(row["date"])
    texts = []
    for (gpu, driver), dates in sorted(places.items()):
        days = min(dates) if len(dates) == 1 else f"{min(dates)} to {max(dates)}"
        texts.append(f"{gpu}, driver {driver}, {days}")
    return "; ".join(texts)


def step_table(pairs) -> list[str]:
    cells = []
    for row, peer in pairs:
        line = [row["case"], row["mode"], settings(row), f"{row['tok_s']:,.0f}", f"{row['peak_gb']:.2f}"]
        if peer:
            ratio = f"{row['tok_s'] / peer['tok_s']:.2f}x"
            line += [f"{peer['tok_s']:,.0f}", f"{peer['peak_gb']:.2f}", ratio, peer["system"]]
        else:
            line += ["", "", "", "not measured"]
        cells.append(line)
    head = ["case", "mode", "LoRA", "qlora, tokens/s", "GB", "best peer, tokens/s", "GB", "speed", "best peer"]
    text = table(head, cells, 3)
    # The peer's name reads better from the left.
    text[1] = text[1].rsplit("|", 2)[0] + "|---|"
    return text


def fp8_table(pairs) -> list[str]:
    cells = [
        [row["case"], row["mode"], f"{plain['tok_s']:,.0f}", f"{row['tok_s']:,.0f}", f"{row['tok_s'] / plain['tok_s']:.2f}x", f"{row['peak_gb']:.2f}"]
        for row, plain in pairs
    ]
    return table(["case", "mode", "tokens/s", "in fp8", "speed", "GB"], cells, 2)


def kernel_table(pairs) -> list[str]:
    cells = []
    for row, peer in pairs:
        share = f"{row['floor_share'] * 100:.0f}%" if row["floor_share"] != "" else ""
        rate = f"{row['rate']:,.0f} {row['unit']}" if row["rate"] != "" else ""
        other = f"{peer['time_us']:,.1f} ({peer['system']})" if peer else ""
        cells.append([row["kernel"], row["shape"], f"{row['time_us']:,.1f}", rate, share, other])
    return table(["kernel", "shape", "microseconds", "rate", "share of its floor", "best peer"], cells, 2)


class Style(NamedTuple):
    width: int = 860
    label: int = 190
    bar: int = 15
    gap: int = 3
    row: int = 50


def svg(pairs) -> str:
    """Two bars a case, in two panels: tokens per second and peak memory."""
    style = Style()
    panel = (style.width - style.label - 30) // 2
    room = 66  # for the figure behind a bar
    height = 74 + style.row * len(pairs) + 12
    fastest = max(row["tok_s"] for pair in pairs for row in pair if row)
    largest = max(row["peak_gb"] for pair in pairs for row in pair if row)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{style.width}" height="{height}" '
        f'viewBox="0 0 {style.width} {height}" role="img">',
        "<title>Training speed and peak memory of qlora and of the best peer</title>",
        "<style>",
        "text { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #1f2328 }",
        ".small { font-size: 11px; fill: #59636e } .head { font-weight: 600 } .back { fill: #ffffff }",
        ".ours { fill: #b7410e } .peer { fill: #8c959f } .axis { stroke: #d1d9e0 }",
        "@media (prefers-color-scheme: dark) {",
        "text { fill: #f0f6fc } .small { fill: #9198a1 } .back { fill: #0d1117 }",
        ".ours { fill: #e8743b } .peer { fill: #656c76 } .axis { stroke: #3d444d }",
        "}",
        "</style>",
        f'<rect class="back" width="{style.width}" height="{height}"/>',
    ]

    def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        kind = f' class="{kind}"' if kind else ""
        anchor = f' text-anchor="{anchor}"' if anchor != "start" else ""
        out.append(f'<text x="{x:g}" y="{y:g}"{kind}{anchor}>{escape(words)}</text>')

    out.append('<rect class="ours" x="16" y="15" width="12" height="12"/>')
    text(34, 26, "qlora")
    out.append('<rect class="peer" x="88" y="15" width="12" height="12"/>')
    text(106, 26, "the fastest peer of each case")
    lefts = [style.label, style.label + panel + 16]
    text(lefts[0], 56, "tokens per second (more is better)", "head")
    text(lefts[1], 56, "peak memory, GB (less is better)", "head")
    for left in lefts:
        out.append(f'<line class="axis" x1="{left}" y1="66" x2="{left}" y2="{height - 10}"/>')
    for index, (row, peer) in enumerate(pairs):
        top = 74 + index * style.row
        text(style.label - 12, top + 13, f"{row['case']}, {row['mode']}", anchor="end")
        text(style.label - 12, top + 29, settings(row), "small", "end")
        for left, field, most, form in (
            (lefts[0], "tok_s", fastest, "{:,.0f}"),
            (lefts[1], "peak_gb", largest, "{:.1f}"),
        ):
            for place, (which, kind) in enumerate([(row, "ours"), (peer, "peer")]):
                y = top + place * (style.bar + style.gap)
                if which is None:
                    text(left + 6, y + 12, "not measured", "small")
                    continue
                length = which[field] / most * (panel - room)
                out.append(
                    f'<rect class="{kind}" x="{left}" y="{y}" width="{length:.1f}" height="{style.bar}">'
                    f"<title>{escape(which['system'])}</title></rect>"
                )
                text(round(left + length + 6, 1), y + 12, form.format(which[field]), "" if place == 0 else "small")
    return "\n".join(out) + "\n</svg>\n"


def short_table(pairs, column: str, unit: str, show, ratio) -> list[str]:
    """One figure a case, beside the best peer's."""
    cells = []
    for row, peer in pairs:
        line = [row["case"], show(row[column])]
        if peer:
            line += [show(peer[column]), f"{ratio(row[column], peer[column]):.1f}x", peer["system"]]
        else:
            line += ["", "", "not measured"]
        cells.append(line)
    text = table(["case", f"qlora, {unit}", f"best peer, {unit}", "speed", "best peer"], cells, 1)
    # The peer's name reads better from the left.
    text[1] = text[1].rsplit("|", 2)[0] + "|---|"
    return text


def decode_table(pairs) -> list[str]:
    return short_table(pairs, "tok_s", "tokens/s", lambda x: f"{x:,.1f}" if x < 100 else f"{x:,.0f}", lambda a, b: a / b)


def startup_table(pairs) -> list[str]:
    return short_table(pairs, "seconds", "seconds", lambda x: f"{x:.1f}", lambda a, b: b / a)


def block(steps, fp8, decode, startup, kernels) -> str:
    lines = [
        "One training step of an 8B model (Llama 3.1's shape, random weights): NF4 with double quantization, bf16,",
        "AdamW with f32 state; a case is sequences x tokens, without padding, loss over all tokens. `free` may use the",
        "whole card, `lean` saves memory, `lean+` also has 8-bit moments and the embedding in host memory, `plan` is what the",
        "planner chose for a pool of 8 or (1x112640) 24 GiB. Median of 5 steps (1x5120, 1x10240: of 2 or 3; the longest two: a single",
        "step without warm-up); GB is the peak in use over 1e9, weights included. The peer is the fastest one measured in the case.",
        "",
        f"![Training speed and memory, qlora and the fastest peer](bench.svg)",
        "",
        *step_table(steps),
        "",
        f"Measured on {where(steps)} ([raw results]({RESULTS}/train_step.csv)).",
    ]
    if fp8:
        lines += [
            "",
            '`frozen_compute = "fp8"` on a Hopper GPU, beside the same steps without it:',
            "",
            *fp8_table(fp8),
            "",
            f"Measured on {where(fp8)}.",
        ]
    if decode:
        lines += [
            "",
            "Generation with the same model and an adapter of rank 16 on all linear layers, greedy, after a prompt of 128 tokens:",
            "",
            *decode_table(decode),
            "",
            f"Measured on {where(decode)} ([raw results]({RESULTS}/decode.csv)).",
        ]
    if startup:
        lines += [
            "",
            "From the start of the process, with the checkpoint in the page cache: to the end of the first training step over a 16 GB",
            "bf16 checkpoint that is quantized while it loads, and to the first token over a 5.7 GB bitsandbytes 4-bit checkpoint:",
            "",
            *startup_table(startup),
            "",
            f"Measured on {where(startup)} ([raw results]({RESULTS}/startup.csv)).",
        ]
    if kernels:
        lines += [
            "",
            "<details><summary>Single kernels, and their share of what the card's memory or tensor cores allow (from the same",
            "run)</summary>",
            "",
            *kernel_table(kernels),
            "",
            "</details>",
            "",
            f"Measured on {where(kernels)} ([raw results]({RESULTS}/kernels.csv)).",
        ]
    return "\n".join(lines)


def replaced(path: pathlib.Path, block: str) -> str:
    """A file with `block` between its marks."""
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        sys.exit(f"{path}: needs one line {START} and, after it, one line {END}")
    before, rest = text.split(START)
    return f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}"


def summary(steps, decode, startup) -> str:
    """The README's table: a few rows, each beside the best peer."""
    cells = []

    def add(what: str, unit: str, ours: str, peer: str, ratio: float, name: str) -> None:
        cells.append([what, f"{ours} {unit}", f"{peer} {unit} ({name})", f"{ratio:.1f}x"])

    for case, mode in SHORT_STEPS:
        for row, peer in steps:
            if (row["case"], row["mode"], row["targets"]) == (case, mode, "all") and peer:
                memory = "all the memory it wants" if mode == "free" else f"{row['peak_gb']:.1f} GB"
                ours, other = f"{row['tok_s']:,.0f}", f"{peer['tok_s']:,.0f}"
                add(f"training, {case} tokens a step, {memory}", "tokens/s", ours, other, row["tok_s"] / peer["tok_s"], peer["system"])
    for case in SHORT_DECODE:
        for row, peer in decode:
            if row["case"] == case and peer:
                ours, other = f"{row['tok_s']:,.0f}", f"{peer['tok_s']:,.0f}"
                add(case.replace("decode", "generation,"), "tokens/s", ours, other, row["tok_s"] / peer["tok_s"], peer["system"])
    for case in SHORT_STARTUP:
        for row, peer in startup:
            if row["case"] == case and peer:
                ours, other = f"{row['seconds']:.1f}", f"{peer['seconds']:.1f}"
                add("start to the end of the first step", "s", ours, other, peer["seconds"] / row["seconds"], peer["system"])
    return "\n".join(
        [
            *table(["an 8B model, 4-bit base", "qlora", "best peer measured", ""], cells, 4),
            "",
            f"Measured on {where([*steps, *startup])}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is not up to date")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2])
    args = parser.parse_args()
    results = args.root / "benches/results"
    rows = read(results / "train_step.csv", STEP, ["tok_s", "peak_gb"])
    steps = paired(rows, ["gpu", "case", "mode", "targets", "rank"], fastest_step)
    if not steps:
        sys.exit(f"{results / 'train_step.csv'}: no line of {OURS}")
    steps.sort(key=step_order)
    fp8 = beside_fp8(rows)
    # Of a card on which no peer was measured there is nothing to compare.
    compared = {row["gpu"] for row, peer in steps if peer}
    steps = [pair for pair in steps if pair[0]["gpu"] in compared] or steps
    decode = []
    if (results / "decode.csv").exists():
        decode = paired(read(results / "decode.csv", DECODE, ["tok_s"]), ["gpu", "case"], fastest_step)
    startup = []
    if (results / "startup.csv").exists():
        startup = paired(read(results / "startup.csv", STARTUP, ["seconds"]), ["gpu", "case"], fastest_start)
    kernels = []
    if (results / "kernels.csv").exists():
        rows = read(results / "kernels.csv", KERNEL, ["time_us", "rate", "floor_share"])
        # In the file's order: it is the order of the benches.
        kernels = paired(rows, ["gpu", "kernel", "shape"], fastest_kernel)
    wanted = {args.root / PICTURE: svg(steps)}
    for path, text in ((PAGE, block(steps, fp8, decode, startup, kernels)), ("README.md", summary(steps, decode, startup))):
        wanted[args.root / path] = replaced(args.root / path, text)
    stale = [path for path, new in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
    if args.check:
        for path in stale:
            print(f"{path} is not up to date: run scripts/bench/report.py", file=sys.stderr)
        sys.exit(1 if stale else 0)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
        print(f"{path} written")


if __name__ == "__main__":
    main()
