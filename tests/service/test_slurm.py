"""The printed batch script in a real Slurm: queued again in mid-file, warned, and the same bits at the end."""

from __future__ import annotations

import shlex
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from commands import make_run, onward
from ledgers import made_up_run
from paths import NAMES
from slurm import SECONDS, Slurm, cluster, missing
from states import assert_same_state

from onward.layout import RunLayout
from onward.service.outside.elastic import Devices
from onward.service.outside.launch.job import describe
from onward.service.outside.launch.slurm import slurm_script
from onward.service.outside.unit import Host
from onward.status import read_status

WHY = missing()
pytestmark = pytest.mark.skipif(WHY is not None, reason=WHY or "")
STEPS = 300
"""Of one file: enough that the job is in its middle whenever Slurm gets round to it."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A cluster of one node."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as running:
        yield running


def script_of(run: Path, folder: Path, python: Path) -> Path:
    """Write the script that is printed for a run, to be run by a program in the place of Python."""
    host = replace(Host.here(), python=str(python), machine=socket.gethostname().partition(".")[0])
    path = folder / "job.sh"
    path.write_text(slurm_script(describe(RunLayout(run), Devices(1, 1), 1, on_cpu=True, host=host)))
    return path


def wait_for_step(run: Path, step: int) -> int:
    """Wait until a step of the run was taken; returns the newest one."""
    end = time.monotonic() + SECONDS
    while (now := read_status(RunLayout(run))["global_step"]) < step:
        assert time.monotonic() < end
        time.sleep(0.02)  # another process takes it
    return int(now)


@pytest.mark.slow
def test_a_job_queued_again_and_warned_ends_as_if_undisturbed(
    slurm: Slurm, program: Path, model: Path, tmp_path: Path
) -> None:
    """`scontrol requeue` and the notice of --signal in mid-file: the job goes on, and every bit is as without them."""
    settings = ("batch_size=1", "lora.dropout=0.1", "save_steps=1000")
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (STEPS, 4)]
    alone, run = (make_run(tmp_path / name, model, *settings) for name in ("alone", "a run"))
    assert 0 == onward("train", *files, "--run", alone).status
    assert 0 == onward("add", *files, "--run", run).status

    python = tmp_path / "python"  # one that starts at once: `-P -m onward` is what it does without
    python.write_text(f'#!/bin/sh\nshift 3\nexec {shlex.quote(str(program))} "$@"\n')
    python.chmod(0o755)
    job = slurm.submit(script_of(run, tmp_path, python))
    step = wait_for_step(run, 5)
    slurm("scontrol", "requeue", job)
    slurm.wait_for(job, Restarts="1", JobState="RUNNING")
    step = wait_for_step(run, step + 5)
    slurm("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(job, Restarts="2")
    done = slurm.wait_for(job, JobState="COMPLETED")

    assert STEPS > step
    assert ("2", "0:0", str(run)) == (done["Restarts"], done["ExitCode"], done["WorkDir"])
    assert_same_state(alone, run)
    assert 0 == onward("verify", "--run", run).status


@pytest.mark.parametrize("name", ["end ", "end\\", "%j", NAMES[-1]])
def test_slurm_takes_the_directory_as_it_is(name: str, slurm: Slurm, tmp_path: Path) -> None:
    """Whatever characters the run's path has, it is the job's working directory."""
    run = made_up_run(tmp_path / name, [("monday.jsonl", 1)], lambda step: 1.0).root
    job = slurm.submit(script_of(run, tmp_path, tmp_path / "python"), "--hold")
    found = slurm.facts(job)
    slurm("scancel", job)
    assert (str(run), "JobHeldUser") == (found["WorkDir"], found["Reason"])
