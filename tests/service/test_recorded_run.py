"""A run whose parts are replayed: the state of one that computes each as usual."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from one_call import let_attend_in_one_call
from op_recorder import OpRecorder
from runs import new_run

from onward import Run
from onward.service.owner.training.recordings import FACT
from onward.store.ledger import Ledger


class Recorder:
    """Records by keeping the computation; counts recordings and replays.

    Args:
        fails: whether it records nothing and raises.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.recorded = self.replays = 0
        self._fails = fails

    def __call__(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """Record."""
        self.recorded += 1
        if self._fails:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> Any:
            self.replays += 1
            return compute()

        return replay


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, steps: Recorder | OpRecorder) -> Generator[Recorder]:
    """Let processes in the body record steps, and probes; yields the recorder of probes."""
    probes = Recorder()
    with monkeypatch.context() as patched:
        patched.setattr("onward.training.steps.economy.sharing_recorder", lambda _: steps)
        patched.setattr("onward.training.measuring.probe.recorder_for", lambda _: probes)
        yield probes


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> list[Path]:
    return [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(24, seed=n)) for n in range(4)]


def test_a_run_that_replays_has_the_state_of_one_that_does_not(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and probes, in one process; another one continues it, and a replay of the last file proves it."""
    let_attend_in_one_call(monkeypatch)
    plain = new_run(tmp_path / "plain", model, batch_size=2)
    plain.train(*files)
    run, steps = new_run(tmp_path / "run", model, batch_size=2), OpRecorder()
    with recording(monkeypatch, steps) as probes:
        run.train(*files[:3])
    assert 10 < steps.replays
    assert 1 <= probes.replays
    Run(run.layout.root).train(files[3])
    assert ["bitwise"] * 4 == [entry["handover"] for entry in run.history()]
    name = "adapter_model.safetensors"
    assert (plain.layout.current / name).read_bytes() == (run.layout.current / name).read_bytes()
    assert run.verify(deep=True).ok


def test_a_recording_that_goes_wrong_is_not_tried_by_the_next_process(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is trained nevertheless; an event says it. A machine with another driver tries again."""
    let_attend_in_one_call(monkeypatch)
    run, failing = new_run(tmp_path / "run", model, batch_size=2), Recorder(fails=True)
    with recording(monkeypatch, failing):
        run.train(*files[:2])
        Run(run.layout.root).train(files[2])
    assert 1 == failing.recorded
    with Ledger(run.layout.ledger) as ledger:
        assert ["info"] == [event.level for event in ledger.events(100) if "replayed" in event.message]
        ledger.put(**{FACT: {"processor": "another"}})
    works = Recorder()
    with recording(monkeypatch, works):
        Run(run.layout.root).train(files[3])
    assert 0 < works.replays


def test_cuda_graphs_may_be_off(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is recorded; the key changes no bit, and may change between two steps."""
    let_attend_in_one_call(monkeypatch)
    run, steps = new_run(tmp_path / "run", model, batch_size=2, cuda_graphs="off"), Recorder()
    with recording(monkeypatch, steps):
        run.train(*files[:2])
        assert 0 == steps.recorded
        text = run.layout.config.read_text()
        run.layout.config.write_text(re.sub(r"(?m)^cuda_graphs: .*$", "cuda_graphs: auto", text))
        Run(run.layout.root).train(files[2])
    assert 0 < steps.replays
