"""Rows that are saved from a conversation: each is there, whole, and a row of its own."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import copy_run, without_links

from onward.layout import RunLayout
from onward.views.chat.conversation import save_row


@pytest.mark.parametrize("links", [True, False])
def test_rows_saved_in_one_second_are_several_files(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """A name in the inbox is never taken twice, also on a file system without hard links."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    saved = {save_row({"text": "x"}, layout) for _ in range(3)}
    assert 3 == len(saved)
    assert saved == set(layout.inbox.iterdir())


def test_rows_that_many_save_at_once_are_all_there(stream: Path, tmp_path: Path) -> None:
    """Nobody's row takes the place of another's, and nothing else is left in the inbox."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    rows = [{"text": f"row {number}"} for number in range(60)]
    with ThreadPoolExecutor(6) as threads:
        saved = list(threads.map(lambda row: save_row(row, layout), rows))
    assert rows == [json.loads(path.read_text()) for path in saved]
    assert sorted(saved) == sorted(layout.inbox.iterdir())


@pytest.mark.parametrize("before", [None, "", '{"text": "mine"}\n', '{"text": "mine"}'])
def test_a_saved_row_is_a_line_of_its_own(before: str | None, stream: Path, tmp_path: Path) -> None:
    """Also at the end of a file whose last line has no end."""
    file = tmp_path / "rows.jsonl"
    if before is not None:
        file.write_text(before)
    for text in ("one", "two"):
        assert file == save_row({"text": text}, RunLayout(stream), file)
    kept = [json.loads(before)] if before else []
    assert [*kept, {"text": "one"}, {"text": "two"}] == [json.loads(line) for line in file.read_text().splitlines()]
