"""A copy of a run at a boundary: trained on, it is the run; the run itself is never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import snapshot
from daemons import configure
from states import assert_same_state

from onward import Run
from onward.errors import UsageError
from onward.service.state.copying import copy_run
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {"batch_size": 4, "max_length": 256, "lora": {"rank": 4, "dropout": 0.1}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    """A run of three files, with a fourth that waits and a fifth that arrived; no test here changes it."""
    folder = tmp_path_factory.mktemp("copying")
    run = Run.create(folder / "run", str(model), notify={"command": "false"}, compress_archive=True, **SETTINGS)
    files = [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (9, 14, 6, 5)]
    run.train(*files[:3])
    run.add(files[3])
    with Ledger(run.layout.ledger) as ledger:
        ledger.insert_file(command="watch", name="x.jsonl", sha256="", bytes=1, format="", copy="", state="arriving")
    return run


@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_copy_trained_on_is_the_run(step: int, run: Run, tmp_path: Path) -> None:
    """From any restore point a copy trains the later files again and ends at the run's own state, bit for bit."""
    before = snapshot(run.layout.root)
    copy = Run(copy_run(run.layout, tmp_path / "copy", step).root)
    assert step == copy.status()["global_step"]
    copy.train()
    assert copy.verify().ok
    assert_same_state(run.layout.root, copy.layout.root)
    assert before == snapshot(run.layout.root)


def test_what_waits_and_who_is_told_stay_with_the_run(run: Run, tmp_path: Path) -> None:
    """A copy has the stream's files in its queue, notifies nobody, and reads `evaluation.files` where they are."""
    configure(run, evaluation={"files": ["../general.jsonl", "/there/q.jsonl"]})
    copy = Run(copy_run(run.layout, tmp_path / "copy", 3).root)
    queued = [entry["name"] for entry in copy.history() if entry["state"] == "queued"]
    assert ["14.jsonl", "6.jsonl"] == queued
    assert "" == copy.config.notify.command
    assert "false" == run.config.notify.command
    assert [f"{run.layout.root}/../general.jsonl", "/there/q.jsonl"] == copy.config.evaluation.files


def test_a_boundary_that_is_not_kept_is_refused(run: Run, tmp_path: Path) -> None:
    """A step without a restore point is named, and nothing is left of the copy but its directory."""
    with pytest.raises(UsageError, match="step 5 is no longer kept"):
        copy_run(run.layout, tmp_path / "copy", 5)
