#!/usr/bin/env python3
"""The main job as a user runs it: built programs as processes, with the TOML files beside this script.

    python3 main_job.py --finetune target/release/examples/finetune --model MODEL [--out benches/results/main_job.csv]
        [--cases packed4x2048,docs8] [--budgets none,8,12,16,24,48] [--set training.gradient_checkpointing=false]...
        [--minimal .../minimal_train] [--qlora .../qlora] [--decode .../decode-HASH]

MODEL is a folder made by model.py. The rows (rows.py) are made on the way. Standard library only.

Cases:
  packed4x2048, docs8   the TOML of that name with each of --budgets: the defaults, and the best of the settings given by
                        --set (one --set may hold several keys, separated by commas)
  untouched             a TOML with model and file only
  minimal               examples/minimal_train.rs, a program with `TrainConfig::default()`, on the same
  generate256           `qlora generate` with an adapter and 256 prompts, defaults; beside it benches/decode at its batch

tok_s counts every token of the batches, from metrics.jsonl: the tokens over the seconds of steps 11 to 40 (--steps), with
a budget 5 to 24 (--budget-steps). Those seconds are a step's from its data to its loss on the host; the run is stopped
after the last step that counts. peak_gb is the GPU pool's counter from metrics.jsonl, predicted_gb what the printed memory
plan says, trained_tokens those with a loss in the counted steps; GB are 10^9 bytes. For generate256, tok_s is what the
program prints: new tokens over the whole time after loading, prompts included; for benches/decode without the prompts.

Printed besides: the slowest step after the third as a share of the median (tokens/s), and the seconds from the start of
the process to the first loss on its screen. Each run's figures also go to WORK/runs.jsonl, each run's output and metrics
to WORK/logs. A run that fails or takes longer than --limit is reported and the others go on; --seconds ends all.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

import results
import rows

HERE = pathlib.Path(__file__).resolve().parent
CASES = ["packed4x2048", "docs8", "untouched", "minimal", "generate256"]


class Failure(Exception):
    pass


class Process:
    """A program whose output goes to a file, with the time at which a line first matched."""

    def __init__(self, command: list, cwd: pathlib.Path, log: pathlib.Path, pattern: str | None = None):
        self.start = time.monotonic()
        self.lines: list[str] = []
        self.matched: float | None = None
        self.pattern = re.compile(pattern) if pattern else None
        self.log = log.open("w")
        # In a group of its own, so that it can be stopped with its children.
        self.child = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.child.stdout:
            if self.matched is None and self.pattern and self.pattern.search(line):
                self.matched = time.monotonic() - self.start
            self.lines.append(line.rstrip("\n"))
            self.log.write(line)
            self.log.flush()

    def wait(self, deadline: float, stop_when=None) -> int:
        """The exit status. `stop_when` is asked often, and asks the program to stop as Ctrl-C would."""
        asked = None
        while self.child.poll() is None:
            now = time.monotonic()
            if now > deadline or (asked and now - asked > 30):
                self.kill()
                if asked is None:
                    raise Failure(f"stopped after {now - self.start:.0f} s")
                break
            if asked is None and stop_when and stop_when():
                os.killpg(self.child.pid, signal.SIGINT)
                asked = now
            time.sleep(0.02)
        self.reader.join(timeout=5)
        self.log.close()
        return 0 if asked else self.child.returncode

    def kill(self) -> None:
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()

    def first(self, pattern: str) -> re.Match | None:
        return next((found for found in (re.search(pattern, line) for line in self.lines) if found), None)

    def last_words(self) -> str:
        said = [line for line in self.lines if line.strip()]
        begin = next((i for i, line in enumerate(said) if line.startswith("Error")), max(len(said) - 3, 0))
        return " | ".join(said[begin : begin + 5])[:600] or "it said nothing"


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The training steps' lines; the last one may be half written."""
    steps = []
    try:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if "tokens_per_second" in entry:
                steps.append(entry)
    except (OSError, ValueError):
        pass
    return steps


