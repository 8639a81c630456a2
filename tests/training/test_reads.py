"""What cannot be read is not damaged: every read that the system refuses is raised, and nothing is removed for it."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import processes
import pytest
from faults import FULL_SIZE
from read_faults import REFUSALS, ReadFault
from users import OPEN, as_nobody, let_others_reach

from onward.errors import Unreadable
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import inspect_checkpoint, remove_checkpoint, write_checkpoint
from onward.training.checkpoints.loading import load_moments, read_optimizer
from onward.training.model.adapter import load_adapter, saved_adapter_config
from onward.training.model.load import load_base, load_tokenizer

BEYOND = 2
"""Points after the last read that are tried too: nothing happens there."""
STRIDE = 5
"""The small form tries every n-th read of libraries only."""


def acts(folder: Path, model: Path) -> dict[str, Callable[[], object]]:
    """Return every act that reads a checkpoint, each with what it finds."""
    contents = checkpoints.make_contents(model)
    state = checkpoints.make_state(contents)

    def load() -> object:
        saved_adapter_config(folder, dropout=0.0)
        load_adapter(contents.model, folder)
        load_moments(state, folder / huggingface.OPTIMIZER)
        return state.view().digest()

    def map_optimizer() -> object:
        return sorted(read_optimizer(folder / huggingface.OPTIMIZER, mapped=True))

    return {"inspect": lambda: inspect_checkpoint(folder), "load": load, "map": map_optimizer}


def sweep(folder: Path, model: Path, output: Path) -> None:
    """Let reads of every act fail, each in one of the ways in turn; write what came of it."""
    outcomes: dict[str, str] = {}
    fault = ReadFault(folder)
    fault.arm()
    for name, act in acts(folder, model).items():
        fault.again(0, "EIO")
        expected = act()
        for at in range(1, fault.count + BEYOND + 1, 1 if FULL_SIZE or name == "inspect" else STRIDE):
            kind = REFUSALS[at % len(REFUSALS)]
            fault.again(at, kind)
            try:
                found = act()
            except Exception as error:
                outcomes[f"{name} {at} {kind}"] = type(error).__name__
            else:
                outcomes[f"{name} {at} {kind}"] = "as ever" if found == expected else "another"
    output.write_text(json.dumps(outcomes))


def test_every_read_that_is_refused_is_raised(model: Path, tmp_path: Path) -> None:
    """A failing disk, a lost mount, too many open files: nothing is called damaged or touched, at any read.

    A library may do without a read that it was refused; what it gives is then what it gives without a fault.
    """
    folder = tmp_path / "checkpoint-1"
    write_checkpoint(folder, checkpoints.make_contents(model))
    before = checkpoints.files_of(folder)
    assert 0 == processes.apart(sweep, folder, model, tmp_path / "outcomes")
    outcomes: dict[str, str] = json.loads((tmp_path / "outcomes").read_text())
    assert {"Unreadable", "as ever"} == set(outcomes.values()), outcomes
    inspected = [outcome for name, outcome in outcomes.items() if name.startswith("inspect")]
    assert 20 < len(inspected)
    assert {"Unreadable"} == set(inspected[:-BEYOND])
    assert {"as ever"} == set(inspected[-BEYOND:])
    assert before == checkpoints.files_of(folder)


def test_too_many_open_files_are_the_problem_of_the_process(model: Path, tmp_path: Path) -> None:
    """With no descriptor left, nothing is known of a checkpoint; with one again, it verifies."""
    folder = tmp_path / "checkpoint-1"
    write_checkpoint(folder, checkpoints.make_contents(model))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(Unreadable, match=r"Too many open files[\s\S]*ulimit -n"):
            inspect_checkpoint(folder)
        with pytest.raises(Unreadable, match="Too many open files"):
            remove_checkpoint(folder, run=checkpoints.RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert inspect_checkpoint(folder).verified is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not OPEN, reason="other users may not read the folder of these packages")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_this_user_may_not_read_is_not_called_incomplete(model: Path, tmp_path: Path, name: str) -> None:
    """safetensors calls every file that it cannot open missing; copying the folder again would change nothing."""
    base = shutil.copytree(model, tmp_path / "base")
    let_others_reach(base)
    for path in base.iterdir():
        path.chmod(0 if path.name == name else 0o644)

    def look() -> str:
        try:
            load_base(base, None)
            load_tokenizer(base)
        except Unreadable as error:
            return str(error)
        return "read"

    said = as_nobody(look)
    assert "cannot be read: Permission denied" in said
    assert "Let this user read it" in said
