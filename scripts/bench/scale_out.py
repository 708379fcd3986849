#!/usr/bin/env python3
"""Training on several GPUs of one host against one of them: `qlora train` as a user starts it.

    python3 scripts/bench/scale_out.py --qlora target/release/qlora --model MODEL [--gpus 2]
        [--out benches/results/scale_out.csv] [--cases main-job,dp4x2048,dp1x2048] [--steps 11:40]

MODEL is a folder made by main_job/model.py. Every GPU gets the same micro-batches a step, so N GPUs train on N times the tokens.

  main-job   the packed file of main_job.py (packed4x2048.toml), everything else default
  dp4x2048   the same with 4 bins a GPU and a step (main-job's figures by another name where the defaults agree)
  dp1x2048   one bin a GPU and a step

tok_s counts the tokens of all ranks over the seconds of the counted steps, from metrics.jsonl; peak_gb is the pool's counter on
rank 0. efficiency = tok/s of N / (N x tok/s of one). Checks besides, which fail the script: `same` (20 steps on 2 GPUs against one that
accumulates two micro-batches, full_determinism: the adapters have the same bytes) and `killed` (a rank is killed: seconds until the
program has ended). Standard library only.
"""

import argparse
import csv
import hashlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "main_job"))
import results  # noqa: E402
import rows  # noqa: E402

COLUMNS = "system case gpus tok_s peak_gb efficiency gpu driver commit date".split()
BATCH = {"main-job": None, "dp4x2048": 4, "dp1x2048": 1}


class Bench:
    def __init__(self, args):
        self.args, self.place = args, results.place()
        self.work = args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        rows.write_rows(self.work)

    def command(self, folder: pathlib.Path, gpus: int, more: list[str]) -> list[str]:
        command = [str(self.args.qlora), "train", str(HERE / "main_job" / "packed4x2048.toml")]
        command += ["--output-dir", "output", "--save-steps", "0", *more]
        return command + (["--nproc-per-node", str(gpus)] if gpus > 1 else [])

    def folder(self, name: str) -> pathlib.Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "model").symlink_to(self.args.model.resolve())
        (folder / "rows.jsonl").symlink_to(self.work / "rows.jsonl")
        return folder

    def start(self, name: str, gpus: int, more: list[str]):
        folder = self.folder(name)
        log = (self.work / f"{name}.txt").open("w")
        return folder, subprocess.Popen(
            self.command(folder, gpus, more), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def run(self, name: str, gpus: int, more: list[str]) -> pathlib.Path:
        folder, process = self.start(name, gpus, more)
        if process.wait(timeout=self.args.limit) != 0:
            raise SystemExit(f"{name}: exit status {process.returncode}\n{(self.work / f'{name}.txt').read_text()[-3000:]}")
        return folder

    def speed(self, case: str, gpus: int) -> dict:
        first, last = self.args.steps
        more = ["--max-steps", str(last), "--logging-steps", "1"]
        if BATCH[case]:
            more += ["--per-device-train-batch-size", str(BATCH[case])]
        begin = time.monotonic()
        folder = self.run(f"{case}-{gpus}", gpus, more)
        seconds_in_all = time.monotonic() - begin
        steps = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if "tokens_per_second" in step]
        counted = [step for step in steps if first <= step["step"] <= last]
        seconds = sum(step["tokens"] / step["tokens_per_second"] for step in counted)
        peak = max(step.get("gpu_peak_memory") or 0 for step in steps) / 1e9
        median = statistics.median(step["tokens"] / step["tokens_per_second"] for step in counted)
        print(f"{case}, {gpus} GPUs: a step {1000 * median:.0f} ms, {seconds_in_all:.1f} s in all", flush=True)
        return {"tok_s": round(sum(step["tokens"] for step in counted) / seconds, 1), "peak_gb": round(peak, 3)}

    def note(self, row: dict) -> None:
        row = {"system": results.OURS} | row | self.place
        print(", ".join(f"{name} {row[name]}" for name in COLUMNS[1:6] if row.get(name) != ""), flush=True)
        if self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            new = not self.args.out.exists()
            with self.args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
                if new:
                    writer.writeheader()
                writer.writerow({name: row.get(name, "") for name in COLUMNS})

    def cases(self) -> None:
        gpus = self.args.gpus
        for case in self.args.cases:
            one = self.speed(case, 1)
            self.note({"case": case, "gpus": 1, "efficiency": ""} | one)
            many = self.speed(case, gpus)
            self.note({"case": case, "gpus": gpus, "efficiency": round(many["tok_s"] / (gpus * one["tok_s"]), 4)} | many)

    def same(self) -> None:
        common = ["--max-steps", "20", "--full-determinism=true", "--per-device-train-batch-size", "1", "--logging-steps", "1"]
        digests, losses = [], []
        for gpus, each in [(1, 2), (2, 1)]:
            folder = self.run(f"same-{gpus}", gpus, [*common, "--gradient-accumulation-steps", str(each)])
            content = (folder / "output" / "adapter_model.safetensors").read_bytes()
            digests.append(hashlib.sha256(content).hexdigest())
            log = (folder / "output" / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in log if "tokens_per_second" in line])
        largest = max(abs(a / b - 1) for a, b in zip(*losses))
        equal = digests[0] == digests[1]
        print(f"same: adapters {'equal' if equal else 'differ'}, largest difference of a loss {largest:.1e}", flush=True)
        self.failed |= not equal

    def killed(self) -> None:
        folder, process = self.start("killed", 2, ["--max-steps", "100000", "--logging-steps", "1"])
        metrics = folder / "output" / "metrics.jsonl"
        deadline = time.monotonic() + self.args.limit
        while not metrics.exists() or metrics.read_text().count("\n") < 8:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit("killed: no steps\n" + (self.work / "killed.txt").read_text()[-3000:])
            time.sleep(0.05)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {pid: pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
        victim = next(int(pid) for pid, environment in ranks.items() if b"RANK=1" in environment)
        begin = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        process.wait(timeout=60)
        seconds = time.monotonic() - begin
        said = [line for line in (self.work / "killed.txt").read_text().splitlines() if "rank 1 (process" in line]
        print(f"killed: all had ended after {seconds:.1f} s; {said[-1] if said else 'nobody named the rank'}", flush=True)
        self.failed |= seconds > 15 or not said

    failed = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qlora", type=lambda text: pathlib.Path(text).resolve(), required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/scale_out"))
    parser.add_argument("--cases", default="main-job,dp1x2048", type=lambda text: [case for case in text.split(",") if case])
    parser.add_argument("--checks", default="same,killed", type=lambda text: [check for check in text.split(",") if check])
    parser.add_argument("--steps", default="11:40", type=lambda text: tuple(int(number) for number in text.split(":")))
    parser.add_argument("--limit", type=float, default=150, help="seconds of one run")
    args = parser.parse_args()
    bench = Bench(args)
    for check in args.checks:
        getattr(bench, check)()
    bench.cases()
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