def figures(metrics: list[dict], first: int, last: int) -> dict:
    counted = [entry for entry in metrics if first <= entry["step"] <= last]
    if not counted:
        raise Failure(f"there are {len(metrics)} steps: none counts")
    tokens = sum(entry["tokens"] for entry in counted)
    seconds = sum(entry["tokens"] / entry["tokens_per_second"] for entry in counted)
    warm = [entry["tokens_per_second"] for entry in metrics if entry["step"] > 3]
    found = {
        "tok_s": round(tokens / seconds, 1),
        "trained_tokens": sum(entry["trained_tokens"] for entry in counted),
        "tokens": tokens,
        "steps": len(counted),
        "loss": counted[-1]["loss"],
    }
    if warm:
        found["slowest_share"] = round(min(warm) / statistics.median(warm), 3)
    peak = max((entry.get("gpu_peak_memory") or 0 for entry in metrics), default=0)
    return found | ({"peak_gb": round(peak / 1e9, 3)} if peak else {})


class Bench:
    def __init__(self, args):
        self.args = args
        self.work = args.work.resolve()
        self.logs = self.work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + args.seconds
        self.place = results.place()
        self.runs: list[dict] = []
        self.adapter: pathlib.Path | None = None
        rows.write_rows(self.work)

    def deadline(self) -> float:
        now = time.monotonic()
        if self.end - now < self.args.least:
            raise Failure("no time left")
        return min(self.end, now + self.args.limit)

    def folder(self, name: str) -> pathlib.Path:
        """A fresh one that has the model and the files."""
        folder = self.work / "run" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "model").symlink_to(self.args.model.resolve())
        for file in ("rows.jsonl", "prompts.jsonl"):
            (folder / file).symlink_to(self.work / file)
        return folder

    def train(self, name: str, command: list, steps: tuple[int, int], total: int = 0) -> dict:
        """Runs a training program up to the last step that counts, or to its end where it has no more than that."""
        deadline, folder = self.deadline(), self.folder(name)
        metrics = folder / "output" / "metrics.jsonl"
        process = Process(command, folder, self.logs / f"{name}.txt", r"\bloss[ =:]+[\d.]+")
        seen = {"size": 0, "step": 0, "first": None}

        def done() -> bool:
            size = metrics.stat().st_size if metrics.exists() else 0
            if size != seen["size"]:
                seen["size"] = size
                seen["step"] = max((entry["step"] for entry in read_metrics(metrics)), default=0)
                if seen["step"] and seen["first"] is None:
                    seen["first"] = time.monotonic() - process.start
            return seen["step"] >= steps[1]

        try:
            status = process.wait(deadline, None if total and total <= steps[1] else done)
            if status != 0:
                raise Failure(f"exit status {status}: {process.last_words()}")
            found = figures(read_metrics(metrics), *steps)
        finally:
            process.kill()
            if metrics.exists():
                shutil.copy(metrics, self.logs / f"{name}.jsonl")
            shutil.rmtree(folder, ignore_errors=True)
        plan = process.first(r"memory plan: (peak ([\d.]+) GB.*)")
        if plan:
            found |= {"predicted_gb": float(plan[2]), "plan": plan[1]}
        # A program that prints no steps: when the first one was in metrics.jsonl.
        first = process.matched or seen["first"]
        if first:
            found["first_loss_s"] = round(first, 2)
        return found

    def finetune(self, case: str, settings: str, budget: str) -> dict:
        command = [self.args.finetune, HERE / f"{case}.toml", *self.args.extra.split()]
        changes = [] if settings == "default" else settings.split(",")
        for change in changes + (["model.device=cpu"] if self.args.cpu else []):
            command += ["--set", change]
        if budget:
            command += ["--memory-budget", budget]
        name = "-".join([case, re.sub(r"[^\w.]+", "_", settings), budget or "none"])
        total = re.search(r"^max_steps = (\d+)", (HERE / f"{case}.toml").read_text(), re.MULTILINE)
        steps = self.args.budget_steps if budget else self.args.steps
        return self.train(name, command, steps, int(total[1]) if total else 0)

    def fresh_adapter(self) -> pathlib.Path:
        """An adapter that changes nothing yet, so that no answer ends before it has all its tokens."""
        if self.adapter is None:
            folder = self.folder("adapter")
            command = [self.args.finetune, HERE / "docs8.toml"]
            changes = ["training.max_steps=1", "training.warmup_steps=0", "training.learning_rate=1e-12"]
            for change in changes + (["model.device=cpu"] if self.args.cpu else []):
                command += ["--set", change]
            process = Process(command, folder, self.logs / "adapter.txt")
            if process.wait(self.deadline()) != 0:
                raise Failure(f"no adapter: {process.last_words()}")
            self.adapter = folder / "output"
        return self.adapter

    def generate(self) -> dict:
        adapter, folder = self.fresh_adapter(), self.folder("generate256")
        command = [self.args.qlora, "generate", "--model", "model", "--adapter", adapter, "--raw"]
        command += ["--batch", "prompts.jsonl", "--output", "answers.jsonl"]
        command += ["--device", "cpu"] if self.args.cpu else []
        command += ["--max-new-tokens", str(self.args.new)] if self.args.new != 256 else []
        process = Process(command, folder, self.logs / "generate256.txt")
        if process.wait(self.deadline()) != 0:
            raise Failure(process.last_words())
        found = process.first(r"(\d+) answers in ([\d.]+) s, ([\d.]+) tokens/s")
        if not found:
            raise Failure(f"no figures: {process.last_words()}")
        answers, seconds, speed = int(found[1]), float(found[2]), float(found[3])
        shutil.rmtree(folder, ignore_errors=True)
        return {"tok_s": speed, "answers": answers, "seconds": seconds, "batch": self.batch(process)}

    def batch(self, process: Process) -> int:
        """How many prompts the program answers together: as it prints, or its default."""
        printed = process.first(r"batch(?:es)? of (\d+)")
        if self.args.generate_batch or printed:
            return self.args.generate_batch or int(printed[1])
        usage = subprocess.run([self.args.qlora, "generate", "--help"], capture_output=True, text=True).stdout
        default = re.search(r"--batch-size[^[]*\[default: (\d+)\]", usage)
        return int(default[1]) if default else 8

    def decode(self, batch: int) -> dict:
        """benches/decode at this batch, with prompts of the mean length."""
        prompts = [json.loads(line)["prompt"] for line in (self.work / "prompts.jsonl").read_text().splitlines()]
        mean = round(statistics.mean(len(prompt.split()) for prompt in prompts))
        command = [self.args.decode, "--bench", "--batch", batch, "--prompt", mean, "--new", self.args.new]
        command += ["--prefill", 256]
        process = Process(command, self.work, self.logs / "decode.txt")
        if process.wait(self.deadline()) != 0:
            raise Failure(process.last_words())
        found = process.first(rf"decode batch {batch}: ([\d.]+) tok/s")
        if not found:
            raise Failure(f"no figures: {process.last_words()}")
        return {"tok_s": float(found[1]), "batch": batch}

    def note(self, case: str, settings: str, budget: str, measure, keep: bool = True) -> dict | None:
        """Measures one row and writes it down; a failure is printed and kept in runs.jsonl only, so is what not to keep."""
        row = {"system": results.OURS, "case": case, "settings": settings.replace(",", " "), "budget_gb": budget}
        try:
            row |= measure()
        except (Failure, OSError, subprocess.SubprocessError) as error:
            row["error"] = str(error)
        row |= self.place
        self.runs.append(row)
        with (self.work / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if keep and "error" not in row:
            self.keep(row)
        outcome = row.get("error") or f"{row['tok_s']:,.0f} tok/s"
        print(f"{case}, {settings}, budget {budget or 'none'}: {outcome}", flush=True)
        return None if "error" in row else row

    def keep(self, row: dict) -> None:
        if self.args.out:
            results.append(self.args.out, row)

    def settings(self, case: str, budget: str) -> None:
        """The defaults' row, and beside it the best of those with settings."""
        self.note(case, "default", budget, lambda: self.finetune(case, "default", budget))
        explicit = []
        for settings in self.args.set:
            explicit.append(self.note(case, settings, budget, lambda: self.finetune(case, settings, budget), False))
        best = max(filter(None, explicit), key=lambda row: row["tok_s"], default=None)
        if best:
            self.keep(best)

    def run(self) -> None:
        args = self.args
        for case in args.cases:
            if case == "minimal":
                if not args.minimal:
                    raise SystemExit("the case minimal needs --minimal PROGRAM")
                command = [args.minimal, "model", "rows.jsonl"]
                self.note(case, "default", "", lambda: self.train("minimal", command, args.steps))
            elif case == "generate256":
                if not args.qlora:
                    raise SystemExit("the case generate256 needs --qlora PROGRAM")
                made = self.note(case, "default", "", self.generate)
                if args.decode and made:
                    batch = made["batch"]
                    self.note(case, f"benches/decode batch {batch}", "", lambda: self.decode(batch))
            elif case == "untouched":
                self.note(case, "default", "", lambda: self.finetune(case, "default", ""))
            else:
                for budget in args.budgets:
                    self.settings(case, budget)

    def table(self) -> str:
        lines = []
        for row in self.runs:
            peak, predicted = row.get("peak_gb"), row.get("predicted_gb")
            shown = [row["case"], row["settings"], row["budget_gb"] or "none"]
            if "error" in row:
                lines.append([*shown, *[""] * 7, row["error"][:90]])
                continue
            off = f"{100 * (predicted / peak - 1):+.1f}%" if peak and predicted else ""
            figures = [f"{row['tok_s']:,.0f}", peak, predicted, off]
            figures += [row.get("trained_tokens"), row.get("slowest_share"), row.get("first_loss_s")]
            lines.append(shown + ["" if figure is None else str(figure) for figure in figures] + [""])
        header = "case,settings,budget,tok/s,GB,planned,off,trained,slowest/median,first loss s,"
        return results.table(header.split(","), lines)


def arguments():
    def span(text: str) -> tuple[int, int]:
        first, last = (int(number) for number in text.split(":"))
        return first, last

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finetune", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--minimal", type=pathlib.Path)
    parser.add_argument("--qlora", type=pathlib.Path)
    parser.add_argument("--decode", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/main_job"))
    parser.add_argument("--out", type=pathlib.Path, help="CSV file to append to")
    parser.add_argument("--cases", default="packed4x2048,docs8", type=lambda text: text.split(","))
    parser.add_argument("--budgets", default="none", type=lambda text: text.split(","), help="GB, or none")
    parser.add_argument("--set", action="append", default=[], help="measured beside the defaults: key=value,...")
    parser.add_argument("--steps", type=span, default=(11, 40), help="steps that count, 11:40")
    parser.add_argument("--budget-steps", type=span, default=(5, 24), help="the same with a budget, 5:24")
    parser.add_argument("--extra", default="", help="further arguments for finetune, such as --extra=-v")
    parser.add_argument("--new", type=int, default=256, help="new tokens of an answer")
    parser.add_argument("--generate-batch", type=int, help="what benches/decode takes, if the program does not say it")
    parser.add_argument("--limit", type=float, default=150, help="seconds of one run")
    parser.add_argument("--seconds", type=float, default=3600, help="seconds of everything")
    parser.add_argument("--least", type=float, default=20, help="no run begins with fewer seconds left")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, to try this script with a tiny model")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    args.budgets = ["" if budget == "none" else budget for budget in args.budgets]
    for program in ("finetune", "minimal", "qlora", "decode", "model"):
        path = getattr(args, program)
        if path and not path.exists():
            parser.error(f"--{program}: {path} is not there")
        if path:
            setattr(args, program, path.resolve())
    return args


def main() -> None:
    args = arguments()
    # Users start with the checkpoint in the page cache as often as not; measurements always do.
    for file in args.model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as content:
            while content.read(1 << 24):
                pass
    bench = Bench(args)
    try:
        bench.run()
    finally:
        print("\n" + bench.table())
        if args.out:
            print("\n" + results.summary(args.out))
    sys.exit(any("error" in row for row in bench.runs))


if __name__ == "__main__":
    main()
