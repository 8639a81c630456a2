"""A run whose parts are replayed: the state of one that computes each as usual. A recording of a CPU computes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from one_call import let_attend_in_one_call
from runs import new_run

from onward import Run


class Recorder:
    """Records by keeping the computation; counts replays."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """Record."""

        def replay() -> Any:
            self.replays += 1
            return compute()

        return replay


def test_a_run_that_replays_has_the_state_of_one_that_does_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and probes, in one process; another one continues it, and a replay of the last file proves it."""
    let_attend_in_one_call(monkeypatch)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(24, seed=n)) for n in range(4)]
    plain = new_run(tmp_path / "plain", model, batch_size=2)
    plain.train(*files)
    run = new_run(tmp_path / "run", model, batch_size=2)
    steps, probes = Recorder(), Recorder()
    with monkeypatch.context() as patched:
        patched.setattr("onward.training.economy.sharing_recorder", lambda _: steps)
        patched.setattr("onward.training.probe.recorder_for", lambda _: probes)
        run.train(*files[:3])
    assert 10 < steps.replays
    assert 1 <= probes.replays
    Run(run.layout.root).train(files[3])
    assert ["bitwise"] * 4 == [entry["handover"] for entry in run.history()]
    name = "adapter_model.safetensors"
    assert (plain.layout.current / name).read_bytes() == (run.layout.current / name).read_bytes()
    assert run.verify(deep=True).ok
