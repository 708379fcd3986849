#!/usr/bin/env python3
"""One long sequence on several GPUs of one host (`context_parallel_size`): `qlora train` as a user starts it.

    python3 scripts/bench/context_parallel.py --qlora target/release/qlora --model MODEL --length 262144 --gpus 1,2 [--steps 2]
        [--budget 24] [--case seq262144] [--out benches/results/scale_out.csv]

MODEL is a folder made by main_job/model.py; its `max_position_embeddings` is raised to the length. A row is a prompt of one token and a
completion of all the others, so every token but the first is trained; LoRA r = 16 on all linear layers, everything else default.

tok_s is that of the last step, from metrics.jsonl (a step takes so long that there is nothing to warm up); peak_gb the pool's counter
on rank 0; the line printed besides says what nvidia-smi saw at most on a GPU: allocator, NCCL and context. efficiency = tok/s of N /
(N x tok/s of one), where both ran. --budget limits the pool of every GPU, in GB. The check `same` (--same LENGTH) compares the losses of
5 steps of the same sequences, packed, on N GPUs with one: a line, and a failure above 2e-3. Standard library only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "main_job"))
import rows  # noqa: E402
import scale_out  # noqa: E402


class Used(threading.Thread):
    """The most memory that nvidia-smi sees on a GPU while a program runs, in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()

    def run(self):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.ended.wait(1.0):
            try:
                said = subprocess.run(command, capture_output=True, text=True)
            except OSError:
                return
            self.most = max([self.most, *(int(line) for line in said.stdout.split() if line.isdigit())])


class Long(scale_out.Bench):
    def folder(self, name: str) -> pathlib.Path:
        folder = super().folder(name)
        (folder / "model").unlink()
        (folder / "rows.jsonl").unlink()
        (folder / "model").mkdir()
        for file in self.args.model.resolve().iterdir():
            if file.name != "config.json":
                (folder / "model" / file.name).symlink_to(file)
        config = json.loads((self.args.model / "config.json").read_text())
        config["max_position_embeddings"] = max(self.args.length, config["max_position_embeddings"])
        (folder / "model" / "config.json").write_text(json.dumps(config))
        return folder

    def sequences(self, name: str, gpus: int, lengths: list[int], more: list[str]) -> tuple[list[dict], int]:
        """The steps of a run over sequences of these lengths."""
        folder = self.folder(name)
        numbers = rows.Numbers(rows.SEED)
        # A prompt of one token, and the end token.
        data = [{"prompt": rows.text(numbers, 1), "completion": " " + rows.text(numbers, length - 2)} for length in lengths]
        rows.write_lines(folder / "rows.jsonl", data)
        command = self.command(folder, gpus, ["--logging-steps", "1", *more])
        if gpus > 1:
            command += ["--context-parallel-size", str(gpus)]
        used, log = Used(), self.work / f"{name}.txt"
        used.start()
        begin = time.monotonic()
        with log.open("w") as out:
            ended = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=self.args.limit)
        used.ended.set()
        if ended.returncode != 0:
            raise SystemExit(f"{name}: exit status {ended.returncode}\n{log.read_text()[-3000:]}")
        plan = [line for line in log.read_text().splitlines() if "memory plan" in line]
        print(f"{name}: {time.monotonic() - begin:.0f} s in all; at most {used.most} MiB on a GPU; {plan[0] if plan else ''}", flush=True)
        steps = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
        return [step for step in steps if "tokens_per_second" in step], used.most

    def long(self, case: str) -> None:
        length, one = self.args.length, None
        budget = ["--memory-budget", str(self.args.budget)] if self.args.budget else []
        for gpus in self.args.gpus:
            more = ["--max-steps", str(self.args.steps), "--max-length", str(length), "--packing=false"]
            more += ["--per-device-train-batch-size", "1", *budget]
            steps, _ = self.sequences(f"{case}-{gpus}", gpus, [length] * self.args.steps, more)
            row = {"tok_s": round(steps[-1]["tokens_per_second"], 1)}
            row["peak_gb"] = round(max(step.get("gpu_peak_memory") or 0 for step in steps) / 1e9, 3)
            seconds = [round(step["tokens"] / step["tokens_per_second"], 2) for step in steps]
            print(f"{case}, {gpus} GPUs: steps of {seconds} s, losses {[step['loss'] for step in steps]}", flush=True)
            one = row["tok_s"] if gpus == 1 else one
            row["efficiency"] = round(row["tok_s"] / (gpus * one), 4) if one and gpus > 1 else ""
            self.note({"case": case, "gpus": gpus} | row)

    def same(self, length: int) -> None:
        lengths = [length // 2, length // 3, length // 7, length] * 10
        # packed4x2048.toml packs.
        more = ["--max-steps", "5", "--max-length", str(length), "--per-device-train-batch-size", "1"]
        losses = []
        for gpus in (1, max(self.args.gpus)):
            steps, _ = self.sequences(f"same-{gpus}", gpus, lengths, more)
            losses.append([step["loss"] for step in steps])
        largest = max(abs(a / b - 1) for a, b in zip(*losses))
        print(f"same: losses {losses}, largest difference {largest:.1e}", flush=True)
        self.failed |= not largest < 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qlora", type=lambda text: pathlib.Path(text).resolve(), required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--length", type=int, default=262144)
    parser.add_argument("--gpus", default="1,2", type=lambda text: [int(number) for number in text.split(",")])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--budget", type=float, help="GB of the pool of each GPU")
    parser.add_argument("--case", help="its name in the results")
    parser.add_argument("--same", type=int, metavar="LENGTH", help="compare losses over packed sequences instead")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/context_parallel"))
    parser.add_argument("--limit", type=float, default=590, help="seconds of one run")
    args = parser.parse_args()
    bench = Long(args)
    if args.same:
        bench.same(args.same)
    else:
        bench.long(args.case or f"seq{args.length}")
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
