#!/usr/bin/env python3
"""Three hosts on one machine: network namespaces joined by a bridge, with a rank or two of a run on the CPU in each.

    sudo python3 scripts/ranks/three_hosts.py --qlora target/release/qlora [--torchrun venv/bin/torchrun] [--log three_hosts.log]

  same      one and two ranks a host, started with torchrun's variables (and with --torchrun by torchrun itself): the adapter, the
            optimizer and the log of a run of one process, bit for bit
  cut       a host's link is taken down while it trains: every rank ends within 15 s and names a rank that it lost and the step
  slow      a host's link is slowed down (tc tbf): the run is right, and the rank is named
  flipped   a proxy between rank 1 and rank 0 changes one bit of what goes one way or the other: every rank ends within 15 s, and the
            cause is named
  broken    the proxy closes the connection in the middle of a message

After cut, flipped and broken the run is resumed on one process and must end with the bits of the undisturbed one: no damaged gradient was
ever used. Needs root, `ip`, `tc` and `unshare`. Names of what it makes begin with qlr; it removes all of it in the end. Standard
library only. Ends with 1 if anything fails.
"""

import argparse
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

from kill_ranks import LIMIT, MICRO_BATCHES, Failed, environment, latest, result, tiny_model, train

HOSTS = 3
SWITCH = "qlr-switch"
PORT = 29400


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def space(host: int) -> str:
    return f"qlr{host}"


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def build() -> None:
    tear_down()
    sh("ip", "netns", "add", SWITCH)
    sh("ip", "-n", SWITCH, "link", "add", "qlrbr", "type", "bridge")
    sh("ip", "-n", SWITCH, "link", "set", "qlrbr", "up")
    for host in range(HOSTS):
        sh("ip", "netns", "add", space(host))
        sh("ip", "-n", SWITCH, "link", "add", f"qlrv{host}", "type", "veth", "peer", "name", "eth0", "netns", space(host))
        sh("ip", "-n", SWITCH, "link", "set", f"qlrv{host}", "master", "qlrbr")
        sh("ip", "-n", SWITCH, "link", "set", f"qlrv{host}", "up")
        sh("ip", "-n", space(host), "addr", "add", f"{address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            sh("ip", "-n", space(host), "link", "set", device, "up")


def tear_down() -> None:
    for name in [SWITCH, *map(space, range(HOSTS))]:
        sh("ip", "netns", "del", name, check=False)


def link(host: int, state: str) -> None:
    sh("ip", "-n", SWITCH, "link", "set", f"qlrv{host}", state)


def inside(host: int, command: list[str]) -> list[str]:
    """A command on a host, which has a name of its own."""
    return ["ip", "netns", "exec", space(host), "unshare", "--uts", "sh", "-c", f'hostname host{host}; exec "$@"', "sh", *command]


class Run:
    """The ranks of a run; `to_first` is where each finds rank 0."""

    def __init__(self, args, here: pathlib.Path, each: int = 1, to_first: dict | None = None):
        self.here, self.size = here, HOSTS * each
        shutil.rmtree(here / "out", ignore_errors=True)
        self.processes, self.files = [], []
        for rank in range(self.size):
            host = rank // each
            at, port = (to_first or {}).get(rank, (address(0), PORT))
            variables = {
                "RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank % each, "MASTER_ADDR": at, "MASTER_PORT": port,
                "RAYON_NUM_THREADS": 1,
            }  # fmt: skip
            file = (here / f"rank-{rank}.txt").open("wb")
            self.files.append(file)
            command = inside(host, train(args, here, self.size, "out", launch=False))
            self.processes.append(
                subprocess.Popen(
                    command, cwd=here, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    env=environment() | {name: str(value) for name, value in variables.items()},
                )  # fmt: skip
            )

    def until_step(self, step: int) -> None:
        metrics = self.here / "out/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise Failed(f"step {step} was not reached")
            time.sleep(0.005)

    def wait(self, limit: float) -> float:
        begin = time.monotonic()
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() - begin > limit:
                alive = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
                raise Failed(f"ranks {alive} still run after {limit:.0f} s")
            time.sleep(0.005)
        return time.monotonic() - begin

    def said(self, rank: int) -> str:
        return (self.here / f"rank-{rank}.txt").read_text(errors="replace")

    def errors(self) -> list[str]:
        """The last error of each rank."""
        lines = []
        for rank in range(self.size):
            found = [line for line in self.said(rank).splitlines() if "error:" in line]
            if not found or self.processes[rank].returncode == 0:
                raise Failed(f"rank {rank} ended with {self.processes[rank].returncode} and says no error: {self.said(rank)[-300:]}")
            lines.append(re.sub(r"\S*error:\S* ?", "", found[-1]).strip())
        return lines

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for file in self.files:
            file.close()


class Proxy:
    """On host 1: takes a connection on PORT and passes it on to rank 0. After `at` bytes one way it flips a bit, or closes."""

    def __init__(self, upward: bool, at: int, bit: int | None):
        script = (
            "import os, socket, sys, threading, time\n"
            "upward, at, bit = sys.argv[1] == '1', int(sys.argv[2]), int(sys.argv[3])\n"
            f"listener = socket.create_server(('{address(1)}', {PORT}))\n"
            "print('ready', flush=True)\n"
            "near, _ = listener.accept()\n"
            "for attempt in range(600):\n"
            "    try:\n"
            f"        far = socket.create_connection(('{address(0)}', {PORT}))\n"
            "        break\n"
            "    except ConnectionRefusedError:\n"
            "        time.sleep(0.05)\n"
            "def pass_on(source, target, marked):\n"
            "    done = 0\n"
            "    while data := source.recv(65536):\n"
            "        if marked and done <= at < done + len(data):\n"
            "            if bit < 0:\n"
            "                target.sendall(data[:at - done])\n"
            "                print('done', flush=True)\n"
            "                os._exit(0)\n"
            "            data = bytearray(data)\n"
            "            data[at - done] ^= 1 << bit\n"
            "            print('done', flush=True)\n"
            "        done += len(data)\n"
            "        target.sendall(data)\n"
            "    target.shutdown(socket.SHUT_WR)\n"
            "threads = [threading.Thread(target=pass_on, args=(near, far, upward)), threading.Thread(target=pass_on, args=(far, near, not upward))]\n"
            "[thread.start() for thread in threads]\n"
        )
        command = inside(1, [sys.executable, "-c", script, str(int(upward)), str(at), str(-1 if bit is None else bit)])
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout.readline() == b"ready\n"

    def wait(self) -> None:
        """Until it has done its damage."""
        if self.process.stdout.readline() != b"done\n":
            raise Failed("the proxy saw the end of the run before its moment")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", type=pathlib.Path, required=True, help="the program")
    parser.add_argument("--torchrun", type=pathlib.Path, help="start runs with it, too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--damages", type=int, default=10, help="runs with a flipped bit, and half as many that are broken off")
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("three_hosts.log"))
    args = parser.parse_args()
    args.qlora = args.qlora.resolve()
    here = (args.work or pathlib.Path(tempfile.mkdtemp(prefix="three-hosts-"))).resolve()
    tiny_model.write_run(here)
    chance, log, failures = random.Random(args.seed), args.log.open("w"), 0

    def say(text: str) -> None:
        print(text, flush=True)
        print(text, file=log, flush=True)

    def alone(output: str) -> None:
        with (here / "alone.txt").open("wb") as file:
            command = train(args, here, 1, output)
            done = subprocess.run(command, cwd=here, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise Failed(f"the run of one process ended with {done.returncode}: {(here / 'alone.txt').read_text()[-600:]}")

    def compare(folder: str) -> None:
        made = result(here / folder)
        for name in expected:
            if made.get(name) != expected[name]:
                raise Failed(f"the {name} differs")

    def resumed() -> str:
        found = latest(here / "out")
        alone("out")
        compare("out")
        return f"resumed from {found}: same bits"

    def case(name: str, act) -> None:
        nonlocal failures
        try:
            say(f"{name}: {act()}")
        except Failed as error:
            failures += 1
            say(f"{name}: FAILED: {error}")

    def same(each: int) -> str:
        run = Run(args, here, each)
        try:
            seconds = run.wait(180)
            compare("out")
            first = next(line for line in run.said(0).splitlines() if " ranks: " in line)
            return f"{first.strip()}; {seconds:.1f} s: same bits as one process"
        finally:
            run.close()

    def by_torchrun(each: int) -> str:
        shutil.rmtree(here / "out", ignore_errors=True)
        processes = []
        for host in range(HOSTS):
            command = [str(args.torchrun.absolute()), "--nnodes", str(HOSTS), "--node-rank", str(host), "--nproc-per-node", str(each)]
            command += ["--master-addr", address(0), "--master-port", str(PORT), "--no-python", "--"]
            with (here / f"torchrun-{host}.txt").open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        inside(host, command + train(args, here, HOSTS * each, "out", launch=False)), cwd=here, env=environment(),
                        stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    )  # fmt: skip
                )
        begin = time.monotonic()
        codes = [process.wait(timeout=300) for process in processes]
        if any(codes):
            raise Failed(f"torchrun ended with {codes}: {(here / 'torchrun-0.txt').read_text()[-600:]}")
        compare("out")
        return f"{HOSTS} nodes of {each}; {time.monotonic() - begin:.1f} s: same bits as one process"

    def cut(host: int) -> str:
        run = Run(args, here)
        try:
            run.until_step(chance.randint(3, 40))
            link(host, "down")
            seconds = run.wait(LIMIT)
            lines = []
            for rank, line in enumerate(run.errors()):
                # Who is cut off hears of nobody any more.
                named = {host} if rank != host else set(range(HOSTS)) - {rank}
                found = re.search(r"rank (\d) .*has not been heard of for 10 s.*this rank was in step (\d+)", line)
                if not found or int(found[1]) not in named:
                    raise Failed(f"rank {rank}: {line}")
                lines.append(f"rank {rank} misses rank {found[1]} in step {found[2]}")
            link(host, "up")
            return f"all ended after {seconds:.1f} s ({'; '.join(lines)}); {resumed()}"
        finally:
            link(host, "up")
            run.close()

    def slow(host: int, rate: str) -> str:
        for where, device in ((space(host), "eth0"), (SWITCH, f"qlrv{host}")):
            sh("ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", rate, "burst", "4kb", "latency", "2s")
        run = Run(args, here)
        try:
            seconds = run.wait(300)
            compare("out")
            named = re.search(rf"step \d+: rank {host} \(process \d+ on host{host}\) has a slow connection[^\n]*", run.said(0))
            if not named:
                raise Failed(f"rank {host} was not named: {run.said(0)[-600:]}")
            split = next(line for line in run.said(0).splitlines() if line.startswith("time of the ranks"))
            return f"{seconds:.1f} s: same bits; {named[0]}; {split}"
        finally:
            run.close()
            for where, device in ((space(host), "eth0"), (SWITCH, f"qlrv{host}")):
                sh("ip", "netns", "exec", where, "tc", "qdisc", "del", "dev", device, "root")

    def damage(bit: int | None) -> str:
        upward, at = chance.random() < 0.5, chance.randint(30_000, 700_000)
        proxy = Proxy(upward, at, bit)
        run = Run(args, here, to_first={1: (address(1), PORT)})
        try:
            proxy.wait()
            seconds = run.wait(LIMIT)
            lines = run.errors()
            if bit is not None and not any("damaged" in line for line in lines):
                raise Failed(f"no rank says that a message was damaged: {lines}")
            for rank, line in enumerate(lines):
                if not re.search(r"this rank (was in step \d+|had not begun its first step)", line):
                    raise Failed(f"rank {rank} does not say where it was: {line}")
            way = "to rank 0" if upward else "from rank 0"
            what = "closed" if bit is None else f"bit {bit} flipped"
            return f"byte {at} {way}: {what}; all ended after {seconds:.1f} s (rank 0: {lines[0]}; rank 1: {lines[1]}); {resumed()}"
        finally:
            run.close()
            proxy.close()

    build()
    try:
        alone("reference")
        expected = result(here / "reference")
        say(f"one process: adapter {expected['adapter'][:16]}, {args.steps} steps of {MICRO_BATCHES} micro-batches")
        for each in (1, 2):
            case(f"same, {each} a host", lambda: same(each))
            if args.torchrun:
                case(f"same by torchrun, {each} a host", lambda: by_torchrun(each))
        for host in range(HOSTS):
            case(f"cut, host {host}", lambda: cut(host))
        case("slow, host 2 at 4 Mbit/s", lambda: slow(2, "4mbit"))
        for i in range(args.damages):
            case(f"flipped {i + 1}", lambda: damage(chance.randrange(8)))
        for i in range(args.damages // 2):
            case(f"broken {i + 1}", lambda: damage(None))
    finally:
        tear_down()
    say(f"{failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
