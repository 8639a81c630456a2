"""The tokens of a file that has begun stay those with which it began, or the run stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from runs import new_run

from onward import Run
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenized import PackedRow, TokenizedFile, TokenizedWriter
from onward.errors import DamagedState
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {
    "max_length": 128, "batch_size": 4, "lora": {"rank": 2}, "replay": {"share": 0.5, "policy": "uniform"},
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files; steps of the second one have rows of the first."""
    return [tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.chat_rows(8, seed=ord(name))) for name in "ab"]


@pytest.fixture
def run(tmp_path: Path, model: Path, files: list[Path]) -> Run:
    """A run that has trained the first file."""
    run = new_run(tmp_path / "run", model, **SETTINGS)
    run.train(files[0])
    return run


def measured(run: Run) -> dict[str, Any]:
    """Return the measurement of the newest state."""
    (checkpoint,) = run.layout.current.glob("checkpoint-*")
    return json.loads((checkpoint / "onward.json").read_text())["measurement"]


def test_other_tokens_in_the_cache_are_replaced(run: Run, files: list[Path], tmp_path: Path) -> None:
    """Whole tokens, but not those with which the file began, are made again, and the run goes on to the same bits."""
    twin = Run(Path(shutil.copytree(run.layout.root, tmp_path / "twin")))
    (folder,) = run.layout.tokens.iterdir()
    tokens = TokenizedFile.open(folder)
    rows = [np.array(tokens.row(place).ids[::-1], dtype=np.uint32) for place in range(tokens.rows)]
    shutil.rmtree(folder)
    writer = TokenizedWriter(folder)
    writer.append(rows, list(range(len(rows))))
    writer.publish({})
    for each in (run, twin):
        each.train(files[1])
    assert measured(run) == measured(twin)
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        (said,) = (event.message for event in ledger.events(100) if "made again" in event.message)
    assert "the tokens of a.jsonl are made again: the tokens of a.jsonl are not those with which it began" == said


def test_a_library_that_makes_other_tokens_stops_the_run(
    run: Run, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the cache, rows to replay are made again; if they come out otherwise, nothing is trained on them. The way
    back that is named works."""
    pack = RowTokenizer.pack

    def otherwise(self: RowTokenizer, *arguments: Any) -> list[PackedRow]:
        return [row[:-1] for row in pack(self, *arguments)]

    shutil.rmtree(run.layout.tokens)
    monkeypatch.setattr(RowTokenizer, "pack", otherwise)
    step = run.status()["global_step"]
    with pytest.raises(DamagedState, match=r"the tokens of a\.jsonl are not those with which it began") as refused:
        run.train(files[1])
    assert step == run.status()["global_step"]
    assert "onward rollback --to step:0 --requeue" in str(refused.value.hint)
    run.rollback("step:0", requeue=True)
    run.train()
    assert ["done", "done"] == [entry["state"] for entry in run.history() if entry["position"]]
    monkeypatch.undo()


def test_rows_that_were_left_out_are_left_out_again(tmp_path: Path, model: Path) -> None:
    """Tokens that are made again, by a deep proof or because the cache is gone, lack every row that was left out: also
    one of which nothing would be trained, as only the check of a new file finds out."""
    run = new_run(tmp_path / "run", model, **SETTINGS, bad_rows="drop")
    rows = [*tiny.chat_rows(8), {"text": "<|im_end|>"}, {"text": ""}]
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", rows))
    (entry,) = run.history()
    assert (8, 2) == (entry["rows"], entry["bad_rows"])
    run.verify(deep=True)
    shutil.rmtree(run.layout.tokens)
    run.train(tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(8, seed=1)))
    assert ["done", "done"] == [entry["state"] for entry in run.history()]
