"""What `onward service --for` prints: each file is read by what reads it, or by its schema, and does what it says."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_jobs import Programs, a_run, job_of
from paths import NAMES
from torch.distributed.run import get_args_parser

from onward.layout import RunLayout
from onward.service.outside.elastic import Devices
from onward.service.outside.launch.formats import SCHEDULERS
from onward.service.outside.launch.waiting import start_and_wait


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """Programs in the place of those that a script calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


def expanded(word: str) -> str:
    """Expand a word of a command as Kubernetes does: `$(NAME)` is a variable's value, `$$` is `$`."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda match: "$" if match[1] == "$" else "a variable", word)


# Slurm


def run_slurm_script(script: str, programs: Programs, *, notice: bool = False) -> int:
    """Run a batch script as Slurm does; with `notice` the script alone gets SIGUSR1 once the run is there."""
    process = subprocess.Popen(
        ["bash", "-c", script], env=programs.environment(SLURM_JOB_ID="7"), start_new_session=True
    )
    if notice:
        while not programs.ready.exists():
            assert process.poll() is None
            time.sleep(0.01)  # a shell cannot tell
        process.send_signal(signal.SIGUSR1)
    return process.wait(60)


@pytest.mark.parametrize("name", NAMES)
def test_slurm_starts_the_run_whatever_its_path(name: str, programs: Programs, tmp_path: Path) -> None:
    """Words, variables and `#SBATCH` lines name the run, whatever characters it has; file name patterns do not."""
    layout = a_run(tmp_path, name)
    script = SCHEDULERS["slurm"](job_of(layout))
    programs.add("srun")
    assert 0 == run_slurm_script(script, programs)
    command = [f"{layout.root}/python", "-P", "-m", "onward", "watch", "--run", str(layout.root)]
    options = ["--cpus-per-task=32", "--kill-on-bad-exit=1"]
    assert [["srun", *options, *command, "--once", "--devices", "8", "threads=4"]] == programs.calls
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert f"--chdir={layout.root}" in lines
    assert [f"HF_HOME={layout.root}/hub"] == [
        word for line in script.splitlines() if line.startswith("export HF") for word in shlex.split(line)[1:]
    ]
    assert [] == [line for line in lines if "%" in line and not line.startswith(("--chdir", "--output=slurm-%j.log"))]


@pytest.mark.parametrize("seconds", [0, 300])
@pytest.mark.parametrize("status", [0, 1, 2, 3, 4, 5, 137])
def test_slurm_job_ends_as_its_run(status: int, seconds: int, programs: Programs, tmp_path: Path) -> None:
    """Its status is the job's; queued again is what failed later than at once, unless no start mends it."""
    programs.add("srun", f"exit {status}")
    programs.add("scontrol")
    script = SCHEDULERS["slurm"](job_of(a_run(tmp_path)))
    assert status == run_slurm_script(f"SECONDS={seconds}\n{script}", programs)
    again = [["scontrol", "requeue", "7", "threads=4"]] if seconds and status in (1, 137) else []
    assert again == programs.calls[1:]


def test_slurm_notice_is_passed_on_and_the_job_queued_again(programs: Programs, tmp_path: Path) -> None:
    """SIGUSR1 reaches the run; the script waits until it has ended, and then puts the job back."""
    programs.add_waiting("srun", "USR1")
    programs.add("scontrol")
    assert 0 == run_slurm_script(SCHEDULERS["slurm"](job_of(a_run(tmp_path))), programs, notice=True)
    assert ["scontrol", "requeue", "7"] == programs.calls[-1][:3]


def test_slurm_nodes_meet_at_the_one_with_the_ledger(programs: Programs, tmp_path: Path) -> None:
    """With several nodes torchrun counts them from the machine that has the ledger, wherever Slurm lists it."""
    layout = a_run(tmp_path)
    script = SCHEDULERS["slurm"](job_of(layout, nodes=3))
    programs.add(
        "srun", 'while [ "$1" != bash ]; do shift; done; for SLURM_NODEID in 0 1 2; do export SLURM_NODEID; "$@"; done'
    )
    programs.add("scontrol", "printf 'node0\\nnode1\\nnode2\\n'")
    (layout.root / "python").symlink_to(programs.folder / "agent")
    programs.add("agent")
    assert 0 == run_slurm_script(script, programs)
    agents = [call for call in programs.calls if call[0] == "python"]
    assert ["--node-rank=2", "--node-rank=0", "--node-rank=1"] == [
        word for call in agents for word in call if word.startswith("--node-rank")
    ]
    assert {"--nnodes=3", "--nproc-per-node=8", "--master-addr=node1", "--master-port=20007"} <= set(agents[0])
    read = get_args_parser().parse_args(agents[0][agents[0].index("torch.distributed.run") + 1 : -1])
    assert (True, "onward") == (read.module, read.training_script)
    assert ["watch", "--run", str(layout.root), "--once"] == read.training_script_args


