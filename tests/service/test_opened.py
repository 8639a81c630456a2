"""A run opened by a process that works on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import new_run

from onward.errors import ConfigError
from onward.service.owner.process import OpenedRun
from onward.store.ledger import Ledger


def test_an_open_run_does_not_read_its_config_again(model: Path, tmp_path: Path) -> None:
    """A config that breaks meanwhile is noticed where it is read at a boundary, not where the tokenizer is needed."""
    run = new_run(tmp_path / "run", model)
    with Ledger(run.layout.ledger) as ledger:
        opened = OpenedRun(run.layout, ledger, lambda _: None)
        session = opened.session
        run.layout.config.write_text("batch_size: none")
        assert session is opened.session
        with pytest.raises(ConfigError):
            opened.open(again=True)
