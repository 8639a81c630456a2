"""On a GPU: N files equal one run, bit for bit, in every method and type, killed at any instant."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_runs import HAS_BITSANDBYTES, INSTANTS, SETTINGS, VARIANTS, needs_gpu, save_model, train_until, write_files
from processes import apart, train
from states import assert_same_state

from onward import Run

pytestmark = needs_gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files whose batches have rows of 5 to 4,000 tokens."""
    return write_files(tmp_path_factory.mktemp("files"))


def make(folder: Path, base: Path, **settings: Any) -> Path:
    """Make a run and return its directory."""
    return Run.create(folder, str(base), later=True, **{**SETTINGS, **settings}).layout.root


def assert_proven(run: Path, files: Sequence[Path]) -> None:
    """Every file went over as `bitwise`, and a replay of the last one gives the same bits."""
    assert ["bitwise"] * len(files) == [entry["handover"] for entry in Run(run).history()]
    proof = Run(run).verify(deep=True)
    assert [] == [(check.name, check.detail) for check in proof.checks if not check.ok]


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_processes_equal_one(variant: str, base: Path, files: list[Path], tmp_path: Path) -> None:
    """More than 20 steps in one process and in three give equal weights and moments; a replay gives them again."""
    if variant.startswith("qlora") and not HAS_BITSANDBYTES:
        pytest.skip("bitsandbytes is not installed")
    one, three = (make(tmp_path / name, base, **VARIANTS[variant]) for name in ("one", "three"))
    assert 0 == train(one, files)
    assert [0, 0, 0] == [train(three, [file]) for file in files]
    assert_same_state(one, three)
    assert_proven(three, files)


@pytest.mark.parametrize("variant", ["lora-bfloat16", "full-float32"])
def test_five_kills_change_no_bit(variant: str, base: Path, files: list[Path], tmp_path: Path) -> None:
    """A run whose process was killed five times ends with the bits of one that never was."""
    whole, killed = (make(tmp_path / name, base, **VARIANTS[variant]) for name in ("whole", "killed"))
    assert 0 == train(whole, files)
    names = [str(file) for file in files]
    ends = [
        apart(train_until, str(killed), names if number == 0 else [], kind, count)
        for number, (kind, count) in enumerate(INSTANTS)
    ]
    assert [-signal.SIGKILL] * len(INSTANTS) == ends
    assert 0 == train(killed)
    assert_same_state(whole, killed)
    assert_proven(killed, files)


def test_a_sliding_window(files: list[Path], tmp_path: Path) -> None:
    """A model with a window of 100 tokens repeats as one without."""
    base = save_model(tmp_path / "model", "mistral", sliding_window=100)
    runs = [make(tmp_path / name, base, **VARIANTS["lora-bfloat16"]) for name in ("one", "again")]
    assert [0, 0] == [train(run, files[:1]) for run in runs]
    assert_same_state(*runs)