def test_slurm_notice_reaches_the_ranks_of_a_node(programs: Programs, tmp_path: Path) -> None:
    """torchrun, which a notice would end, gets none: its ranks get it, and it ends after them."""
    layout = a_run(tmp_path)
    rank, heard = tmp_path / "rank.py", tmp_path / "heard"
    rank.write_text(
        "import signal, pathlib\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path({str(heard)!r}).touch())\n"
        f"pathlib.Path({str(programs.ready)!r}).touch()\n"
        "signal.pause()\n"
    )
    programs.add("srun", 'while [ "$1" != bash ]; do shift; done; export SLURM_NODEID=1; exec "$@"')
    programs.add("scontrol", "printf 'node0\\nnode1\\n'")
    (layout.root / "python").symlink_to(programs.folder / "agent")
    programs.add("agent", f"{sys.executable} {rank} & wait; ended")
    programs.add("ended")
    assert 0 == run_slurm_script(SCHEDULERS["slurm"](job_of(layout, nodes=2)), programs, notice=True)
    assert heard.exists()
    assert ["ended", "scontrol"] == [call[0] for call in programs.calls[-2:]]


# Kubernetes


def manifests(layout: RunLayout, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return claim and Job."""
    claim, job = yaml.safe_load_all(SCHEDULERS["kubernetes"](job_of(layout, **options)))
    return claim, job


def test_a_notice_that_comes_at_once_is_passed_on() -> None:
    """One that comes before the shell knows the number of what it started ends that all the same."""
    script = start_and_wait("""sh -c 'kill -s USR1 "$PPID"; exec sleep 30'""", "USR1")
    for _ in range(5):
        done = subprocess.run(["sh", "-c", f'{script}echo "$noticed $status"'], stdout=subprocess.PIPE, check=False)
        assert b"1 138\n" == done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_starts_the_run_whatever_its_path(name: str, programs: Programs, tmp_path: Path) -> None:
    """The container's command, run by a shell as it stands, names the run; so do mounts and variables."""
    layout = a_run(tmp_path, name)
    _, job = manifests(layout)
    container = job["spec"]["template"]["spec"]["containers"][0]
    programs.add("python")
    words = [expanded(word) for word in (*container["command"], *container["args"])]
    assert 0 == subprocess.run(words, env=programs.environment(OMP_NUM_THREADS="4"), check=False).returncode
    watch = ["python", "-P", "-m", "onward", "watch", "--run", str(layout.root), "--devices", "8", "threads=4"]
    assert [watch] == programs.calls
    assert str(layout.root) == container["workingDir"] == container["volumeMounts"][0]["mountPath"]
    assert str(layout.root) == expanded({entry["name"]: entry["value"] for entry in container["env"]}["ONWARD_RUN"])


def test_kubernetes_pod_that_is_moved_is_replaced(programs: Programs, tmp_path: Path) -> None:
    """SIGTERM reaches the run, which commits and ends with 0; the pod does not, so that another one goes on."""
    _, job = manifests(a_run(tmp_path))
    container = job["spec"]["template"]["spec"]["containers"][0]
    programs.add_waiting("python", "TERM")
    process = subprocess.Popen([*container["command"], *container["args"]], env=programs.environment())
    while not programs.ready.exists():
        assert process.poll() is None
        time.sleep(0.01)  # a shell cannot tell
    process.terminate()
    assert 143 == process.wait(60)


def test_kubernetes_takes_it(tmp_path: Path) -> None:
    """Claim and Job pass Kubernetes' own schemas, strictly: no key that it would ignore."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    layout = a_run(tmp_path, model=str(tmp_path))
    for options in ({}, {"on_cpu": True}, {"devices": Devices(2, 8)}):
        for document in manifests(layout, **options):
            validate.validate(document, "1.31", strict=True)


def test_kubernetes_mounts_a_base_that_lies_elsewhere(tmp_path: Path) -> None:
    """A base outside of the run is mounted where the config says that it lies, and the comments copy it."""
    base = tmp_path / "base"
    base.mkdir()
    layout = a_run(tmp_path, model=str(base))
    _, job = manifests(layout)
    mounts = job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "state", "mountPath": str(base), "subPath": "base"} in mounts
    assert f"kubectl cp {base} POD:/volume/base -c fill" in SCHEDULERS["kubernetes"](job_of(layout))
