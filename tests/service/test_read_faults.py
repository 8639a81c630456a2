"""What cannot be read is no damage: nothing that was committed is removed for it, and the next start goes on.

The reads of a process that settles, trains and commits are counted in the process itself. With ONWARD_SOAK=1 each of
them gets each fault.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import FULL_SIZE, assert_committed, assert_complete, committed_states, copy_run
from processes import command
from read_faults import ReadFault
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.layout import RunLayout

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 2,
    "max_length": 128,
    "lora": {"rank": 2, "dropout": 0.1},
}
KINDS = ("EIO", "EMFILE", "ESTALE")
POINTS = 10**6 if FULL_SIZE else 3
"""Reads that are tried in each folder, spread over all of them."""


@pytest.mark.parametrize("name", ["current_model", "boundaries"])
@pytest.mark.slow
def test_a_read_that_fails(name: str, model: Path, tmp_path: Path) -> None:
    """A failing disk, too many open files or a stale mount at the n-th read costs nothing but another start."""
    first, second = (tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (4, 6))
    before = new_run(tmp_path / "before", model, **SETTINGS).layout.root
    assert 0 == command(tmp_path / "output", "train", first, "--run", before)
    Run(before).add(second)
    after = copy_run(before, tmp_path / "after")
    record = tmp_path / "record"
    prepare = ReadFault(after / name, record=record).arm
    assert 0 == command(tmp_path / "output", "train", "--run", after, prepare=prepare)
    states, total = committed_states(after), len(record.read_text().splitlines())
    assert 20 < total
    refused = 0
    for number, at in enumerate(range(1, total + 1, max(1, total // POINTS))):
        for kind in KINDS if FULL_SIZE else [KINDS[number % len(KINDS)]]:
            root = copy_run(before, tmp_path / f"{at}-{kind}" / "run")
            output = root.with_name("output")
            status = command(output, "train", "--run", root, prepare=ReadFault(root / name, at, kind).arm)
            refused += status == 1
            try:
                assert "Traceback" not in output.read_text(), output.read_text()
                assert status in (0, 1), output.read_text()
                assert_committed(states, root)
                kept = {point.name for point in RunLayout(root).restore_points()}
                assert {point.name for point in RunLayout(before).restore_points()} <= kept
                assert 0 == command(output, "train", "--run", root), output.read_text()
                assert_same_state(after, root)
                assert_complete(root)
            except AssertionError as error:
                error.add_note(f"{kind} at read {at} of {total}")
                raise
            shutil.rmtree(root.parent)
    assert 0 < refused


@pytest.mark.slow
def test_texts_of_the_anchor_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    """They are written once for a run, and the base may write others elsewhere: a read that fails removes none."""
    first, second = (tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (4, 6))
    settings = {**SETTINGS, "anchor": {"rows": 2, "tokens": 4, "weight": 0.1}}
    before = new_run(tmp_path / "before", model, **settings).layout.root
    assert 0 == command(tmp_path / "output", "train", first, "--run", before)
    Run(before).add(second)
    after, record = copy_run(before, tmp_path / "after"), tmp_path / "record"
    assert 0 == command(
        tmp_path / "output", "train", "--run", after, prepare=ReadFault(after / "anchor", record=record).arm
    )
    total = len(record.read_text().splitlines())
    refused = 0
    for number, at in enumerate(range(1, total + 1, max(1, total // POINTS))):
        root, kind = copy_run(before, tmp_path / str(at)), KINDS[number % len(KINDS)]
        kept = inodes(root / "anchor")
        refused += 1 == command(
            tmp_path / "output", "train", "--run", root, prepare=ReadFault(root / "anchor", at, kind).arm
        )
        assert kept == inodes(root / "anchor")
        assert 0 == command(tmp_path / "output", "train", "--run", root)
        assert_same_state(after, root)
    assert refused


def inodes(folder: Path) -> dict[Path, int]:
    """Return the inode of every file in a folder: one that was written again has another."""
    return {path.relative_to(folder): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
