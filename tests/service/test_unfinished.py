"""A command that makes a run and fails or is killed: the same command makes it, and nothing is left to remove."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import assert_refused, onward
from faults import FULL_SIZE, KILL, KINDS, Fault
from processes import command
from runs import new_run
from states import assert_same_state, temporary_files

from onward import Run
from onward.layout import RunLayout
from onward.service.state.unfinished import in_making

SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "batch_size": 2, "max_length": 128, "lora": {"rank": 2}}
SET = ("--set", "evaluation.share=0", "--set", "batch_size=2", "--set", "max_length=128", "--set", "lora.rank=2")
POINTS = 10**6 if FULL_SIZE else 3
"""Changes on the disk that a test lets fail, spread over all of them."""


def points(total: int) -> Iterator[tuple[int, str]]:
    """Yield changes with what comes to them, the last one among them; a kill comes every other time."""
    kinds = KINDS if FULL_SIZE else (KILL, "ENOSPC")
    for number, at in enumerate(sorted({*range(1, total, max(1, total // POINTS)), total})):
        yield at, kinds[number % len(kinds)]


def listing(folder: Path) -> set[str]:
    """Return the path of everything in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--set", 'tokens=["<a>"]')], ids=["plain", "a base of its own"])
def test_init_is_given_again_as_it_was(extra: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """Wherever it failed or was killed; what it made is the run that an undisturbed one makes."""
    words = ("init", "--later", "--model", model, *SET, *extra)
    record = tmp_path / "record"
    assert 0 == command(tmp_path / "output", *words, tmp_path / "whole", prepare=Fault(0, KILL, record))
    expected = (Run(tmp_path / "whole").config, listing(tmp_path / "whole"))
    for at, kind in points(len(record.read_text().splitlines())):
        root, output = tmp_path / str(at) / "run", tmp_path / f"output-{at}"
        root.parent.mkdir()
        status = command(output, *words, root, prepare=Fault(at, kind, root.with_name("record")))
        is_made = (root / "ledger.sqlite3").exists()
        if kind != KILL and status != 0 and not is_made:
            assert not root.exists()
        assert "Traceback" not in output.read_text()
        if not is_made:
            assert 0 == command(output, *words, root), output.read_text()
        assert expected == (Run(root).config, listing(root))


@pytest.mark.slow
def test_adopt_is_given_again_as_it_was(model: Path, tmp_path: Path) -> None:
    """Wherever it was killed, also with its first state committed; the run then continues as an undisturbed one."""
    rows = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (4, 5)]
    old = new_run(tmp_path / "old", model, **SETTINGS)
    old.train(rows[0])
    (checkpoint,) = old.layout.checkpoints()
    words, record = ("adopt", checkpoint, "--run"), tmp_path / "record"
    assert 0 == command(tmp_path / "output", *words, tmp_path / "whole", prepare=Fault(0, KILL, record))
    expected = listing(tmp_path / "whole")
    changes = record.read_text().splitlines()
    root = output = tmp_path
    for at, _ in points(len(changes) - 2):  # the last two come after the run was made
        root, output = tmp_path / str(at) / "run", tmp_path / f"output-{at}"
        root.parent.mkdir()
        assert -9 == command(output, *words, root, prepare=Fault(at, KILL, root.with_name("record")))
        assert 0 == command(output, *words, root), output.read_text()
        assert expected == listing(root)
        assert [] == temporary_files(root)
    Run(tmp_path / "whole").train(rows[1])
    assert 0 == command(output, "train", rows[1], "--run", root)
    assert_same_state(tmp_path / "whole", root)
    assert Run(root).verify().ok


def test_a_run_in_the_making_is_no_lost_one(tmp_path: Path) -> None:
    """Commands on it say that it is not made yet, and how it will be."""
    layout = RunLayout(tmp_path)
    with in_making(layout):
        refused = onward("status", "--run", tmp_path)
    assert_refused(refused, 2, "no run yet", "repeat it: onward init or onward adopt")


def test_what_is_not_of_an_interrupted_command_stays(tmp_path: Path) -> None:
    """Folders that were there or have something in them, a config that was changed since, and one that was replaced."""
    layout = RunLayout(tmp_path)
    layout.inbox.mkdir()
    (layout.root / "base").mkdir()
    mine = {layout.config: b"model: mine\n", layout.root / "notes": b"some"}
    for path, data in mine.items():
        path.write_bytes(data)
    before = listing(tmp_path)

    def interrupted() -> None:
        with in_making(layout) as making:
            making.write({layout.config: b"model: base\n", layout.root / "new": b"x", layout.root / "edited": b"x"})
            (layout.archive / "a.jsonl").write_text("dropped here")
            (layout.root / "adapter").mkdir()
            (layout.root / "edited").write_text("mine")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {*before, "archive", "archive/a.jsonl", "edited"} == listing(tmp_path)
    assert mine == {path: path.read_bytes() for path in mine}
    assert ("mine", "dropped here") == ((tmp_path / "edited").read_text(), (layout.archive / "a.jsonl").read_text())
