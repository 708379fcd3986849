#!/usr/bin/env python3
"""Tries what is in this folder as far as the launchers are installed here, with a tiny model on the CPU.

    python3 deploy/check.py --qlora target/release/qlora [--torchrun PATH] [--only torchrun,openmpi,slurm,kubernetes,kubeflow]

  torchrun     torchrun.sh with two workers; one is killed, and torchrun starts both again: they go on from the last checkpoint
  openmpi      openmpi.sh with two processes
  slurm        slurm.sbatch in a cluster of this host that is started for it (munged, slurmctld, slurmd; needs root): two tasks to the
               end; and a job that is told to end, saves, goes back into the queue and ends as if nothing had been
  kubernetes   the manifest against the schemas of Kubernetes, strictly (pip install kubernetes-validate); and its command with the
               variables that two pods have
  kubeflow     the manifests against the API's models, without a field that these do not know (pip install kubeflow-trainer-api); and
               the command with the variables that two nodes have

Every run must end with the adapter, the optimizer and the log of a run of one process, bit for bit. What is not installed is said and
left out. Ends with 1 if anything fails.
"""

import argparse
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "scripts" / "ranks"))
from kill_ranks import MICRO_BATCHES, Failed, environment, latest, result, tiny_model, train  # noqa: E402


class Missing(Exception):
    pass


