"""Reading the state of a run from its Hugging Face files, without Onward's help, and comparing it exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TEMPORARY = ".tmp-"


def read_state(run: Path) -> dict[str, Any]:
    """Return weights, moments and counters of `current_model/`, by name."""
    current = run / "current_model"
    weights = next(path for path in current.iterdir() if path.suffix == ".safetensors")
    optimizer = torch.load(current / "optimizer.pt", weights_only=True)
    trainer = json.loads((current / "trainer_state.json").read_text())
    moments = {f"{i}.{key}": value for i, entry in optimizer["state"].items() for key, value in entry.items()}
    return {
        "tensors": {**load_file(weights), **moments},
        "global_step": trainer["global_step"],
        "adam": {int(entry["step"]) for entry in optimizer["state"].values()},
        "rate": [group["lr"] for group in optimizer["param_groups"]],
    }


def assert_same_state(expected: Path, actual: Path) -> None:
    """Every weight, every moment and every counter of two runs is equal, bit for bit."""
    left, right = read_state(expected), read_state(actual)
    assert left["tensors"].keys() == right["tensors"].keys()
    differing = [name for name, value in left["tensors"].items() if not torch.equal(value, right["tensors"][name])]
    assert differing == []
    assert {key: left[key] for key in ("global_step", "adam", "rate")} == {
        key: right[key] for key in ("global_step", "adam", "rate")
    }


def temporary_files(run: Path) -> list[Path]:
    """Return all that interrupted writes left anywhere in a run."""
    return [path for path in run.rglob("*") if path.name.startswith(TEMPORARY)]
