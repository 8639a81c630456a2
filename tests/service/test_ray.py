"""The printed script in a real Ray: two workers are a run's ranks, one is killed, and the bits are those of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from commands import make_run, onward
from states import assert_same_state

from onward.layout import RunLayout
from onward.service.holder import read_holder
from onward.service.outside.elastic import Devices
from onward.service.outside.launch.job import describe
from onward.service.outside.launch.ray import ray_script
from onward.service.outside.unit import Host
from onward.status import read_history, read_status

pytest.importorskip("ray", reason="needs Ray: pip install 'onward[ray]'")
SECONDS = 600
"""What Ray gets to start its workers."""
STEPS = 60
SETTINGS = ("batch_size=4", "parts=4", "lora.dropout=0.1", "save_steps=5")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}  # fmt: skip
"""Ray tells nobody of its use and keeps no key at home."""


def wait_until(what: str, is_so: object, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something is so; the driver has to be alive meanwhile."""
    assert callable(is_so)
    end = time.monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, f"{what}: {log.read_text()[-6000:]}"
        assert time.monotonic() < end, f"{what}: {log.read_text()[-6000:]}"
        time.sleep(0.05)  # other processes train


@pytest.mark.slow
def test_two_workers_train_and_one_is_killed(model: Path, tmp_path: Path) -> None:
    """Rank 0 is killed in mid-file; the next group goes on from the last commit, and every bit is as on one device."""
    file = tiny.write_jsonl(tmp_path / "monday.jsonl", tiny.chat_rows(4 * STEPS))
    alone, run = (make_run(tmp_path / name, model, *SETTINGS) for name in ("alone", "a run"))
    assert 0 == onward("train", file, "--run", alone).status
    assert 0 == onward("add", file, "--run", run).status

    layout, script, log = RunLayout(run), tmp_path / "job.py", tmp_path / "log"
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    host = replace(Host.here(), environment=environment)
    script.write_text(ray_script(describe(layout, Devices(1, 2), 1, on_cpu=True, host=host)))
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, script], stdout=output, stderr=output, cwd=folder, start_new_session=True,
            env={**environment, "RAY_TMPDIR": folder},
        )  # fmt: skip
        try:
            wait_until("a commit", lambda: read_status(layout)["global_step"] >= 7, process, log)
            first = read_holder(layout.lock)
            assert first is not None
            os.kill(first["pid"], signal.SIGKILL)
            assert 0 == process.wait(SECONDS), log.read_text()[-6000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert ["done"] == [row["state"] for row in read_history(layout)]
    assert_same_state(alone, run)
    assert 0 == onward("verify", "--run", run).status