class Check:
    def __init__(self, args):
        self.args, self.work = args, pathlib.Path(tempfile.mkdtemp(prefix="deploy-"))
        tiny_model.write_run(self.work)
        self.run(train(args, self.work, 1, "alone"), {})
        self.expected = result(self.work / "alone")

    def options(self, ranks: int, output: str = "out") -> list[str]:
        """The arguments of `qlora train`; the scripts add the request to resume."""
        shutil.rmtree(self.work / output, ignore_errors=True)
        command = train(self.args, self.work, ranks, output, launch=False)[2:]
        at = command.index("--resume-from-checkpoint")
        return command[:at] + command[at + 2 :]

    def start(self, command: list[str], more: dict) -> subprocess.Popen:
        file = (self.work / "output.txt").open("ab")
        variables = environment() | {"QLORA": str(self.args.qlora)} | {name: str(value) for name, value in more.items()}
        return subprocess.Popen(command, cwd=self.work, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def run(self, command: list[str], more: dict) -> None:
        (self.work / "output.txt").write_text("")
        if code := self.start(command, more).wait(timeout=300):
            raise Failed(f"ended with {code}: {self.said()[-1500:]}")

    def said(self) -> str:
        return (self.work / "output.txt").read_text(errors="replace")

    def compare(self, output: str = "out") -> None:
        made = result(self.work / output)
        for name in self.expected:
            if made.get(name) != self.expected[name]:
                raise Failed(f"the {name} differs")

    def torchrun(self) -> str:
        program = self.args.torchrun or shutil.which("torchrun")
        if not program:
            raise Missing("torchrun (pip install torch)")
        variables = {"TORCHRUN": program, "NPROC_PER_NODE": 2, "MASTER_PORT": free_port(), "MAX_RESTARTS": 1}
        (self.work / "output.txt").write_text("")
        process = self.start([str(HERE / "torchrun.sh"), *self.options(2)], variables)
        until(lambda: latest(self.work / "out") != "none", 120, "a checkpoint")
        worker = next(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_rank(pid, 1, self.args.qlora))
        os.kill(worker, signal.SIGKILL)
        reached = latest(self.work / "out")
        if process.wait(timeout=300):
            raise Failed(self.said()[-1500:])
        self.compare()
        if "resuming from" not in self.said():
            raise Failed("the second start did not resume")
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        return f"two workers, one killed at {reached}, both started again: same bits {version.stdout.strip()}"

    def openmpi(self) -> str:
        program = shutil.which("mpirun")
        if not program:
            raise Missing("mpirun (openmpi-bin)")
        self.run([str(HERE / "openmpi.sh"), *self.options(2)], {"NP": 2, "OMPI_MCA_rmaps_base_oversubscribe": 1})
        self.compare()
        (self.work / "hosts").write_text("# one host\nlocalhost slots=2\n")
        self.run([str(HERE / "openmpi.sh"), *self.options(2)], {"HOSTFILE": self.work / "hosts"})
        self.compare()
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[0]
        return f"{version}, two processes, also by a host file: same bits"

    def slurm(self) -> str:
        with Cluster() as cluster:
            options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--signal=TERM@0"]
            script = str(HERE / "slurm.sbatch")
            (self.work / "output.txt").write_text("")
            # Long enough that a job can be met in the middle.
            self.run(["sbatch", "--wait", *options, script, *self.options(2)], cluster.environment())
            self.compare()
            said = self.run_interrupted(cluster, options, script)
            version = subprocess.run(["srun", "--version"], capture_output=True, text=True, check=False).stdout.strip()
            return f"{version}, two tasks: same bits; {said}"

    def run_interrupted(self, cluster, options: list[str], script: str) -> str:
        submitted = subprocess.run(
            ["sbatch", "--parsable", *options, script, *self.options(2)], cwd=self.work, capture_output=True, text=True, check=True,
            env=environment() | cluster.environment() | {"QLORA": str(self.args.qlora)},
        )  # fmt: skip
        job = submitted.stdout.strip()
        until(lambda: latest(self.work / "out") != "none", 120, "a checkpoint")
        # As the controller does before the time limit and when it preempts.
        subprocess.run(["scancel", "--signal=TERM", job], env=environment() | cluster.environment(), check=True)
        log = self.work / f"qlora-{job}.log"
        until(lambda: log.exists() and "interrupted; resume" in log.read_text(), 60, "the checkpoint after SIGTERM")
        reached = latest(self.work / "out")
        # A job that was put back may begin again only after a while.
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=environment() | cluster.environment(), check=False)
        until(lambda: (self.work / "out/adapter_model.safetensors").exists(), 240, "the end of the job that was put back")
        until(lambda: "try it: qlora chat" in log.read_text(), 30, "the job's last line")
        self.compare()
        return f"SIGTERM at {reached}: saved, put back, went on: same bits"

    def pods(self, command: list[str], variables) -> None:
        """A command of the manifests as two pods of two processes on this host."""
        (self.work / "output.txt").write_text("")
        processes = [self.start(command, variables(pod)) for pod in range(2)]
        if any([process.wait(timeout=300) for process in processes]):
            raise Failed(self.said()[-1500:])
        self.compare()

    def kubernetes(self) -> str:
        try:
            import kubernetes_validate
            import yaml
        except ImportError as error:
            raise Missing(f"{error.name} (pip install kubernetes-validate)") from error
        documents = list(yaml.safe_load_all((HERE / "kubernetes/job.yaml").read_text()))
        versions = {kubernetes_validate.validate(document, "1.34", strict=True) for document in documents}
        container = documents[1]["spec"]["template"]["spec"]["containers"][0]
        # What differs here from a cluster: the name of pod 0, and what is trained.
        stand_in = {"--nproc-per-node=auto": "--nproc-per-node=2", "--master-addr=qlora-0.qlora": "--master-addr=127.0.0.1"}
        extra = [stand_in.get(argument, argument) for argument in container["args"]] + [f"--master-port={free_port()}"]
        command = [str(self.args.qlora), "train", *self.options(4), *extra]
        self.pods(command, lambda pod: {"JOB_COMPLETION_INDEX": pod})
        kinds = " and ".join(document["kind"] for document in documents)
        return f"{kinds} are valid in {', '.join(versions)}; the command as two pods of two ranks: same bits"

    def kubeflow(self) -> str:
        try:
            import yaml
            from kubeflow_trainer_api import models
        except ImportError as error:
            raise Missing(f"{error.name} (pip install kubeflow-trainer-api)") from error
        kinds = {"runtime": models.TrainerV1alpha1ClusterTrainingRuntime, "trainjob": models.TrainerV1alpha1TrainJob}
        for name, model in kinds.items():
            document = yaml.safe_load((HERE / f"kubeflow/{name}.yaml").read_text())
            compare_fields(document, model.from_dict(document).to_dict(), name)
        container = document["spec"]["trainer"]
        port = free_port()
        command = [str(self.args.qlora), "train", *self.options(4), *container["args"]]
        self.pods(command, lambda pod: {
            "PET_NNODES": 2, "PET_NPROC_PER_NODE": 2, "PET_NODE_RANK": pod, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port,
        })  # fmt: skip
        from importlib.metadata import version

        return f"valid for kubeflow-trainer-api {version('kubeflow-trainer-api')}; the command as two nodes of two ranks: same bits"


