"""The templates that TRL ships, a sample of them (ONWARD_SOAK=1: all): our targets beside TRL's mask."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
from template_sweep import PAGE, ROWS, cells_of, is_marked, marked_twin, names, try_row, written

EVERY = 1 if os.environ.get("ONWARD_SOAK") else 6
SAMPLE = names()[::EVERY]


def test_the_page_says_what_is_so() -> None:
    """The page has a line for every template; a stale one is mended by `python tests/template_sweep.py`."""
    if f"TRL {version('trl')} ships" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is about another version of TRL")
    page = written()
    assert names() == list(page)
    assert {name: cells_of(name) for name in SAMPLE} == {name: page[name] for name in SAMPLE}


@pytest.mark.parametrize("name", [name for name in SAMPLE if is_marked(name)])
def test_markers_are_followed(name: str) -> None:
    """Where a template marks what is produced, our targets are what TRL trains, but for white space."""
    assert name == marked_twin(name)
    found = {kind: try_row(name, row) for kind, row in ROWS.items()}
    assert [] == [kind for kind, outcome in found.items() if outcome.compared and not outcome.is_equal]


@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_accepted_is_what_the_row_says(name: str) -> None:
    """Every word of the answers, calls and thoughts is a target once a row is accepted, and no word of others is."""
    pytest.importorskip("onward.data.proof")
    assert {} == {kind: found.lost for kind, row in ROWS.items() if (found := try_row(name, row)).lost}
