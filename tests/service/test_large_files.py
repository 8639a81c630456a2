"""Checkpoints and originals may take minutes to read: a stop that comes meanwhile ends that, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import assert_complete, copy_run
from ledgers import made_up_run
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.digest import CHUNK
from onward.service.intake import archive
from onward.service.state.retention import Retention
from onward.service.state.settle import Settlement
from onward.service.wishes import Stopped, Wishes
from onward.store.ledger import Ledger
from onward.training.checkpoints import checkpoint

SETTINGS: dict[str, Any] = {"batch_size": 2, "warmup_steps": 0, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained a file."""
    folder = tmp_path_factory.mktemp("trained")
    run = new_run(folder / "run", model, **SETTINGS)
    run.train(tiny.write_jsonl(folder / "a.jsonl", tiny.chat_rows(4)))
    return run.layout.root


def at(call: int) -> Callable[[], None]:
    """Return a function that raises `Stopped` at its n-th call."""
    left = call

    def stop() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stopped("asked to")

    return stop


def test_settling_stops_between_two_buffers(trained: Path, tmp_path: Path) -> None:
    """It asks for every buffer of the checkpoint that it reads, and the next start settles as if nothing had been."""
    root = copy_run(trained, tmp_path / "run")
    layout, files = Run(root).layout, list((root / "current_model").glob("checkpoint-*/*"))
    with Ledger(layout.ledger) as ledger:
        for call in range(1, len(files)):  # all but the manifest, and each is smaller than a buffer
            with pytest.raises(Stopped):
                Settlement(layout, ledger, Retention(1, 0), at(call)).settle()
        found = Settlement(layout, ledger, Retention(1, 0), at(len(files))).settle()
    assert (2, []) == (found.manifest and found.manifest.step, found.damage)
    assert_same_state(trained, root)


@pytest.mark.parametrize("watch", [False, True])
def test_a_stop_while_a_start_reads_the_checkpoint(
    watch: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further file is read, the model is not loaded, and the next process goes on."""
    root = copy_run(trained, tmp_path / "run")
    run, wishes, read = Run(root), Wishes(), list[str]()
    run.add(tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(4, seed=1)))
    hashed = checkpoint.xxh3_file

    def xxh3_file(path: Path, *stop: Callable[[], None]) -> str:
        wishes.ask("asked to")
        read.append(path.name)
        return hashed(path, *stop)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "xxh3_file", xxh3_file)
        assert not (run.watch(once=True, stop=wishes) if watch else run.train(stop=wishes))
    assert 1 == len(read)
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        assert "stopped by asked to at step 2" == ledger.events()[-1].message
    assert 1 == len(run.train())
    assert_complete(root)


def test_a_pause_while_a_start_reads_the_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends no process: it is obeyed once the checkpoint was read."""
    root = copy_run(trained, tmp_path / "run")
    run, seen = Run(root), list[str]()
    run.add(tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(4, seed=1)))
    hashed = checkpoint.xxh3_file

    def xxh3_file(path: Path, *stop: Callable[[], None]) -> str:
        if not seen:
            seen.append(run.pause(patience=0.0))
            seen.append(run.resume(patience=0.0))
        return hashed(path, *stop)

    monkeypatch.setattr(checkpoint, "xxh3_file", xxh3_file)
    assert 1 == len(run.train())
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        assert [] == ledger.open_requests()


def test_an_original_stays_as_it_is_if_compressing_it_is_ended(tmp_path: Path) -> None:
    """Whenever the stop comes, while it is compressed or while the copy is checked; the next attempt succeeds."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 1)], float)
    (layout.archive / "a.jsonl").write_bytes(content := os.urandom(CHUNK + 1))
    with Ledger(layout.ledger) as ledger:
        row = ledger.file(1)
        ledger.set_file(1, sha256=archive.sha256_file(layout.archive / "a.jsonl"))
        row = ledger.file(1)
        for call in (1, 2, 3, 4):
            with pytest.raises(Stopped):
                archive.compress_original(layout, ledger, row, at(call))
            assert ["a.jsonl"] == [path.name for path in layout.archive.iterdir()]
        for call in (1, 2):
            with pytest.raises(Stopped):
                archive.require_original(layout, row, at(call))
        archive.compress_original(layout, ledger, row)
        archive.take_out_original(layout, ledger.file(1), tmp_path / "out")
        for call in (1, 2):
            with pytest.raises(Stopped):
                archive.require_original(layout, ledger.file(1), at(call))
    assert content == (tmp_path / "out").read_bytes()
