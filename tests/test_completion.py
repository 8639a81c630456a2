"""A shell completes names of files, of the stream and of runs, as the command line takes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import typer
from ledgers import add_file, made_up_run

from onward.cli.options import completer
from onward.store.ledger import Ledger


def test_names_of_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a command takes and a shell needs no quotes for; where there is no run, nothing, and no error."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 1), ("ab.jsonl", 1)], float)
    with Ledger(layout.ledger) as ledger:
        for name in ("a b", "a;b", "a\x1b", "ac.jsonl"):
            add_file(ledger, name, state="queued")
    monkeypatch.delenv("ONWARD_RUN", raising=False)

    def completed(*states: str, begin: str = "a", **params: object) -> list[str]:
        return completer(*states)(cast(typer.Context, SimpleNamespace(params=params)), begin)

    assert ["a.jsonl", "ab.jsonl"] == completed("done", run=layout.root)
    assert ["ab.jsonl"] == completed("done", run=layout.root, begin="ab")
    assert ["ac.jsonl"] == completed("queued", run=layout.root)
    assert ["a.jsonl", "ab.jsonl", "ac.jsonl"] == sorted(completed("done", "queued", run=layout.root, begin=""))
    monkeypatch.chdir(layout.root)
    assert ["ac.jsonl"] == completed("queued", run=None)
    monkeypatch.setenv("ONWARD_RUN", str(tmp_path))
    assert [] == completed("queued")
    assert ["ac.jsonl"] == completed("queued", run=layout.root)
    for path in layout.root.glob("ledger.sqlite3*"):
        path.unlink()
    layout.ledger.write_bytes(b"garbage " * 1000)
    assert [] == completed("queued", run=layout.root)
