"""What trackers receive of a stream, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledgers import add_file, made_up_run

from onward.store import tracking
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord


@pytest.mark.parametrize("files", range(1, 6))
def test_the_steps_of_any_number_of_files(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps after any step come in order, each once and with its file, at most as many as were asked for."""
    monkeypatch.setattr(tracking, "FILES", 2)
    layout = made_up_run(tmp_path / "run", [(f"{number}.jsonl", 3) for number in range(files)], float)
    with Ledger(layout.ledger) as ledger:
        for after in range(3 * files + 1):
            found = [(row.name, record.step) for row, record in ledger.steps_after(after, 1000)]
            assert [(f"{(step - 1) // 3}.jsonl", step) for step in range(after + 1, 3 * files + 1)] == found
            assert found[:4] == [(row.name, record.step) for row, record in ledger.steps_after(after, 4)]


def test_the_last_step_of_a_file_waits_for_its_boundary(tmp_path: Path) -> None:
    """It comes with what is measured at the boundary, once that is known."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 2)], float)
    with Ledger(layout.ledger) as ledger:
        file_id = add_file(ledger, "b.jsonl", state="training", position=2, start_step=2, planned_steps=3)
        metrics = Metrics(layout.ledger)
        for inner in (1, 2, 3):
            metrics.append(StepRecord(file_id, 2 + inner, inner, 0, 2, "digest", 20, 10, 1.0, 1e-4, 0.5, 0.25))
        metrics.close()
        assert [2, 3, 4] == [record.step for _, record in ledger.steps_after(1, 10)]
        ledger.move_file(file_id, "done", finished=1.0)
        assert [2, 3, 4, 5] == [record.step for _, record in ledger.steps_after(1, 10)]
