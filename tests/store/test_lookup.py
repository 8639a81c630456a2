"""What the user types for a file or a step is understood, or refused with what it could mean."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onward.errors import UsageError
from onward.store.ledger import Ledger
from onward.store.lookup import find_file, find_step, typed

STEPS = (0, 2, 4, 9, 12, 1234)
"""Steps that have a restore point."""
FILES = (
    ("a.jsonl", "abcd" + "0" * 60, 1, 0, 4),
    ("b.jsonl", "abce" + "0" * 60, 2, 4, 5),
    ("c.jsonl", "1234" + "0" * 60, 3, 9, 3),
    ("a.jsonl", "ffff" + "0" * 60, 4, 12, 8),
)
"""Finished files: name, SHA-256, position, first step, steps. The boundaries are at 4, 9, 12 and 20."""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger with finished files, one that waits and one that was skipped."""
    fixed: dict[str, Any] = {"command": "c", "bytes": 1, "format": "jsonl", "copy": "archive/x"}
    with Ledger(tmp_path / "ledger.sqlite3", create=True) as opened:
        for name, sha256, position, start, steps in FILES:
            opened.insert_file(
                name=name, sha256=sha256, position=position, start_step=start, planned_steps=steps, state="done",
                **fixed,
            )  # fmt: skip
        opened.insert_file(name="waits.jsonl", sha256="dddd" + "0" * 60, state="queued", **fixed)
        opened.insert_file(name="left.jsonl", sha256="eeee" + "0" * 60, state="skipped", **fixed)
        yield opened


@pytest.mark.parametrize(
    ("to", "step"),
    [
        ("b.jsonl", 9), ("file:b.jsonl", 9), ("abce", 9), ("ABCE", 9), ("file:abce0", 9), ("1", 4), ("file:1", 4),
        ("file:2", 9), ("step:2", 2), ("step-2", 2), ("step:4", 4), ("file:4", 20), ("0", 0), ("12", 12), ("9", 9),
        ("file:1234", 12), ("step:1234", 1234), ("file:ffff", 20),
    ],
)  # fmt: skip
def test_a_step_is_found(to: str, step: int, ledger: Ledger) -> None:
    """A name, a position, a hash prefix of four characters or a step, with or without saying which it is."""
    assert step == find_step(ledger, to, STEPS)


@pytest.mark.parametrize(
    ("to", "what", "hint"),
    [
        ("2", "'2' is file 2 (b.jsonl), which ends at step 9, and it is also step 2", "--to file:2 or --to step:2"),
        ("4", "'4' is file 4 (a.jsonl), which ends at step 20, and it is also step 4", "--to file:4 or --to step:4"),
        ("1234", "'1234' is file 3 (c.jsonl), which ends at step 12, and it is also step 1234", "--to step:1234"),
        ("a.jsonl", "'a.jsonl' could mean several files: 1 a.jsonl, 4 a.jsonl", "file:4"),
        ("abc", "neither a finished file", "1 a.jsonl, 2 b.jsonl, 3 c.jsonl"),
        ("step:3", "neither a finished file", "0, 2, 4, 9, 12, 1234"),
        ("file:9", "neither a finished file", "1 a.jsonl"),
        ("waits.jsonl", "neither a finished file", "1 a.jsonl"),
        ("", "neither a finished file", "1 a.jsonl"),
        ("1" * 5000, "neither a finished file", "1 a.jsonl"),
        ("step:" + "1" * 5000, "neither a finished file", "1 a.jsonl"),
    ],
)
def test_what_could_mean_several_steps_is_refused(to: str, what: str, hint: str, ledger: Ledger) -> None:
    """A number that is one file's position and another boundary's step is refused."""
    with pytest.raises(UsageError) as caught:
        find_step(ledger, to, STEPS)
    assert what in caught.value.what
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "states", "found"),
    [
        ("b.jsonl", ("done",), "b.jsonl"), ("file:2", ("done",), "b.jsonl"), ("2", ("done",), "b.jsonl"),
        ("waits.jsonl", ("queued",), "waits.jsonl"), ("file:dddd", ("queued", "training"), "waits.jsonl"),
        ("eeee", ("queued", "skipped"), "left.jsonl"),
    ],
)  # fmt: skip
def test_a_file_is_found(name: str, states: tuple[str, ...], found: str, ledger: Ledger) -> None:
    """Among the files in the states that the caller names."""
    assert found == find_file(ledger, name, *states).name


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("b.jsonl", "'b.jsonl' is done, file 2 of the stream", "onward rebuild --without file:2"),
        ("left.jsonl", "'left.jsonl' is skipped", "queued waits.jsonl"),
        ("nothing", "this run has no file 'nothing'", "queued waits.jsonl"),
        ("step:2", "this run has no file 'step:2'", "queued waits.jsonl"),
        ("5", "file 5 waits and may still get another place", "Give its name: waits.jsonl"),
        ("file:5", "file 5 waits and may still get another place", "Give its name: waits.jsonl"),
        ("30", "this run has no file '30'", "queued waits.jsonl"),
        ("None", "this run has no file 'None'", "queued waits.jsonl"),
        ("arriving", "'arriving' is arriving", "queued waits.jsonl"),
        ("training", "'training' is training", "queued waits.jsonl"),
        ("rejected", "'rejected' is rejected", "queued waits.jsonl"),
        ("twice", "'twice' could mean several files: aaaaaaaaaaaa twice, bbbbbbbbbbbb twice", "file:bbbbbbbbbbbb"),
        ("unread", "'unread' could mean several files: queued unread, queued unread", "until they have been read"),
    ],
)
def test_a_file_that_is_not_meant_is_refused(name: str, what: str, hint: str, ledger: Ledger) -> None:
    """The refusal says what became of the file, or which files there are."""
    fixed: dict[str, Any] = {"command": "c", "bytes": 1, "format": "jsonl", "copy": "archive/x"}
    for state in ("arriving", "training", "rejected"):
        ledger.insert_file(name=state, sha256="99" * 32, state=state, **fixed)
    ledger.insert_file(name="b.jsonl", sha256="abce" + "0" * 60, state="rejected", **fixed)  # as a duplicate
    for letter in "ab":
        ledger.insert_file(name="twice", sha256=letter * 64, state="queued", **fixed)
        ledger.insert_file(name="unread", sha256="", state="queued", **fixed)
    with pytest.raises(UsageError) as caught:
        find_file(ledger, name, "queued")
    assert what in caught.value.what
    assert hint in str(caught.value.hint)


