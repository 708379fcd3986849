#!/usr/bin/env python3
"""Ends one rank of a run on the CPU at a random moment, again and again: the others must end in time and name it, and the resumed
run must end with the bits of one that nobody disturbed.

    python3 scripts/ranks/kill_ranks.py --qlora target/release/qlora --cases 100 [--seed 1] [--log kill_ranks_cpu.log]

Every case is a run of `qlora train --nproc-per-node 2..4` with a tiny model, in which one rank, whichever, is

  killed   SIGKILL
  stopped  SIGSTOP; half of them wake up (SIGCONT) when the others have ended, and must then end by themselves
  loading  a rank that cannot load: no more files may be opened (prlimit --nofile) from a random moment of its start, or its copy of the
           model or the data is broken (then the ranks are started by hand, with torchrun's variables)

One case in four hits the start, before the first step. Checked: every other rank has ended LIMIT seconds after the signal (15), says
which rank it was, and in which step it was itself if it had begun one; no process is left; and the run, resumed on a random number of
ranks (1 to 4), has the adapter, the optimizer and the log of the undisturbed run, bit for bit. A case whose run was over before its
moment came is tried again at another. Ends with 1 if anything fails. Standard library only; Linux.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tiny_model  # noqa: E402

LIMIT = 15.0
MICRO_BATCHES = 12
STEPS = 60
KINDS = ["killed", "stopped", "loading"]
BREAKAGES = ["weights", "half the weights", "tokenizer", "config", "data"]
# What differs from run to run.
TIMES = re.compile(r"memory|second|runtime|imbalance")


class Failed(Exception):
    pass


def train(args, here: pathlib.Path, ranks: int, output: str, model: str = "model", data: str = "train.jsonl", launch=True):
    command = [str(args.qlora), "train", model, data, "--validation-file", "eval.jsonl", "--device", "cpu", "--r", "4"]
    command += ["--lora-dropout", "0.1", "--per-device-train-batch-size", "1", "--max-steps", str(args.steps)]
    command += ["--gradient-accumulation-steps", str(MICRO_BATCHES // ranks), "--logging-steps", "1", "--save-steps", "5"]
    command += ["--eval-steps", "25", "--output-dir", output, "--resume-from-checkpoint", "true"]
    return command + (["--nproc-per-node", str(ranks)] if launch and ranks > 1 else [])


def environment() -> dict:
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return keep | {"HF_HUB_OFFLINE": "1"}


def state(pid: int) -> str:
    """R, S, T, ...; Z and empty for one that has ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


def has_ended(pid: int) -> bool:
    return state(pid) in ("", "Z", "X")


def rank_of(pid: str) -> int | None:
    try:
        for entry in pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry[5:])
    except OSError:
        pass
    return None


def children(launcher: int) -> dict[int, int]:
    """The processes of a launcher's ranks."""
    found = {}
    for task in pathlib.Path(f"/proc/{launcher}/task").glob("*/children"):
        try:
            pids = task.read_text().split()
        except OSError:
            continue
        found |= {rank: int(pid) for pid in pids if (rank := rank_of(pid)) is not None}
    return found


