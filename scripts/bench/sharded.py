#!/usr/bin/env python3
"""Training over a frozen base that no GPU holds whole: in shares on several GPUs, or streamed from host memory.

    python3 scripts/bench/random_4bit.py MODEL --shape 70b [--layers 80]
    python3 scripts/bench/sharded.py --qlora target/release/qlora --model MODEL [--out benches/results/scale_out.csv]
        [--cases 70b-sharded-24,70b-sharded,70b-streamed-24] [--steps 4:10] [--budget 23.7] [--checks same]

  70b-sharded-24   two GPUs with 24 GiB each: half of the base on each, one bin of 2,048 tokens a GPU and a step, adamw_8bit, the
                   embedding in host memory, r = 16 on all linear layers
  70b-sharded      two GPUs, the memory that is there, two bins of 2,048 a GPU
  70b-streamed-24  one GPU with 24 GiB, the base in host memory, one bin of 4,096; then the same with the whole base on the GPU
                   and no cap (70b-resident): efficiency is the first's tok/s over the second's
  70b-streamed     as 70b-streamed-24 without the second run

BUDGET is the `memory_budget` of the capped cases in GB: 24 GiB are 25.77, of which NCCL and the CUDA context take their part beside
it. Of these cases peak_gb is what nvidia-smi saw in use on the fullest GPU, everything included; of others the allocator's peak.
`same`: a few steps with the base resident, streamed and sharded, on as many GPUs each (full_determinism): the adapters have the same
bytes; give it a model of few layers. With fewer than 80 layers the case's name says how many. Standard library only.
"""

import argparse
import csv
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "main_job"))
import results  # noqa: E402
import rows  # noqa: E402

COLUMNS = "system case gpus tok_s peak_gb efficiency gpu driver commit date".split()
CONFIG = """
[model]
model_name_or_path = "model"
# The checkpoint is stored quantized.
load_in_4bit = false

[lora]
r = 16
target_modules = "all-linear"

[data]
train_file = "rows.jsonl"
packing = true

[training]
gradient_accumulation_steps = 1
logging_steps = 1
save_steps = 0
output_dir = "output"
"""
CAPPED = ["--optim", "adamw_8bit", "--offload-embedding=true"]


