"""What `onward service --for` prints for SkyPilot and Ray, and what all schedulers have in common."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import assert_refused, onward
from launch_jobs import Programs, a_run, host, job_of
from paths import NAMES

from onward.errors import UsageError
from onward.service.outside.elastic import Devices
from onward.service.outside.launch.formats import SCHEDULERS
from onward.service.outside.launch.job import describe, read_asked


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """Programs in the place of those that a script calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


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
    """With as many threads, on which bits depend, or as many as whoever prints it uses; on a CPU if that is said, else
    on the GPUs that whoever prints it sees.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
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
    for seen in ("1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert [*threads, f"CUDA_VISIBLE_DEVICES={seen}"] == variables() == variables("--gpu")
        assert [*threads, "CUDA_VISIBLE_DEVICES="] == variables("--cpu")
