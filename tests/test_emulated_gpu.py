"""On an emulated GPU: what Onward does around a GPU's kernels, on every machine with a compiler."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from seen import TESTS, seen_by
from test_gpu_page import GPU

EMULATED = TESTS / "emulated"
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


def variables_of(device: Path) -> dict[str, str]:
    """Return the variables of a process that has an emulated GPU, apart from its path."""
    return {"LD_PRELOAD": str(device / "early.so"), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def seen(device: Path, place: Path, what: str) -> dict[str, Any]:
    """Return what a process with an emulated GPU saw (`tests/emulated_runs.py`), and what it said."""
    beside, variables = [EMULATED, device], variables_of(device)
    found, output = seen_by("emulated_runs.py", place, what, beside=beside, variables=variables)
    return {**found, "output": output}


@pytest.mark.parametrize("variant", ["lora", "full", "recomputed", "anchored"])
def test_several_processes_equal_one(variant: str, device: Path, tmp_path: Path) -> None:
    """Three files in one process and in four, of which one is killed, have equal bits; a replay gives them again.

    Copies on side streams are done as late as a GPU might do them. A step waits for the device once, whether it is
    computed or replayed, has an anchor or trains rows of the embedding; a boundary waits a few times more.
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
    assert variant == "recomputed" or found["replays"] > (5 if variant == "anchored" else 2) * STEPS


def test_a_model_with_experts_and_a_device_without_room(device: Path, tmp_path: Path) -> None:
    """It passes the admission on the device; a file with which memory ran out is tried again and trained."""
    found = seen(device, tmp_path / "runs", "experts")
    assert [0, 0] == found["statuses"], found["output"]
    assert 2 == found["starts"]
    assert ["done", "done"] == found["states"]
    assert [] == found["faults"]


def test_checks_of_a_gpu_end_there(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `make gpu` that are quick with a tiny shape: each ends, and what has to be exact is."""
    monkeypatch.syspath_prepend(GPU)
    twice = [f"20 steps twice, {method}, bfloat16" for method in ("lora", "full", "anchored")]
    names = [*twice, "failed recordings", "machine", "tiny, lora, on 24 GiB"]
    paths, records = [GPU, TESTS.parent / "src", TESTS, EMULATED, device], tmp_path / "records"
    variables = {
        **os.environ, **variables_of(device), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "ONWARD_GPU_RECORDS": str(records),
    }  # fmt: skip
    for check in importlib.import_module("suite").checks(tiny=True):
        if check.name in names:
            command = [sys.executable, "-W", "ignore", str(GPU / check.words[0]), *check.words[1:]]
            outcome = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
            assert 0 == outcome.returncode, outcome.stderr
    found = [json.loads(line) for line in records.read_text().splitlines()]
    subjects = [*["twice"] * len(twice), *["failed recording"] * 2, "machine", "fits"]
    assert subjects == [each["subject"] for each in found]
    assert [True] * 5 == [each["equal"] for each in found[:5]]
    assert [""] * 3 == [each["said"] for each in found[:3]]
    assert all(each["replays"] > 0 for each in found[:3])
    assert found[-1]["fits"]