def result(folder: pathlib.Path) -> dict:
    """What a run made, without what differs from run to run."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    log = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        log.append({name: value for name, value in json.loads(line).items() if not TIMES.search(name)})
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    leftovers = sorted(path.name for path in folder.glob("*.tmp-*"))
    return {
        "adapter": digest(folder / "adapter_model.safetensors"),
        f"optimizer of {last.name}": digest(last / "optimizer.safetensors"),
        "log": log,
        "leftovers": leftovers,
    }


def latest(folder: pathlib.Path) -> str:
    names = [path.name for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(names, key=lambda name: int(name.split("-")[1]), default="none")


class Case:
    """A run of several ranks with the outputs of each."""

    def __init__(self, args, here: pathlib.Path, number: int, chance: random.Random):
        self.args, self.here, self.number, self.chance = args, here, number, chance
        self.kind = KINDS[number % len(KINDS)]
        self.ranks = chance.randint(2, 4)
        self.victim = chance.randrange(self.ranks)
        self.breakage = chance.choice(BREAKAGES) if self.kind == "loading" and chance.random() < 0.5 else None
        self.early = chance.random() < 0.25
        self.wakes = self.kind == "stopped" and chance.random() < 0.5
        self.launcher, self.pids, self.files = None, {}, []

    def start(self) -> None:
        shutil.rmtree(self.here / "out", ignore_errors=True)
        if not self.breakage:
            file = (self.here / "case.txt").open("wb")
            self.files = [file]
            command = train(self.args, self.here, self.ranks, "out")
            self.launcher = subprocess.Popen(
                command, cwd=self.here, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            deadline = time.monotonic() + 10
            while len(self.pids) < self.ranks and time.monotonic() < deadline and self.launcher.poll() is None:
                self.pids |= children(self.launcher.pid)
            if len(self.pids) < self.ranks:
                raise Failed(f"{len(self.pids)} of {self.ranks} ranks were started")
            return
        model, data = break_copy(self.here, self.breakage)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(self.ranks):
            own = (model, data) if rank == self.victim else ("model", "train.jsonl")
            file = (self.here / f"case-{rank}.txt").open("wb")
            self.files.append(file)
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = subprocess.Popen(
                train(self.args, self.here, self.ranks, "out", *own, launch=False), cwd=self.here, stdin=subprocess.DEVNULL,
                env=environment() | {name: str(value) for name, value in variables.items()}, stdout=file, stderr=file,
            )  # fmt: skip
            self.processes.append(process)
            self.pids[rank] = process.pid

    def poll(self) -> None:
        """Ended children of this process are zombies until they are asked after."""
        for process in [self.launcher] if self.launcher else self.processes:
            process.poll()

    def others(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank != self.victim]

    def disturb(self, times: dict) -> str | None:
        """Waits for the moment and does it; None if the run was over before."""
        first, whole = times[self.ranks]
        if self.breakage:
            # The moment is that in which the rank comes upon it.
            victim = self.pids[self.victim]
            deadline = time.monotonic() + 60
            while not has_ended(victim) and time.monotonic() < deadline:
                self.poll()
                time.sleep(0.005)
            self.at = time.monotonic()
            return f"cannot load ({self.breakage} broken)"
        victim = self.pids[self.victim]
        if self.kind == "loading":
            time.sleep(self.chance.uniform(0, first * 0.5))
            most = self.chance.randint(3, 12)
            subprocess.run(["prlimit", "--pid", str(victim), f"--nofile={most}:{most}"], stderr=subprocess.DEVNULL, check=False)
            deadline = time.monotonic() + 60
            while not has_ended(victim):
                if self.launcher.poll() is not None or time.monotonic() > deadline:
                    return None
                time.sleep(0.005)
            self.at = time.monotonic()
            if latest(self.here / "out") == f"checkpoint-{self.args.steps}":
                # It had opened all that it needed.
                return None
            return f"may open {most} files"
        # Before the ranks have met, before the first step, or at any time after it.
        early = self.chance.choice([0.02, first])
        moment = self.chance.uniform(0, early) if self.early else self.chance.uniform(first, whole * 0.97)
        time.sleep(moment)
        if self.launcher.poll() is not None or has_ended(victim):
            return None
        os.kill(victim, signal.SIGKILL if self.kind == "killed" else signal.SIGSTOP)
        self.at = time.monotonic()
        return f"{'SIGKILL' if self.kind == 'killed' else 'SIGSTOP'} after {moment * 1000:.0f} ms"

    def wait(self) -> float:
        """Seconds until every other rank has ended."""
        while not all(has_ended(self.pids[rank]) for rank in self.others()):
            self.poll()
            if time.monotonic() - self.at > LIMIT:
                alive = [rank for rank in self.others() if not has_ended(self.pids[rank])]
                raise Failed(f"ranks {alive} still run after {LIMIT:.0f} s")
            time.sleep(0.005)
        return time.monotonic() - self.at

    def end(self) -> str:
        """Waits for the rank itself and the launcher."""
        woken = ""
        if self.kind == "stopped":
            if self.wakes and not has_ended(self.pids[self.victim]):
                os.kill(self.pids[self.victim], signal.SIGCONT)
                since = time.monotonic()
                while not has_ended(self.pids[self.victim]):
                    if time.monotonic() - since > LIMIT:
                        raise Failed(f"rank {self.victim} woke up and still runs after {LIMIT:.0f} s")
                    time.sleep(0.005)
                woken = f", it woke up and ended after {time.monotonic() - since:.2f} s"
        deadline = time.monotonic() + 60
        while not all(has_ended(pid) for pid in self.pids.values()) or (self.launcher and self.launcher.poll() is None):
            self.poll()
            if time.monotonic() > deadline:
                raise Failed("a process is left after a minute")
            time.sleep(0.01)
        return woken

    def said(self) -> dict[int, str]:
        """What each rank said; under -1 the launcher."""
        if self.breakage:
            return {rank: (self.here / f"case-{rank}.txt").read_text(errors="replace") for rank in range(self.ranks)}
        texts = dict.fromkeys(range(-1, self.ranks), "")
        for line in (self.here / "case.txt").read_text(errors="replace").splitlines():
            found = re.match(r"\[(?:rank (\d+)|(launcher))\] (.*)", line)
            rank = 0 if not found else -1 if found[2] else int(found[1])
            texts[rank] += (found[3] if found else line) + "\n"
        return texts

    def witnesses(self) -> str:
        """Checks that every other rank names the one that is gone, and the step; or that the launcher does, if the rank had not met it."""
        said, steps = self.said(), []
        for rank in self.others():
            named = re.search(rf"rank {self.victim} (\(process \d+ on (?!.*slow)|at .* has not been heard|failed|ended)[^\n]*", said[rank])
            if named:
                step = re.search(r"this rank was in step (\d+)|this rank had not begun its first step", named[0])
                steps.append(f"in step {step[1]}" if step and step[1] else "before its first step" if step else "while meeting")
                if not step and not re.search("ended before the run began|rank 0 at .* has not been heard of", named[0]):
                    raise Failed(f"rank {rank} does not say in which step it was: {named[0]}")
            elif "was asked to end" not in said[rank] and re.search(rf"rank {self.victim} \(process \d+\) ", said.get(-1, "")):
                steps.append("ended by the launcher, which names it")
            else:
                raise Failed(f"rank {rank} does not name rank {self.victim}")
        return "; ".join(f"rank {rank} {step}" for rank, step in zip(self.others(), steps))

    def close(self) -> None:
        for pid in self.pids.values():
            if not has_ended(pid):
                os.kill(pid, signal.SIGKILL)
        if self.launcher and self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()
        self.poll()
        for file in self.files:
            file.close()


def break_copy(here: pathlib.Path, breakage: str) -> tuple[str, str]:
    shutil.rmtree(here / "broken", ignore_errors=True)
    shutil.copytree(here / "model", here / "broken")
    shutil.copy(here / "train.jsonl", here / "broken.jsonl")
    weights = here / "broken/model.safetensors"
    match breakage:
        case "weights":
            weights.write_bytes(b"no weights")
        case "half the weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "tokenizer":
            (here / "broken/tokenizer.json").unlink()
        case "config":
            (here / "broken/config.json").write_text("{")
        case "data":
            text = (here / "broken.jsonl").read_text()
            (here / "broken.jsonl").write_text(text[: len(text) // 2])
            return "model", "broken.jsonl"
    return "broken", "train.jsonl"


def resume(args, here: pathlib.Path, ranks: int, expected: dict) -> None:
    with (here / "resume.txt").open("wb") as file:
        done = subprocess.run(
            train(args, here, ranks, "out"), cwd=here, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            timeout=300, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise Failed(f"the resumed run ended with {done.returncode}: {(here / 'resume.txt').read_text()[-600:]}")
    made = result(here / "out")
    for name in expected:
        if made.get(name) != expected[name]:
            raise Failed(f"the {name} of the resumed run differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", type=pathlib.Path, required=True, help="the program")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--work", type=pathlib.Path, help="folder for the runs (a temporary one)")
    parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("kill_ranks_cpu.log"))
    args = parser.parse_args()
    args.qlora = args.qlora.resolve()
    here = (args.work or pathlib.Path(tempfile.mkdtemp(prefix="kill-ranks-"))).resolve()
    tiny_model.write_run(here)
    log = args.log.open("w")

    def say(text: str) -> None:
        print(text, flush=True)
        print(text, file=log, flush=True)

    say(f"cases: {args.cases}, seed: {args.seed}, steps: {args.steps} of {MICRO_BATCHES} micro-batches, a checkpoint every 5")
    times = {}
    for ranks in (1, 2, 3, 4):
        begin = time.monotonic()
        shutil.rmtree(here / "out", ignore_errors=True)
        with (here / "reference.txt").open("wb") as file:
            process = subprocess.Popen(
                train(args, here, ranks, "out"), cwd=here, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            first = None
            while process.poll() is None:
                if first is None and (here / "out/metrics.jsonl").exists() and (here / "out/metrics.jsonl").stat().st_size:
                    first = time.monotonic() - begin
                time.sleep(0.002)
        if process.returncode:
            sys.exit((here / "reference.txt").read_text())
        whole = time.monotonic() - begin
        times[ranks] = (first or whole / 2, whole)
        if ranks == 1:
            expected = result(here / "out")
        for name, value in result(here / "out").items():
            if expected[name] != value:
                sys.exit(f"the {name} of {ranks} ranks differs from that of one")
        say(f"undisturbed, {ranks} ranks: first step after {times[ranks][0]:.2f} s, end after {whole:.2f} s, "
            f"adapter {expected['adapter'][:16]}")  # fmt: skip
    failures, worst, counts = 0, dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for number in range(args.cases) if args.only is None else [args.only]:
        chance = random.Random(f"{args.seed}/{number}")
        for _ in range(20):
            case = Case(args, here, number, chance)
            try:
                case.start()
                how = case.disturb(times)
                if how is None:
                    continue
                line = f"case {number}: {case.ranks} ranks, rank {case.victim} {how}"
                seconds = case.wait()
                woken = case.end()
                found = latest(here / "out")
                line += f": the others ended after {seconds:.2f} s{woken} ({case.witnesses()})"
                again = chance.randint(1, 4)
                resume(args, here, again, expected)
                say(f"{line}; from {found} on {again} ranks: same bits")
                worst[case.kind] = max(worst[case.kind], seconds)
                counts[case.kind] += 1
            except Failed as error:
                failures += 1
                say(f"case {number}: {case.ranks} ranks, rank {case.victim} {case.kind}: FAILED: {error}")
                for rank, text in case.said().items():
                    say("".join(f"    {rank}: {line}\n" for line in text.splitlines()[-6:]).rstrip())
            finally:
                case.close()
            break
        else:
            failures += 1
            say(f"case {number}: FAILED: no moment found")
    for kind in KINDS:
        say(f"{kind}: {counts[kind]} cases, the slowest end after {worst[kind]:.2f} s")
    say(f"{failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
