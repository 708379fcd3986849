#!/usr/bin/env python3
"""The loss of training with frozen_compute = "fp8" beside that of the compute type, on a real text.

    python3 fp8_loss.py --finetune PROGRAM --qlora PROGRAM --model MODEL --text FOLDER [--out benches/results/fp8_loss.csv]
        [--seeds 1,2,3] [--steps 500] [--set key=value,...]

The text is all .pod files below FOLDER: Perl's manual, which Debian carries (`apt-get download perl-doc`, then `dpkg-deb -x
perl-doc_*.deb FOLDER`). Paragraphs are joined to rows of about 1,800 characters; every 25th row is held out. Each seed trains
twice with the same rows in the same order, packed to 8 x 512 tokens a step, r = 16 on all layers, defaults otherwise. The
held-out loss is `qlora eval --all-tokens` of the saved adapter, which computes in the compute type whatever was trained in. A
line a run; the last ones give the mean difference. Standard library only.
"""

import argparse
import csv
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys

HELD_OUT = 25
CHARACTERS = 1800
COLUMNS = ["model", "settings", "seed", "steps", "held_out_loss", "training_loss", "tok_s", "gpu"]


def rows(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Training and held-out rows."""
    texts = []
    for file in sorted(folder.rglob("*.pod")):
        row = ""
        for paragraph in file.read_text(errors="ignore").split("\n\n"):
            row += paragraph.strip() + "\n\n"
            if len(row) >= CHARACTERS:
                texts.append(row)
                row = ""
    random.Random(0).shuffle(texts)
    held = [text for index, text in enumerate(texts) if index % HELD_OUT == 0]
    return [text for index, text in enumerate(texts) if index % HELD_OUT], held


def write(path: pathlib.Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(command: list, folder: pathlib.Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"


def train(args, work: pathlib.Path, seed: int, settings: str) -> dict:
    output = work / f"{settings}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "data.max_length": 512,
        "data.packing": "true",
        "lora.target_modules": "all-linear",
        "training.output_dir": output,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": args.steps,
        "training.learning_rate": "2e-4",
        "training.seed": seed,
    } | dict(change.split("=", 1) for change in args.set.split(",") if change)
    if settings == "fp8":
        options["model.frozen_compute"] = "fp8"
    config = work / "run.toml"
    first = f'[model]\nmodel_name_or_path = "{args.model}"\n[data]\ntrain_file = "train.jsonl"\n'
    config.write_text(first)
    changes = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    run([args.finetune, config, *changes], work)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "tokens_per_second" in step]
    told = run(
        [args.qlora, "eval", "--model", args.model, "--adapter", output, "--all-tokens", "--json", "heldout.jsonl"], work
    )
    told = json.loads(told)
    late = steps[len(steps) // 5 :]
    return {
        "model": args.model.name,
        "settings": settings,
        "seed": seed,
        "steps": len(steps),
        "held_out_loss": round(told["loss"], 6),
        "training_loss": round(statistics.mean(step["loss"] for step in steps[-50:]), 6),
        "tok_s": round(sum(step["tokens"] for step in late) / sum(step["tokens"] / step["tokens_per_second"] for step in late)),
        "gpu": gpu(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("finetune", "qlora", "model", "text"):
        parser.add_argument(f"--{name}", type=lambda text: pathlib.Path(text).resolve(), required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/fp8_loss"))
    parser.add_argument("--seeds", default="1,2,3", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--settings", default="default,fp8", type=lambda text: text.split(","))
    parser.add_argument("--set", default="", help="further options of all runs: key=value,...")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    training, held = rows(args.text)
    write(work / "train.jsonl", training)
    write(work / "heldout.jsonl", held)
    print(f"{len(training)} rows to train on, {len(held)} held out", flush=True)
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        for settings in args.settings:
            row = train(args, work, seed, settings)
            found.setdefault(settings, []).append(row["held_out_loss"])
            print(row, flush=True)
            if args.out:
                new = not args.out.exists()
                with args.out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
    if len(found) == 2:
        first, second = found.values()
        shares = [100 * (b / a - 1) for a, b in zip(first, second)]
        print("held-out loss of the second against the first: " + ", ".join(f"{share:+.3f}%" for share in shares))


if __name__ == "__main__":
    main()
