"""Status and history as a person reads them, to the last character."""

from __future__ import annotations

import time
from typing import Any

import pytest

from onward.cli.tables import print_history, print_status, status_lines, watch_status
from onward.progress import NAME_WIDTH
from onward.store.rows import EventRow

DONE: dict[str, Any] = {
    "position": 1, "name": "a.jsonl", "state": "done", "rows": 8, "rows_held_out": 0, "rows_trained": 8,
    "rows_replayed": 0, "first_step": 1, "last_step": 2, "first_loss": 2.5, "last_loss": 1.25,
    "first_learning_rate": 1e-4, "last_learning_rate": 2e-4, "handover": "bitwise", "seconds": 0.26,
}  # fmt: skip
UNTRAINED: dict[str, Any] = {
    **dict.fromkeys(DONE), "name": "b.jsonl", "state": "queued", "rows": 12, "rows_trained": 0, "seconds": 0.0,
}  # fmt: skip


def test_a_history_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers are on the right, words on the left; held-out and replayed rows are told; what is not there is blank."""
    told = {**DONE, "position": 10, "rows_held_out": 2, "rows_replayed": 3, "last_step": 11}
    begun = {**DONE, **{key: None for key in DONE if key.startswith("last_")}, "state": "queued"}
    print_history([DONE, told, UNTRAINED, begun])
    out = capsys.readouterr()
    assert [
        "file  name     state             rows  trained  steps              loss     learning rate  handover  seconds",
        "   1  a.jsonl  done                 8        8    1-2  2.5000 -> 1.2500  0.0001 -> 0.0002  bitwise       0.3",
        "  10  a.jsonl  done    8 (2 held out)    8 + 3   1-11  2.5000 -> 1.2500  0.0001 -> 0.0002  bitwise       0.3",
        "   -  b.jsonl  queued              12        0                                                           0.0",
        "   1  a.jsonl  queued               8        8                                             bitwise       0.3",
    ] == [line.rstrip() for line in out.out.splitlines()]
    assert "" == out.err


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x" * NAME_WIDTH, "x" * NAME_WIDTH),
        ("x" * (NAME_WIDTH + 1), "x" * (NAME_WIDTH - 1) + "…"),
        ("中" * (NAME_WIDTH // 2), "中" * (NAME_WIDTH // 2)),
        ("中" * NAME_WIDTH, "中" * (NAME_WIDTH // 2 - 1) + " …"),
        ("a\x1b[2J", r"a\x1b[2J"),
    ],
)
def test_a_long_name_is_cut_by_its_columns(name: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters of two columns count for two, so that the table stays one."""
    print_history([{**DONE, "name": name}])
    title, line = capsys.readouterr().out.splitlines()
    assert f"   1  {shown}  done" in line
    wide = sum(character == "中" for character in shown)
    assert title.index("state") == line.index("done") + wide


def test_a_status_is_a_screen_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Each value that is there, in units for people; an event is one line; what the state says is not said twice."""
    midnight = time.mktime((1970, 1, 2, 0, 0, 0, 0, 0, -1))
    values = {
        "run": "/r\x07", "state": "training", "doing": "training", "global_step": 12, "file": None, "loss": 1.23456789,
        "tokens_per_second": 148.6, "eta_seconds": 3700, "disk_free_bytes": 80_212_254_720, "heartbeat_seconds": 2.4,
        "hangs": False, "problem": None,
    }  # fmt: skip
    event = EventRow(1, "warning", "a\n   b\x1b", 12, midnight, None)
    assert [
        r"run                /r\x07",
        "state              training",
        "global step        12",
        "loss               1.23457",
        "speed              149 tokens/s",
        "time left          1 h 1 min",
        "disk free          80.2 GB",
        "heartbeat          2 s ago",
        r"01-02 00:00:00  warning a b\x1b",
    ] == status_lines(values, [event])
    print_status(values, [event])
    assert status_lines(values, [event]) == capsys.readouterr().out.splitlines()
    assert "doing              waiting" in status_lines({**values, "doing": "waiting"}, [])
    of_a_file = {"file_step": 0, "file_steps": 0, "lost_tokens": 0}
    assert status_lines(values, []) == status_lines({**values, **of_a_file}, [])
    assert ["file               a.jsonl", "file step          0", "file steps         0", "lost tokens        7"] == (
        status_lines({"file": "a.jsonl", **of_a_file, "lost_tokens": 7}, [])
    )


def test_a_status_is_shown_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    """What is read last stays on the screen when the one who watches has seen enough; nothing in it is markup."""
    screens = iter((["step 1"], ["step 1"], ["step 2"], ["[red]step 3[/red]", "loss 2.5"]))

    def read() -> list[str]:
        for screen in screens:
            return screen
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_status(read, 0.0)
    assert ["[red]step 3[/red]", "loss 2.5"] == capsys.readouterr().out.splitlines()[-2:]
