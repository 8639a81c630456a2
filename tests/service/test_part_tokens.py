"""The tokens of a part are a number that a run keeps, for its bits depend on it."""

from __future__ import annotations

from pathlib import Path

from daemons import SETTINGS, rows_file
from states import assert_same_state

from onward import Run
from onward.config.keys import MICRO_BATCH_TOKENS
from onward.store.ledger import Ledger


def recorded(run: Run) -> list[object]:
    """Return the tokens of a part that each file was trained with, and the run's own."""
    with Ledger(run.layout.ledger) as ledger:
        files = [ledger.config_of(row)["micro_batch_tokens"] for row in ledger.files("done")]
        return [*files, ledger.get("micro_batch_tokens")]


def test_a_run_keeps_the_number_that_it_began_with(tmp_path: Path, model: Path) -> None:
    """On a CPU it is that of earlier releases, which no config names; a number from elsewhere is recorded and used."""
    files = [rows_file(tmp_path / f"{rows}.jsonl", rows) for rows in (3, 4)]
    here = Run.create(tmp_path / "here", str(model), later=True, **SETTINGS)
    here.train(files[0])
    assert ["auto", MICRO_BATCH_TOKENS] == recorded(here)
    elsewhere = Run.create(tmp_path / "elsewhere", str(model), later=True, **SETTINGS)
    with Ledger(elsewhere.layout.ledger) as ledger:
        ledger.put(micro_batch_tokens=32)  # as if it had begun on a small GPU
    elsewhere.train(*files)
    assert [32, 32, 32] == recorded(elsewhere)
    named = Run.create(tmp_path / "named", str(model), later=True, micro_batch_tokens=32, **SETTINGS)
    named.train(*files)
    assert_same_state(elsewhere.layout.root, named.layout.root)
    assert elsewhere.verify(deep=True).ok
