"""Several runs on one page: each has addresses of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledgers import made_up_run

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from page_runs import FILES, falling
from pages import serve

from onward.views.page.runs import find_runs


def test_several_runs_are_listed_and_kept_apart(tmp_path: Path) -> None:
    """A folder of runs lists them; each has its addresses below its name, and damage in one leaves the others."""
    made_up_run(tmp_path / "one", FILES, falling)
    other = made_up_run(tmp_path / "the other", FILES[:1], falling)
    with serve([tmp_path]) as page:
        assert ["one", "the-other"] == [run["name"] for run in page.get("/api/runs")]
        assert 2 == len(page.get("/runs/one/api/history"))
        assert 1 == len(page.get("/runs/the-other/api/history"))
        assert 404 == page.ask("GET", "/api/history", headers=page.bearer).status
        assert b"the other" in page.ask("GET", "/runs/the-other/", headers=page.bearer).body
        other.ledger.rename(tmp_path / "away")
        states = {run["title"]: run["error"] is None for run in page.get("/api/runs")}
        assert {"one": True, "the other": False} == states
        lines = page.ask("GET", "/metrics", headers=page.bearer).body.decode().splitlines()
        assert {'onward_problem{run="one"} 0.0', 'onward_problem{run="the-other"} 1.0'} <= set(lines)
        assert 400 <= page.ask("GET", "/runs/the-other/api/status", headers=page.bearer).status < 600


def test_names_of_runs_are_plain_and_unique(tmp_path: Path) -> None:
    """Directories of the same name get addresses of their own; one given twice is one run."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        made_up_run(tmp_path / folder / "my <run>", [], falling)
    runs = find_runs([tmp_path / "a", tmp_path / "b" / "my <run>", tmp_path / "b"])
    assert [("my-run", "my <run>"), ("my-run-2", "my <run>")] == [(run.name, run.title) for run in runs]