class Watch(threading.Thread):
    """The most memory in use on any GPU, by nvidia-smi."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()

    def run(self):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        command += [f"--id={visible}"] if visible else []
        while not self.ended.wait(0.5):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
                self.most = max([self.most] + [int(line) for line in said.split()])
            except (OSError, ValueError, subprocess.TimeoutExpired):
                return

    def end(self) -> float:
        self.ended.set()
        return self.most * 1024 * 1024 / 1e9


class Bench:
    def __init__(self, args):
        self.args, self.place, self.failed = args, results.place(), False
        self.work = args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        rows.write_rows(self.work)
        self.layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]

    def run(self, name: str, gpus: int, more: list[str]) -> tuple[pathlib.Path, float, float]:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "model").symlink_to(self.args.model.resolve())
        (folder / "rows.jsonl").symlink_to(self.work / "rows.jsonl")
        (folder / "config.toml").write_text(CONFIG)
        command = [str(self.args.qlora), "train", "config.toml", *more]
        command += ["--nproc-per-node", str(gpus)] if gpus > 1 else []
        watch, log, begin = Watch(), self.work / f"{name}.txt", time.monotonic()
        watch.start()
        with log.open("w") as out:
            status = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=self.args.limit
            ).returncode
        used, seconds = watch.end(), time.monotonic() - begin
        text = log.read_text()
        if status != 0:
            raise SystemExit(f"{name}: exit status {status}\n{text[-3000:]}")
        for line in text.splitlines():
            if "base " in line or "memory plan" in line:
                print(f"  {line.strip()}", flush=True)
        return folder, used, seconds

    def speed(self, name: str, gpus: int, more: list[str]) -> dict:
        first, last = self.args.steps
        folder, used, in_all = self.run(name, gpus, ["--max-steps", str(last), *more])
        steps = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if "tokens_per_second" in step]
        counted = [step for step in steps if first <= step["step"] <= last]
        seconds = [step["tokens"] / step["tokens_per_second"] for step in counted]
        peak = max(step.get("gpu_peak_memory") or 0 for step in steps) / 1e9
        print(
            f"{name}: {len(counted)} steps of {min(seconds):.2f} to {max(seconds):.2f} s, {in_all:.0f} s in all, allocator {peak:.2f} GB, "
            f"nvidia-smi {used:.2f} GB, losses {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}",
            flush=True,
        )
        return {"tok_s": round(sum(step["tokens"] for step in counted) / sum(seconds), 1), "peak": peak, "used": used}

    def note(self, case: str, gpus: int, run: dict, capped: bool, efficiency="") -> None:
        name = case if self.layers == 80 else f"{case}-{self.layers}-layers"
        peak = run["used"] if capped and run["used"] else run["peak"]
        row = {"system": results.OURS, "case": name, "gpus": gpus, "tok_s": run["tok_s"], "peak_gb": round(peak, 3)}
        row |= {"efficiency": efficiency} | self.place
        print(", ".join(f"{column} {row[column]}" for column in COLUMNS[1:6] if row[column] != ""), flush=True)
        if self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            new = not self.args.out.exists()
            with self.args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)

    def case(self, case: str) -> None:
        cap = [*CAPPED, "--memory-budget", str(self.args.budget)]
        shape = lambda bins, length: ["--per-device-train-batch-size", str(bins), "--max-length", str(length)]  # noqa: E731
        if case == "70b-sharded-24":
            self.note(case, 2, self.speed(case, 2, [*cap, *shape(1, 2048), "--base-placement", "sharded"]), True)
        elif case == "70b-sharded":
            self.note(case, 2, self.speed(case, 2, [*shape(2, 2048), "--base-placement", "sharded"]), False)
        elif case in ("70b-streamed-24", "70b-streamed"):
            streamed = self.speed(case, 1, [*cap, *shape(1, 4096), "--base-placement", "streamed"])
            efficiency = ""
            if case == "70b-streamed-24":
                whole = self.speed("70b-resident", 1, [*CAPPED, *shape(1, 4096), "--base-placement", "resident"])
                self.note("70b-resident", 1, whole, False)
                efficiency = round(streamed["tok_s"] / whole["tok_s"], 4)
            self.note("70b-streamed-24", 1, streamed, True, efficiency)
        else:
            raise SystemExit(f"there is no case {case}")

    def same(self) -> None:
        common = ["--max-steps", "5", "--full-determinism=true", "--max-length", "1024", "--gradient-checkpointing=true"]
        one = [("resident", 1, 2), ("streamed", 1, 2)]
        two = [("resident", 2, 1), ("sharded", 2, 1), ("streamed", 2, 1)] if self.args.gpus > 1 else []
        for placement, gpus, each in one + two:
            more = ["--base-placement", placement, "--gradient-accumulation-steps", str(each), "--per-device-train-batch-size", "1"]
            folder, *_ = self.run(f"same-{placement}-{gpus}", gpus, [*common, *more])
            content = (folder / "output" / "adapter_model.safetensors").read_bytes()
            log = (folder / "output" / "metrics.jsonl").read_text().splitlines()
            losses = [json.loads(line)["loss"] for line in log if "tokens_per_second" in line]
            found = (hashlib.sha256(content).hexdigest(), losses)
            if placement == "resident":
                whole = found
            print(f"same: {placement}, {gpus} GPUs: {'equal' if found == whole else 'DIFFERS'}, losses {losses}", flush=True)
            self.failed |= found != whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    listed = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--qlora", type=lambda text: pathlib.Path(text).resolve(), required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--gpus", type=int, default=2, help="what there is, for the check")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/sharded"))
    parser.add_argument("--cases", default="70b-sharded-24,70b-sharded", type=listed)
    parser.add_argument("--checks", default="", type=listed)
    parser.add_argument("--steps", default="4:10", type=lambda text: tuple(int(number) for number in text.split(":")))
    parser.add_argument("--budget", type=float, default=23.7)
    parser.add_argument("--limit", type=float, default=240, help="seconds of one run")
    args = parser.parse_args()
    bench = Bench(args)
    for check in args.checks:
        getattr(bench, check)()
    for case in args.cases:
        bench.case(case)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
