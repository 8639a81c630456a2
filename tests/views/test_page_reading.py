"""What a page reads of a run: rows as the model sees them, the inbox, reports, what the disk has to keep free."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from commands import make_run, onward
from ledgers import made_up_run

from onward.errors import UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.views.page.reading import AUTOMATIC, LISTED, REPORT_BYTES, RunReader, disk_reserve
from onward.views.page.rows import OPEN, RowsOfFiles

LENGTHS = (5, 60, 10, 90, 20)
"""Characters, and so about as many tokens, of the rows of a file."""


def added(directory: Path, model: Path, policy: str, files: int = 1) -> RunLayout:
    """Make a run that has accepted files of text, with rows longer than it takes."""
    run = make_run(directory, model, "max_length=40", f"over_length={policy}")
    for number in range(files):
        rows = [json.dumps({"text": f"{number}" * length}) for length in LENGTHS]
        file = directory.parent / f"{number}.jsonl"
        file.write_text("\n".join(rows) + "\n")
        outcome = onward("add", file, "--run", run)
        assert 0 == outcome.status, outcome.err
    return RunLayout(run)


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_rows_are_found_by_what_became_of_them(policy: str, model: Path, tmp_path: Path) -> None:
    """In order, the longest first, those that were cut and those that were left out; a part of them, and how many."""
    layout = added(tmp_path / "run", model, policy)
    rows = RowsOfFiles(layout)
    kept = [1, 2, 3, 4, 5] if policy == "truncate" else [1, 3, 5]
    cut, dropped = ([2, 4], []) if policy == "truncate" else ([], [2, 4])
    with Ledger(layout.ledger, read_only=True) as ledger:
        (row,) = ledger.files("queued")

        def lines(view: str, offset: int = 0, limit: int = 10) -> list[int]:
            found = rows.page(ledger, row, view, offset, limit)
            assert {"all": len(kept), "cut": len(cut), "dropped": len(dropped)} == found["counts"]
            assert (True, offset, view) == (found["is_whole"], found["offset"], found["view"])
            return [shown["line"] for shown in found["rows"]]

        assert (kept, cut, dropped) == (lines("all"), lines("cut"), lines("dropped"))
        longest = [2, 4, 5, 3, 1] if policy == "truncate" else [5, 3, 1]
        assert (longest, longest[1:3]) == (lines("longest"), lines("longest", 1, 2))
        assert (kept[2:], dropped[1:2]) == (lines("all", 2), lines("dropped", 1, 1))
        assert [] == lines("loss")  # it was never trained
        shown = rows.page(ledger, row, "all", 0, 2)["rows"]
        assert policy == "drop" or [False, True] == [one["cut"] for one in shown]
        with pytest.raises(UsageError, match="there is no view"):
            lines("shortest")


def test_of_many_files_the_last_few_stay_open(model: Path, tmp_path: Path) -> None:
    """One that was closed is opened again, and shows its own rows."""
    layout = added(tmp_path / "run", model, "drop", files=OPEN + 1)
    rows = RowsOfFiles(layout)
    with Ledger(layout.ledger, read_only=True) as ledger:
        files = list(ledger.files("queued"))
        for row in (*files, files[0]):
            page: Any = rows.page(ledger, row, "all", 0, 1)
            text = "".join(segment["text"] for segment in page["rows"][0]["segments"])
            assert (row.name, f"{row.name[0] * 5}") == (page["name"], text[:5])


def test_the_inbox_is_shown_as_it_is(tmp_path: Path) -> None:
    """Oldest first, with the folder of each, its size, and whether it is whole; what is hidden or no file is not."""
    layout = made_up_run(tmp_path / "run", [], float)
    times: dict[str, int] = {"c.jsonl": 3, "high/b.jsonl": 2, "low/a\x1b.jsonl": 1, "d.part": 4, "e~": 5, ".hidden": 6}
    times["normal/ignored.jsonl"] = 8
    for name, time in times.items():
        path = layout.inbox / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x" * time)
        os.utime(path, (time, time))
    (layout.inbox / "folder.jsonl").mkdir()
    (layout.inbox / "link.jsonl").symlink_to("nowhere")
    os.utime(layout.inbox / "link.jsonl", (7, 7), follow_symlinks=False)
    shown = [
        (file["name"], file["folder"], file["bytes"], file["time"], file["whole"]) for file in RunReader(layout).inbox()
    ]
    assert [
        (r"a\x1b.jsonl", "low", 1, 1.0, True), ("b.jsonl", "high", 2, 2.0, True), ("c.jsonl", "", 3, 3.0, True),
        ("d.part", "", 4, 4.0, False), ("e~", "", 5, 5.0, False), ("link.jsonl", "", 7, 7.0, True),
    ] == shown  # fmt: skip


def test_long_lists_are_cut(tmp_path: Path) -> None:
    """Of the inbox and of refused files so many are shown, the newest refusals first; of long runs so many steps."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", AUTOMATIC + 1)], float)
    for number in range(LISTED + 2):
        (layout.inbox / f"{number}.jsonl").touch()
        report = {"file": f"{number}.jsonl", "problem_count": 1, "rejected": number, "problems": []}
        (layout.rejected / f"{number}.report.json").write_text(json.dumps(report))
    reader = RunReader(layout)
    refused = [report["file"] for report in reader.refused()]
    assert (LISTED, [f"{number}.jsonl" for number in range(LISTED + 1, 1, -1)]) == (len(reader.inbox()), refused)
    counts = [len(reader.metrics(every)["step"]) for every in (1, 2, None)]
    assert (AUTOMATIC + 1, True) == (counts[0], counts[1] == counts[2] < counts[0])


@pytest.mark.parametrize(
    "text",
    [
        "[1]", "x", "{}", '{"file": "a", "problem_count": "x", "rejected": 1, "problems": []}', "[" * 50_000, "null",
        '{"file": "a", "problem_count": 1, "rejected": 1, "problems": [1]}', " " * (REPORT_BYTES + 1),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_report_is_passed_over(text: str, tmp_path: Path) -> None:
    """Whatever lies in the folder under such a name; reports beside it are shown."""
    layout = made_up_run(tmp_path / "run", [], float)
    report = {"file": "a", "problem_count": 2, "unit": "row", "rejected": 1.0, "way_out": "mend it", "problems": []}
    (layout.rejected / "a.report.json").write_text(json.dumps(report).ljust(REPORT_BYTES))
    (layout.rejected / "b.report.json").write_text(text)
    (layout.rejected / "c.json").write_text(json.dumps(report))
    assert [report] == RunReader(layout).refused()


def test_what_stays_free_is_the_margin_and_a_checkpoint(tmp_path: Path) -> None:
    """A config that is refused stops training, not looking: then it is the checkpoint alone."""
    layout = made_up_run(tmp_path / "run", [], float)
    reader = RunReader(layout)
    assert 1 << 20 == disk_reserve(reader)
    layout.config.write_text("unknown: 1\n")
    assert 0 == disk_reserve(reader)
