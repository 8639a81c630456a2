"""A Slurm of one node for tests: its daemons run as the user of the tests, on ports of their own, in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
SECONDS = 120
"""What the daemons get to be ready, and a job to reach a state."""

CONFIG = """\
ClusterName=onward
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=30
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no Slurm here, None where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=path) is None]
    return f"needs Slurm (slurmctld, slurmd, slurm-client, munge): {', '.join(absent)}" if absent else None


class Slurm:
    """A cluster that runs; its commands, as a user types them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"

    def __call__(self, *words: object) -> str:
        """Run a command; returns what it prints."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True, check=False
        )
        assert 0 == done.returncode, f"{words}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """Submit a script; returns the job's number."""
        return self("sbatch", "--parsable", *options, script)

    def facts(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says, by key."""
        lines = self("scontrol", "show", "job", job).splitlines()
        pairs = (line.lstrip().partition("=") for line in lines if line.lstrip().startswith("WorkDir="))
        words = (word.partition("=") for line in lines for word in line.split())
        return {key: value for key, _, value in (*words, *pairs)}

    def wait_for(self, job: str, **facts: str) -> dict[str, str]:
        """Wait until a job has these facts; returns all of them."""
        end = time.monotonic() + SECONDS
        while True:
            now = self.facts(job)
            if all(now.get(key) == value for key, value in facts.items()):
                return now
            assert time.monotonic() < end, f"{now}{self.logs()}"
            time.sleep(0.05)  # Slurm can only be asked

    def logs(self) -> str:
        """Return the ends of the daemons' logs, for a test that fails."""
        files = sorted(self.folder.glob("*.log"))
        return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


@contextlib.contextmanager
def cluster(folder: Path) -> Generator[Slurm]:
    """Run a cluster in a folder with a short path, for the length of the body."""
    slurm = Slurm(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    first, second = _free_ports()
    host = socket.gethostname().partition(".")[0]
    cpus = len(os.sched_getaffinity(0))
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, controller=first, node=second, folder=folder, user=getpass.getuser(), cpus=cpus)
    )
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(slurm, "munged", "--foreground", "--force", f"--key-file={key}", *_munge_files(folder)))
        _until((folder / "munge.socket").exists, slurm)
        started.append(_start(slurm, "slurmctld", "-D", "-c"))
        started.append(_start(slurm, "slurmd", "-D", "-N", host))
        _until(lambda: _is_idle(slurm), slurm)
        yield slurm
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _munge_files(folder: Path) -> list[str]:
    return [f"--{name}={folder}/munge.{ending}" for name, ending in (
        ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
    )]  # fmt: skip


def _start(slurm: Slurm, name: str, *words: str) -> subprocess.Popen[bytes]:
    output = (slurm.folder / f"{name}.out.log").open("wb")
    program = shutil.which(name, path=slurm.environment["PATH"])
    assert program is not None
    return subprocess.Popen([program, *words], env=slurm.environment, stdout=output, stderr=output)


def _is_idle(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=slurm.environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() == "idle"


def _until(is_so: object, slurm: Slurm) -> None:
    assert callable(is_so)
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, slurm.logs()
        time.sleep(0.05)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
