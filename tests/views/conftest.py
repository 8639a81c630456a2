"""Runs that tests of views read; tests that change one take a copy. And the page of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from browsers import opened_browser
from ledgers import made_up_run
from page_runs import FILES, falling

from onward import Run
from onward.layout import RunLayout

SETTINGS: dict[str, Any] = {
    "batch_size": 4, "max_length": 128, "warmup_steps": 0, "learning_rate": 0.05, "lora": {"rank": 2}, "save_steps": 1,
    "keep_boundaries": 1, "keep_days": 0,
}  # fmt: skip
"""Only the newest restore point and one more are kept: here those of steps 3 and 5."""


@pytest.fixture(scope="session")
def stream(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `a.jsonl` (one step), `b.jsonl` and `c.jsonl` (two steps each)."""
    folder = tmp_path_factory.mktemp("stream")
    named = zip("abc", (3, 7, 8), strict=True)
    files = [tiny.write_jsonl(folder / f"{name}.jsonl", tiny.chat_rows(n, seed=n)) for name, n in named]
    run = Run.create(folder / "run", str(model), **SETTINGS)
    run.train(*files)
    return run.layout.root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """A run of 100 made-up steps in two files, which nobody trains."""
    return made_up_run(tmp_path_factory.mktemp("page") / "made", FILES, falling)


@pytest.fixture(scope="module")
def page(made: RunLayout) -> Iterator[Any]:
    """Its page."""
    from pages import serve  # needs the extra

    with serve([made.root]) as served:
        yield served


@pytest.fixture
def browser() -> Iterator[Any]:
    """A browser; what a page's script got wrong is in its `wrong`."""
    with opened_browser() as context:
        yield context
