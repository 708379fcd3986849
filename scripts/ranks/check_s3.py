#!/usr/bin/env python3
"""Checkpoints in S3, against a server on this machine: a run is killed, its disk is lost, and it goes on from the store.

    cargo build --release -p qlora-cli --features object-store
    python3 scripts/ranks/check_s3.py --qlora target/release/qlora [--moto PROGRAM] [--runs 5] [--log benches/results/check_s3.log]

The server is moto's (PyPI `moto[server]`), in an environment that is made for it unless --moto names the program. Between it and qlora
stands a proxy that spoils one request in five: it answers 500 or 503, or breaks the connection before the request has reached the
server, or after it has, when only the answer is lost. Checked:

- every run that was killed (SIGKILL at a random moment once the store has a checkpoint), and resumed in an empty folder, ends with the
  adapter, the optimizer and the log of one that nobody disturbed, bit for bit; one of the runs has two ranks;
- in the store are then two checkpoints (save_total_limit), each whole, and nothing of any other but what killed uploads left;
- a run of the same folder name that is begun anew replaces the checkpoints of the one before;
- a run whose store goes away goes on to its end, says so, and ends with 1 with everything on its disk;
- a bucket that is not there, and credentials that are refused, end the start with words.

Ends with 1 if anything fails. Standard library only, but for the server.
"""

import argparse
import http.client
import http.server
import json
import pathlib
import random
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import kill_ranks
from kill_ranks import Failed, environment, result, train

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tiny_model  # noqa: E402

BUCKET = "runs"
SPOILED = 0.2
KINDS = ["500", "503", "broken before", "broken after"]
MANIFEST = re.compile(r"/checkpoint-(\d+)\.json$")
# moto does not check signatures, but wants to see one.
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20250101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"}
MOTO = "moto[server]==5.2.5"


