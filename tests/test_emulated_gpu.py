"""On an emulated GPU: what Onward does around a GPU's kernels, on every machine with a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from seen import seen_by

EMULATED = Path(__file__).parent / "emulated"
STEPS = 12
"""Steps of each of three files."""
HAS_COMPILER = shutil.which("c++") is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not HAS_COMPILER, reason="there is no C++ compiler with Python.h"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA, which would be hidden"),
]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled device."""
    folder = tmp_path_factory.mktemp("device")
    build = [sys.executable, str(EMULATED / "build.py"), str(folder)]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    assert 0 == made.returncode, made.stderr
    return folder


def seen(device: Path, place: Path, what: str) -> dict[str, Any]:
    """Return what a process with an emulated GPU saw (`tests/emulated_runs.py`), and what it said."""
    early = {"LD_PRELOAD": str(device / "early.so")}
    found, output = seen_by("emulated_runs.py", place, what, beside=[EMULATED, device], variables=early)
    return {**found, "output": output}


@pytest.mark.parametrize("variant", ["lora", "full", "recomputed"])
def test_several_processes_equal_one(variant: str, device: Path, tmp_path: Path) -> None:
    """Three files in one process and in four, of which one is killed, have equal bits; a replay gives them again.

    Copies on side streams are done as late as a GPU might do them. A step waits for the device once, whether it is
    computed or replayed; a boundary waits a few times more.
    """
    found = seen(device, tmp_path / "runs", variant)
    assert [0, 0, -9, 0, 0] == found["statuses"], found["output"]
    assert found["measured"][0] == found["measured"][1]
    assert ["bitwise"] * 6 == found["handovers"]
    assert [] == found["faults"]
    assert ("emulated", "varlen") == (found["environment"]["processor"], found["environment"]["attention"])
    assert found["late"] > 0
    within = [waits for step, waits in enumerate(found["waits"], start=2) if step > 6 and step % STEPS != 1]
    assert {1} == set(within)
    assert variant == "recomputed" or found["replays"] > 2 * STEPS


def test_a_model_with_experts_and_a_device_without_room(device: Path, tmp_path: Path) -> None:
    """It passes the admission on the device; a file with which memory ran out is tried again and trained."""
    found = seen(device, tmp_path / "runs", "experts")
    assert [0, 0] == found["statuses"], found["output"]
    assert 2 == found["starts"]
    assert ["done", "done"] == found["states"]
    assert [] == found["faults"]
