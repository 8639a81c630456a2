"""A run opened by a process that works on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import new_run

from onward.errors import ConfigError
from onward.service.owner.process import OpenedRun
from onward.service.session import Session
from onward.service.tokenizer import KeptTokenizer
from onward.store.ledger import Ledger
from onward.training.checkpoints.huggingface import tokenizer_files
from onward.training.model.load import load_tokenizer


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


def test_checkpoints_get_the_tokenizer_that_the_run_keeps(model: Path, tmp_path: Path) -> None:
    """Its files are those that transformers writes, byte for byte; a session loads no tokenizer for them."""
    run = new_run(tmp_path / "run", model)
    with Ledger(run.layout.ledger) as ledger:
        session = OpenedRun(run.layout, ledger, lambda _: None).session
        expected = tokenizer_files(load_tokenizer(model))
        assert expected == session.facts().static_files
        assert Session.tokenizer.attrname not in vars(session)
        assert expected == tokenizer_files(session.tokenizer)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_kept_files_of_a_tokenizer_are_made_again(damage: str, model: Path, tmp_path: Path) -> None:
    """What is missing or damaged is made of the model's folder, and kept again."""
    run = new_run(tmp_path / "run", model)
    (path,) = (run.layout.cache / "tokenizer_files").iterdir()
    expected, kept = tokenizer_files(load_tokenizer(model)), path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(kept[: len(kept) // 2] if damage == "cut" else kept.replace(b"vocab", b"vacob"))
    assert expected == KeptTokenizer(run.layout, model).files()
    assert path.is_file()
    assert expected == KeptTokenizer(run.layout, model).files()


def test_a_tokenizer_that_another_process_keeps_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that find none begin to keep it at once, and remove what the other one writes: both go on with what they
    loaded."""
    run = new_run(tmp_path / "run", model)
    (path,) = (run.layout.cache / "tokenizer_files").iterdir()
    path.unlink()

    def gone(_: Path) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("onward.service.tokenizer.remove_tree", gone)
    assert tokenizer_files(load_tokenizer(model)) == KeptTokenizer(run.layout, model).files()
