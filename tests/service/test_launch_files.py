"""What `onward service --for` prints: each file is read by what reads it, or by its schema, and does what it says."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import assert_refused, onward
from paths import NAMES
from torch.distributed.run import get_args_parser

from onward.errors import UsageError
from onward.layout import RunLayout
from onward.service.outside.elastic import Devices
from onward.service.outside.launch.formats import SCHEDULERS
from onward.service.outside.launch.job import Job, describe, read_asked
from onward.service.outside.launch.waiting import start_and_wait
from onward.service.outside.unit import Host

EIGHT = Devices(8, 8)
STUB = """\
#!/bin/sh
# A program that writes down its own name, its words and OMP_NUM_THREADS, waits for a signal if it is told to, and ends.
{{ printf '%s\\0' "${{0##*/}}" "$@" "threads=$OMP_NUM_THREADS"; printf '\\n\\0'; }} >> {log}
{then}
"""
WAITS = "trap 'kill $!; exit {status}' {name}; sleep 60 & echo ready > {ready}; wait"


class Programs:
    """A folder of programs to be found before others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.ready = folder / "bin", folder / "log", folder / "ready"
        self.folder.mkdir()

    def add(self, name: str, then: str = "exit 0") -> None:
        """Add one that writes down what it is called with, and then does something."""
        path = self.folder / name
        path.write_text(STUB.format(log=shlex.quote(str(self.log)), then=then))
        path.chmod(0o755)

    def add_waiting(self, name: str, number: str, status: int = 0) -> None:
        """Add one that ends by a signal, and says when it waits for it."""
        self.add(name, WAITS.format(name=number, status=status, ready=shlex.quote(str(self.ready))))

    def environment(self, **more: str) -> dict[str, str]:
        """Return what a process finds them with."""
        return {"PATH": f"{self.folder}:{os.environ['PATH']}", "HOME": str(self.folder.parent), **more}

    @property
    def calls(self) -> list[list[str]]:
        """What was called, word by word."""
        text = self.log.read_text() if self.log.exists() else ""
        return [call.strip("\0").split("\0") for call in text.split("\n\0") if call]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """Programs in the place of those that a script calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


def a_run(folder: Path, name: str = "run", model: str = "smollm2-135m") -> RunLayout:
    """What is looked at of a run: its config, and that it has a ledger."""
    layout = RunLayout(folder / name)
    layout.root.mkdir()
    layout.config.write_text(json.dumps({"model": model, "parts": 8}))
    layout.ledger.touch()
    return layout


def host(run: Path, **environment: str) -> Host:
    """A place whose Python's path is as hard to write as the run's."""
    return Host(os.geteuid(), 0o022, f"{run}/python", environment, "node1.example.org")


def job_of(layout: RunLayout, devices: Devices = EIGHT, nodes: int = 1, *, on_cpu: bool = False) -> Job:
    """The job of a run on eight GPUs."""
    return describe(layout, devices, nodes, on_cpu=on_cpu, host=host(layout.root, HF_HOME=f"{layout.root}/hub"))


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


# SkyPilot


@pytest.mark.parametrize("name", NAMES)
def test_skypilot_fills_its_volume_once(name: str, programs: Programs, tmp_path: Path) -> None:
    """The first start copies the run into the volume, a later one leaves what lies there; both start the run."""
    layout = a_run(tmp_path, name)
    task = yaml.safe_load(SCHEDULERS["skypilot"](job_of(layout)))
    assert {str(layout.root): task["name"]} == task["volumes"]
    programs.add("python")
    seed = programs.folder.parent / "onward-seed"
    seed.mkdir()
    layout.root.rename(seed / "run")
    programs.add("sync", 'kill -9 "$PPID"')  # the machine is taken away
    assert 0 != subprocess.run(["bash", "-c", task["run"]], env=programs.environment(), check=False).returncode
    assert not layout.ledger.exists()
    (programs.folder / "sync").unlink()
    programs.log.unlink()
    for _ in range(2):
        done = subprocess.run(["bash", "-c", task["run"]], env=programs.environment(**task["envs"]), check=False)
        assert 0 == done.returncode
        (seed / "run" / "later").touch()
    assert layout.ledger.is_file()
    assert not (layout.root / "later").exists()
    words = [
        "python",
        "-P",
        "-m",
        "onward",
        "watch",
        "--run",
        str(layout.root),
        "--once",
        "--devices",
        "8",
        "threads=4",
    ]
    assert [words, words] == programs.calls


@pytest.mark.parametrize("options", [{}, {"on_cpu": True}, {"devices": Devices(2, 8)}])
def test_skypilot_takes_it(options: dict[str, Any], tmp_path: Path) -> None:
    """SkyPilot reads the task: its schemas of task and resources, and its own checks of both."""
    sky = pytest.importorskip("sky", reason="needs skypilot")
    text = SCHEDULERS["skypilot"](job_of(a_run(tmp_path), **options))
    task = sky.Task.from_yaml_config(yaml.safe_load(text))
    (resources,) = list(task.resources)[:1]
    assert resources.use_spot
    assert (None if options.get("on_cpu") else 8) == (
        None if resources.accelerators is None else next(iter(resources.accelerators.values()))
    )


# Ray


@pytest.mark.parametrize("name", NAMES)
def test_ray_script_is_python(name: str, tmp_path: Path) -> None:
    """The script compiles, and its values are those of the run, whatever characters its path has."""
    layout = a_run(tmp_path, name)
    tree = ast.parse(SCHEDULERS["ray"](job_of(layout, Devices(2, 8))))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert str(layout.root) == values["RUN"]
    assert {"HF_HOME": f"{layout.root}/hub", "OMP_NUM_THREADS": "4"}.items() <= values["ENVIRONMENT"].items()
    keywords = {word.arg: word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords}
    assert ((2, 8), True) == tuple(ast.literal_eval(keywords[key]) for key in ("num_workers", "use_gpu"))


# all of them


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_names_are_short_plain_and_of_one_run(scheduler: str, tmp_path: Path) -> None:
    """A job's name fits every scheduler (RFC 1123, 63 characters), and two runs of one name have two."""
    jobs = [job_of(a_run(tmp_path / place, name)) for place in ("a", "b") for name in ("My Run", "ü" * 80, "x" * 200)
            if not (tmp_path / place).mkdir(exist_ok=True)]  # fmt: skip
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"onward-[a-z0-9]([a-z0-9-]{0,54}[a-z0-9])?", name) for name in names)
    assert all(name in SCHEDULERS[scheduler](job) for name, job in zip(names, jobs, strict=True))


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_a_path_with_control_characters_is_refused(scheduler: str, tmp_path: Path) -> None:
    """A newline in a path could smuggle lines into any of the files."""
    layout = a_run(tmp_path, "a\n#SBATCH --uid=0")
    assert_refused(onward("service", "--for", scheduler, "--run", layout.root), 2, "control characters")


