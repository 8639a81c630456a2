"""Moments of 8 bits: as exact as any, in the files of the Trainer's `adamw_bnb_8bit`."""

from __future__ import annotations

import importlib.util
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import command
from seen import seen_by

from onward import Run
from onward.config import Config
from onward.errors import ModelError

ROOT = Path(__file__).parents[2]
APART = ROOT / ".qlora"
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with bitsandbytes saw (`tests/eight_bits.py`)."""
    if not INSTALLED and not (APART / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not installed: make qlora")
    return seen_by("eight_bits.py", tmp_path_factory.mktemp("eight"), beside=[APART])[0]


@pytest.mark.slow
def test_steps_are_those_of_bitsandbytes(seen: dict[str, Any]) -> None:
    """Equal gradients give the weights and moments of its own optimizer, bit for bit."""
    assert seen["equal"]


@pytest.mark.slow
def test_runs_are_exact(seen: dict[str, Any]) -> None:
    """One process, and a killed one gone on with, end with equal files; a replay gives them again."""
    assert [0, -signal.SIGKILL, 0, 0, 0] == seen["statuses"]
    assert seen["measured"][0] == seen["measured"][1]
    assert [True, True] == seen["files"]
    assert [] == seen["checks that fail"]


@pytest.mark.slow
def test_moments_begin_anew_at_a_boundary(seen: dict[str, Any]) -> None:
    """`boundary: reset_moments` starts moments and counter from nothing: 3 steps of the second file."""
    assert 3 == seen["steps of Adam"]


@pytest.mark.slow
def test_moments_take_what_the_method_says(seen: dict[str, Any]) -> None:
    """That is about a quarter of AdamW's: more here, where small weights have moments of 32 bits."""
    kept, said, in_32_bits = seen["bytes"]
    assert said == kept
    assert 0.35 > kept / in_32_bits


@pytest.mark.slow
def test_trainers_go_on_and_are_adopted(seen: dict[str, Any]) -> None:
    """A stock Trainer goes on from our moments; its moments, and those of a fresh one, become a run's, each bit."""
    expected = {"optimizer": "adamw_8bit", "same": True, "verifies": True}
    assert {**expected, "step": 6} == seen["gone on with"]
    assert {**expected, "step": 2} == seen["fresh"]
    assert "adamw_8bit" == seen["own"]
    assert "the moments are those of adamw_8bit, and the run's optimizer is adamw" == seen["refused"]


def test_a_missing_package_is_named_when_the_run_is_made(model: Path, tmp_path: Path) -> None:
    """Nothing is made, and the hint has the command that installs it."""
    if INSTALLED:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ModelError, match="adamw_8bit needs bitsandbytes") as caught:
        Run.create(tmp_path / "run", str(model), optimizer="adamw_8bit")
    assert 'pip install "onward[qlora]"' == caught.value.hint
    assert not (tmp_path / "run" / "ledger.sqlite3").exists()


def test_the_optimizer_is_locked_and_old_runs_go_on() -> None:
    """Another optimizer is another identity; a run that was locked before there was a choice has AdamW."""
    locked = Config().identity()
    assert "optimizer" not in locked
    assert {} == Config().identity_changes(locked)
    assert {"optimizer": ("adamw", "adamw_8bit")} == Config(optimizer="adamw_8bit").identity_changes(locked)


OLD = """
import torch

def create_dynamic_map(signed):
    return torch.linspace(-1.0 if signed else 0.0, 1.0, 256)

def optimizer_update_8bit_blockwise(*_, **__):
    raise {error}

optimizer_update_32bit = optimizer_update_8bit_blockwise
"""


@dataclass(frozen=True)
class Found:
    """Lets a process find bitsandbytes in a folder, also if it has imported one that is installed."""

    folder: Path

    def __call__(self) -> None:
        sys.path.insert(0, str(self.folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            del sys.modules[name]


@pytest.mark.parametrize("error", ["RuntimeError('on a GPU')", "NotImplementedError('for cuda')", "KeyError('cpu')"])
def test_a_release_without_the_kernel_is_named_when_the_run_is_made(error: str, model: Path, tmp_path: Path) -> None:
    """Whatever an older bitsandbytes raises where it cannot take a step: refused, with the command that upgrades it."""
    package = tmp_path / "old" / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "functional.py").write_text(OLD.format(error=error))
    arguments = ("init", tmp_path / "run", "--model", model, "--set", "method=full", "--set", "optimizer=adamw_8bit")
    assert 2 == command(tmp_path / "said", *arguments, prepare=Found(package.parent))
    said = (tmp_path / "said").read_text()
    assert "the installed bitsandbytes has no 8-bit AdamW for cpu: " in said
    assert 'pip install -U "onward[qlora]"' in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "ledger.sqlite3").exists()