class Proxy(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Passes requests on to the server; some it spoils."""

    daemon_threads = True

    def __init__(self, server: int, chance: random.Random):
        super().__init__(("127.0.0.1", 0), Request)
        self.server_at, self.chance, self.lock = server, chance, threading.Lock()
        self.spoils, self.refuses, self.seen, self.spoiled = True, False, 0, dict.fromkeys(KINDS, 0)

    def fate(self) -> str | None:
        with self.lock:
            self.seen += 1
            if not self.spoils or self.chance.random() >= SPOILED:
                return None
            kind = self.chance.choice(KINDS)
            self.spoiled[kind] += 1
            return kind

    def handle_error(self, request, client_address) -> None:
        pass  # A program that is killed leaves its connections.


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.server.fate()
        if self.server.refuses:
            return self.answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
        if fate in ("500", "503"):
            code = "InternalError" if fate == "500" else "SlowDown"
            return self.answer(int(fate), [("Content-Type", "application/xml")], f"<Error><Code>{code}</Code></Error>".encode())
        if fate == "broken before":
            return self.cut()
        try:
            server = http.client.HTTPConnection("127.0.0.1", self.server.server_at, timeout=60)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            content = answer.read()
        except OSError:
            return self.cut()
        if fate == "broken after":
            return self.cut()
        skipped = ("connection", "content-length", "transfer-encoding", "date", "server")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in skipped]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.answer(answer.status, headers, content, length)

    def answer(self, status: int, headers: list, content: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_args) -> None:
        pass

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def moto(here: pathlib.Path, given: str | None) -> str:
    if given or shutil.which("moto_server"):
        return given or shutil.which("moto_server")
    subprocess.run([sys.executable, "-m", "venv", here / "venv"], check=True)
    subprocess.run([here / "venv/bin/pip", "install", "--quiet", MOTO], check=True)
    return str(here / "venv/bin/moto_server")


class Check:
    def __init__(self, args):
        self.args, self.chance = args, random.Random(args.seed)
        self.here = pathlib.Path(tempfile.mkdtemp(prefix="check-s3-"))
        tiny_model.write_run(self.here)
        port = free_port()
        self.direct = f"http://127.0.0.1:{port}"
        self.server = subprocess.Popen(
            [moto(self.here, args.moto), "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.proxy = Proxy(port, self.chance)
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.variables = {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_address[1]}",
        }  # fmt: skip
        self.log = args.log.open("w") if args.log else None
        self.failures = 0

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self.log:
            print(text, file=self.log, flush=True)

    def direct_request(self, path: str, method: str = "GET") -> bytes:
        return urllib.request.urlopen(urllib.request.Request(f"{self.direct}/{BUCKET}{path}", headers=SIGNED, method=method)).read()

    def make_bucket(self) -> None:
        for _ in range(300):
            try:
                self.direct_request("", "PUT")
                return
            except OSError:
                time.sleep(0.1)
        raise Failed("the server does not start")

    def keys(self, prefix: str) -> list[str]:
        return re.findall(r"<Key>([^<]*)</Key>", self.direct_request(f"?list-type=2&prefix={prefix}").decode())

    def manifests(self, where: str) -> list[str]:
        found = [key for key in self.keys(f"{where}/") if MANIFEST.search(key)]
        return sorted(found, key=lambda key: int(MANIFEST.search(key)[1]))

    def start(self, output: str, where: str, ranks: int = 1, bucket: str = BUCKET, anew: bool = False) -> subprocess.Popen:
        command = train(self.args, self.here, ranks, output) + ["--checkpoint-store", f"s3://{bucket}/{where}"]
        if anew:
            command[command.index("--resume-from-checkpoint") + 1] = "false"
            command.append("--overwrite-output-dir=true")
        file = (self.here / f"{output}.txt").open("ab")
        return subprocess.Popen(
            command, cwd=self.here, env=environment() | self.variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )

    def said(self, output: str) -> str:
        return (self.here / f"{output}.txt").read_text()

    def finish(self, output: str, where: str, ranks: int = 1, anew: bool = False) -> None:
        if code := self.start(output, where, ranks, anew=anew).wait(timeout=300):
            raise Failed(f"ended with {code}: {self.said(output)[-800:]}")

    def check_store(self, where: str) -> str:
        manifests = self.manifests(where)
        if len(manifests) != 2:
            raise Failed(f"the store has {self.keys(f'{where}/')}")
        for key in manifests:
            manifest = json.loads(self.direct_request(f"/{key}"))
            for entry in manifest["files"]:
                size = len(self.direct_request(f"/{where}/{manifest['prefix']}{entry['name']}"))
                if size != entry["size"]:
                    raise Failed(f"{entry['name']} has {size} bytes, its manifest says {entry['size']}")
        return ", ".join(key.split("/")[1] for key in manifests)

    def same(self, output: str) -> None:
        made = result(self.here / output)
        for name, value in self.expected.items():
            if made.get(name) != value:
                raise Failed(f"the {name} differs")

    def attempt(self, name: str, act) -> None:
        try:
            self.say(f"{name}: {act()}")
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            self.failures += 1
            self.say(f"{name}: FAILED: {error}")

    def killed(self, number: int) -> str:
        output = where = f"run-{number}"
        ranks = 2 if number == 1 else 1
        process = self.start(output, where, ranks)
        deadline = time.monotonic() + 240
        while process.poll() is None and not self.manifests(where):
            if time.monotonic() > deadline:
                raise Failed("no checkpoint came to the store")
            time.sleep(0.02)
        time.sleep(self.chance.random() * self.args.wait)
        # A launcher's ranks end with it.
        process.send_signal(signal.SIGKILL)
        ended = "killed" if process.wait() < 0 else "over before it was killed"
        had = [key.split("/")[1] for key in self.manifests(where)]
        shutil.rmtree(self.here / output)
        self.finish(output, where, ranks)
        self.same(output)
        of = f"{ranks} rank{'s' * (ranks > 1)}, {ended} with {', '.join(had)} in the store"
        return f"{of}, its disk lost: the same bits; left: {self.check_store(where)}"

    def anew(self) -> str:
        before = {key: self.direct_request(f"/{key}") for key in self.manifests("run-0")}
        self.finish("anew", "run-0", anew=True)
        self.same("anew")
        left = self.check_store("run-0")
        if any(before.get(key) == self.direct_request(f"/{key}") for key in self.manifests("run-0")):
            raise Failed("an old manifest is still there")
        return f"the same bits; left: {left}"

    def gone(self) -> str:
        output = "gone"
        process = self.start(output, output)
        while process.poll() is None and not list((self.here / output).glob("checkpoint-5")):
            time.sleep(0.01)
        self.server.kill()
        since = time.monotonic()
        code = process.wait(timeout=600)
        seconds, said = time.monotonic() - since, self.said(output)
        if code != 1 or "is on this machine only" not in said:
            raise Failed(f"exit code {code}: {said[-800:]}")
        self.same(output)
        return f"the run went on to its end, said so and ended with 1 after {seconds:.0f} s, with the same bits on its disk"

    def refused(self, output: str, bucket: str, expected: str) -> str:
        process = self.start(output, output, bucket=bucket)
        since = time.monotonic()
        code, said = process.wait(timeout=600), self.said(output)
        seconds = time.monotonic() - since
        if code != 1 or not re.search(expected, said) or "panicked" in said:
            raise Failed(f"exit code {code}: {said[-800:]}")
        line = next(line for line in reversed(said.splitlines()) if re.search(expected, line))
        return f"ended with 1 after {seconds:.1f} s: {line.strip()[:300]}"

    def run(self) -> int:
        try:
            self.make_bucket()
            self.proxy.spoils = False
            process = subprocess.Popen(
                train(self.args, self.here, 1, "reference"), cwd=self.here, env=environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if process.wait(timeout=300):
                raise Failed("the undisturbed run failed")
            self.expected = result(self.here / "reference")
            self.attempt("a bucket that is not there", lambda: self.refused("absent", "absent", r"(?i)no ?such ?bucket|not found|does not exist"))
            self.proxy.refuses = True
            self.attempt("credentials that are refused", lambda: self.refused("denied", BUCKET, r"(?i)AccessDenied|permission|403"))
            self.proxy.refuses, self.proxy.spoils = False, True
            for number in range(self.args.runs):
                self.attempt(f"run {number}", lambda number=number: self.killed(number))
            if self.args.runs:
                self.attempt("begun anew over the store of run 0", self.anew)
            self.attempt("a store that goes away", self.gone)
            spoiled = ", ".join(f"{count} {kind}" for kind, count in self.proxy.spoiled.items())
            self.say(f"of {self.proxy.seen} requests were spoiled: {spoiled}; {self.failures} failures")
        finally:
            self.server.kill()
            shutil.rmtree(self.here, ignore_errors=True)
        return int(self.failures > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", type=pathlib.Path, required=True, help="the program, built with the feature object-store")
    parser.add_argument("--moto", help="moto's program moto_server; installed with pip where there is none")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=kill_ranks.STEPS)
    parser.add_argument("--wait", type=float, default=2.0, help="seconds within which a run is killed once the store has a checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=pathlib.Path)
    args = parser.parse_args()
    args.qlora = args.qlora.resolve()
    sys.exit(Check(args).run())


if __name__ == "__main__":
    main()