def test_threads_and_device_are_those_of_the_last_commit(tmp_path: Path) -> None:
    """A run that was trained with three threads on a CPU goes on so: bits depend on both. What is said wins."""
    layout = a_run(tmp_path)
    checkpoint = layout.checkpoint(1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "onward.json").write_text(json.dumps({"environment": {"threads": 3, "device": "cpu"}}))
    job = describe(layout, Devices(1, 1), 1, on_cpu=None, host=host(layout.root))
    assert (True, 3) == (job.on_cpu, job.threads)
    assert not describe(layout, Devices(1, 1), 1, on_cpu=False, host=host(layout.root)).on_cpu
    (checkpoint / "onward.json").write_text("[]")
    asked = replace(host(layout.root), environment={"OMP_NUM_THREADS": "6"})
    assert (False, 6) == (lambda job: (job.on_cpu, job.threads))(
        describe(layout, Devices(1, 1), 1, on_cpu=None, host=asked)
    )


@pytest.mark.parametrize("text", ["0", "-1", "8:2", "all", ":8", "1.5", "", "2:0"])
def test_devices_are_a_number_or_a_range(text: str) -> None:
    """What is no number of devices is refused, with what one looks like."""
    with pytest.raises(UsageError, match=r"devices|goes down"):
        read_asked(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--for", "pbs"), "no such scheduler: pbs"),
        (("--for", "slurm", "--user", "nobody"), "--user applies only to systemd"),
        (("--nodes", "2"), "onward service --for slurm"),
        (("--for", "ray", "--nodes", "2"), "Ray places its workers itself"),
        (("--for", "kubernetes", "--nodes", "2"), "one pod"),
        (("--for", "skypilot", "--nodes", "2"), "one node"),
        (("--devices", "all"), "not all"),
        (("--for", "slurm", "--devices", "8", "--nodes", "2"), "16 devices cannot share a step of 8 parts"),
    ],
)
def test_what_a_file_cannot_say_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Options that a format has no place for are refused with the one that has."""
    assert_refused(onward("service", *words, "--run", a_run(tmp_path).root), 2, said)


def test_a_linked_ledger_is_written_to_or_named(tmp_path: Path) -> None:
    """systemd lets the run write where its ledger lies; a copy of the run for elsewhere would not have it."""
    layout = a_run(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    layout.ledger.rename(own / "ledger.sqlite3")
    layout.ledger.symlink_to(own / "ledger.sqlite3")
    assert f"ReadWritePaths=-{own}\n" in onward("service", "--run", layout.root).out
    for scheduler in ("kubernetes", "skypilot"):
        refused = onward("service", "--for", scheduler, "--run", layout.root)
        assert_refused(refused, 2, "the ledger is a link", f"mv {own}/ledger.sqlite3*")


def test_systemd_is_the_default(tmp_path: Path) -> None:
    """Without --for a unit is printed, with the number of devices where there are several."""
    run = a_run(tmp_path).root
    assert onward("service", "--run", run).out == onward("service", "--for", "systemd", "--run", run).out
    assert f"watch --run {run} --devices 2:8\n" in onward("service", "--devices", "2:8", "--run", run).out
    assert sys.executable in onward("service", "--for", "slurm", "--run", run).out


@pytest.mark.parametrize("asked", [None, "6"])
@pytest.mark.parametrize("made", [None, 3])
def test_a_unit_computes_as_the_last_commit_did(
    asked: str | None, made: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many threads, on which bits depend, or as many as whoever prints it uses; on a CPU if that is said."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    layout = a_run(tmp_path)
    if made:
        layout.checkpoint(1).mkdir(parents=True)
        manifest = {"environment": {"threads": made, "device": "cpu"}}
        (layout.checkpoint(1) / "onward.json").write_text(json.dumps(manifest))

    def variables(*words: str) -> list[str]:
        unit = onward("service", *words, "--run", layout.root).out
        kept = ("OMP", "CUDA")
        lines = [line.removeprefix("Environment=") for line in unit.splitlines() if line.startswith("Environment=")]
        return [line for line in lines if line.startswith(kept)]

    threads = [f"OMP_NUM_THREADS={made or asked}"] if made or asked else []
    assert threads == variables() == variables("--gpu")
    assert [*threads, "CUDA_VISIBLE_DEVICES="] == variables("--cpu")