class Cluster:
    """Slurm on this host alone, in a folder of its own."""

    def __enter__(self):
        for program in ("munged", "slurmctld", "slurmd", "sbatch"):
            if not shutil.which(program):
                raise Missing(f"{program} (slurmctld, slurmd, slurm-client, munge)")
        if os.geteuid() != 0:
            raise Missing("root, to start Slurm's daemons")
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
        self.daemons, host = [], socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = self.folder / "munge.socket"
        self.config = self.folder / "slurm.conf"
        self.config.write_text(
            f"ClusterName=check\nSlurmctldHost={host}(127.0.0.1)\nAuthType=auth/munge\nAuthInfo=socket={munge}\nCredType=cred/munge\n"
            f"SlurmUser=root\nSlurmdUser=root\nStateSaveLocation={self.folder}/state\nSlurmdSpoolDir={self.folder}/spool\n"
            f"SlurmctldPort={free_port()}\nSlurmdPort={free_port()}\nSlurmctldPidFile={self.folder}/ctld.pid\nSlurmdPidFile={self.folder}/d.pid\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\nReturnToService=2\n"
            "SelectType=select/cons_tres\nSchedulerParameters=sched_interval=1,sched_min_interval=0\nJobRequeue=1\nMailProg=/bin/true\n"
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN\nPartitionName=all Nodes={host} Default=YES State=UP\n"
        )
        self.config.chmod(0o644)
        self.folder.chmod(0o755)
        os.environ["SLURM_CONF"] = str(self.config)
        log = (self.folder / "log.txt").open("wb")
        try:
            for command in (
                ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}", f"--pid-file={self.folder}/munge.pid",
                 f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"],
                ["slurmctld", "-D", "-f", str(self.config)],
                ["slurmd", "-D", "-f", str(self.config)],
            ):  # fmt: skip
                self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
                time.sleep(1)
            idle = lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True, check=False).stdout
            until(idle, 60, f"an idle node ({(self.folder / 'log.txt').read_text()[-600:]})")
        except BaseException:
            self.__exit__()
            raise
        return self

    def environment(self) -> dict:
        return {"SLURM_CONF": str(self.config)}

    def __exit__(self, *_):
        # A step whose job ends with the daemons would be left.
        deadline = time.monotonic() + 30
        while len(self.daemons) == 3 and time.monotonic() < deadline:
            if not subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=False).stdout.strip():
                break
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def compare_fields(given, kept, at: str) -> None:
    """Every field of a manifest must be one that the API's model knows."""
    if isinstance(given, dict):
        for name in given:
            if not isinstance(kept, dict) or name not in kept:
                raise Failed(f"{at}.{name} is no field of the API")
            compare_fields(given[name], kept[name], f"{at}.{name}")
    elif isinstance(given, list):
        if not isinstance(kept, list) or len(kept) != len(given):
            raise Failed(f"{at} is no list of the API")
        for i, (one, other) in enumerate(zip(given, kept)):
            compare_fields(one, other, f"{at}[{i}]")
    elif given != kept:
        raise Failed(f"{at}: {given!r} becomes {kept!r}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_rank(pid: int, rank: int, program: pathlib.Path) -> bool:
    try:
        if pathlib.Path(f"/proc/{pid}/exe").resolve() != program:
            return False
        return f"RANK={rank}".encode() in pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def until(there, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            raise Failed(f"waited for {what} in vain")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", type=pathlib.Path, required=True, help="the program")
    parser.add_argument("--torchrun", help="the program, if it is not in PATH")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="torchrun,openmpi,slurm,kubernetes,kubeflow")
    args = parser.parse_args()
    args.qlora = args.qlora.resolve()
    check, failures = Check(args), 0
    print(f"one process: adapter {check.expected['adapter'][:16]}, {args.steps} steps of {MICRO_BATCHES} micro-batches", flush=True)
    for name in args.only.split(","):
        try:
            print(f"{name}: {getattr(check, name)()}", flush=True)
        except Missing as missing:
            print(f"{name}: left out: there is no {missing}", flush=True)
        except Failed as error:
            failures += 1
            print(f"{name}: FAILED: {error}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
