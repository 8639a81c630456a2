"""What an `optimizer.pt` must be for its moments to be taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from onward.errors import DamagedState
from onward.training.checkpoints.huggingface import OPTIMIZER
from onward.training.checkpoints.loading import load_moments, read_optimizer
from onward.training.optimizers import file_state


class Harm:
    """What a pickle runs code with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def saved_moments(folder: Path) -> Path:
    """Return a file of moments."""
    torch.save({"state": {0: {"exp_avg": torch.zeros(20_000)}}, "param_groups": [{"params": [0]}]}, folder / OPTIMIZER)
    return folder / OPTIMIZER


def test_moments_that_are_cut_short_or_missing_are_damaged(tmp_path: Path) -> None:
    """A torn file makes PyTorch's reader seek to before its start, which the system refuses: the file is to blame."""
    path = saved_moments(tmp_path)
    whole = path.read_bytes()
    for size in (0, 1, 21, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedState, match="the optimizer's state is damaged"):
            read_optimizer(path)
    path.unlink()
    with pytest.raises(DamagedState, match="the optimizer's state is missing"):
        read_optimizer(path)


def test_code_in_moments_is_not_run(tmp_path: Path) -> None:
    """A file that holds more than tensors and plain values is refused before anything of it is run."""
    torch.save({"state": {}, "param_groups": Harm(tmp_path / "ran")}, tmp_path / OPTIMIZER)
    with pytest.raises(DamagedState, match="damaged"):
        read_optimizer(tmp_path / OPTIMIZER)
    assert not (tmp_path / "ran").exists()


def test_moments_in_other_groups_are_refused(model: Path, tmp_path: Path) -> None:
    """Weights are known by their place in the groups, so as many in other groups would get each other's moments."""
    contents = checkpoints.make_contents(model, method="full")
    state = checkpoints.make_state(contents)
    saved = file_state(state.method, contents.state.optimizer)
    torch.save(saved, tmp_path / OPTIMIZER)
    load_moments(state, tmp_path / OPTIMIZER)
    decayed, others = (group["params"] for group in saved["param_groups"])
    others.append(decayed.pop())
    torch.save(saved, tmp_path / OPTIMIZER)
    with pytest.raises(DamagedState, match="parameter groups"):
        load_moments(state, tmp_path / OPTIMIZER)