def test_of_files_that_nothing_tells_apart_the_last_is_meant(ledger: Ledger) -> None:
    """A file that was quarantined, added again and quarantined again can be accepted by its name; one with a place in
    the stream is told from one without by that place."""
    fixed: dict[str, Any] = {"command": "c", "bytes": 1, "format": "jsonl", "copy": "x", "name": "odd.jsonl"}
    _, last = (ledger.insert_file(state="quarantined", sha256="99" * 32, **fixed) for _ in range(2))
    assert [last, last] == [find_file(ledger, name, "quarantined").id for name in ("odd.jsonl", "file:9999")]
    ledger.insert_file(state="done", sha256="99" * 32, position=7, **fixed)
    with pytest.raises(UsageError) as caught:
        find_file(ledger, "odd.jsonl", "quarantined", "done")
    assert "file:7" in str(caught.value.hint)


def test_a_file_that_waits_is_told_from_one_of_its_content_that_has_a_place(ledger: Ledger) -> None:
    """Added again while it is trained, it can be skipped: the hash means it, the position the one in training."""
    fixed: dict[str, Any] = {"command": "c", "bytes": 1, "format": "jsonl", "copy": "x", "name": "odd.jsonl"}
    training = ledger.insert_file(state="training", sha256="99" * 32, position=5, **fixed)
    _, last = (ledger.insert_file(state="queued", sha256="99" * 32, again=1, **fixed) for _ in range(2))
    states = ("arriving", "queued", "training")
    with pytest.raises(UsageError) as caught:
        find_file(ledger, "odd.jsonl", *states)
    assert "Say which one, as file:5, or file:999999999999 for the last without a place." == caught.value.hint
    found = [find_file(ledger, name, *states).id for name in ("file:5", "5", "file:999999999999", "9999")]
    assert [training, training, last, last] == found


@pytest.mark.parametrize("name", ["waits too.jsonl", "-rf.jsonl", "--help.jsonl"])
def test_a_name_in_a_suggested_command_is_understood(name: str, ledger: Ledger) -> None:
    """The word that is suggested is no option, and means that file."""
    fixed: dict[str, Any] = {"command": "c", "bytes": 1, "format": "jsonl", "copy": "archive/x"}
    ledger.insert_file(name=name, sha256="bbbb" + "0" * 60, state="queued", **fixed)
    (word,) = shlex.split(typed(name))
    assert not word.startswith("-")
    assert name == find_file(ledger, word, "queued").name


@pytest.mark.parametrize("before", [("undone",), ("undone", "undone"), ("rejected", "undone")])
def test_a_file_that_came_again_is_said_to_be_where_it_is(before: tuple[str, ...], ledger: Ledger) -> None:
    """Not where an earlier entry of it is, which was undone or replaced, although that entry keeps its old position."""
    fixed: dict[str, Any] = {"command": "c", "bytes": 1, "format": "jsonl", "copy": "x", "sha256": "99" * 32}
    for place, state in enumerate(before):
        ledger.insert_file(name="again.jsonl", state=state, position=20 + place, **fixed)
    with pytest.raises(UsageError, match=rf"'again.jsonl' is {before[-1]} \[FILE"):
        find_file(ledger, "again.jsonl", "quarantined")
    ledger.insert_file(name="again.jsonl", state="done", position=9, **fixed)
    with pytest.raises(UsageError, match=r"'again.jsonl' is done, file 9 of the stream"):
        find_file(ledger, "again.jsonl", "quarantined")
    ledger.insert_file(name="again.jsonl", state="queued", **fixed)
    with pytest.raises(UsageError, match=r"'again.jsonl' is queued"):
        find_file(ledger, "again.jsonl", "quarantined")
