"""A run whose parts are replayed: the state of one that computes each as usual."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from one_call import let_attend_in_one_call
from op_recorder import OpRecorder
from processes import apart
from runs import new_run

from onward import Run
from onward.errors import DeviceLost
from onward.events import StepTaken
from onward.service.owner.training.recordings import FACT
from onward.store.ledger import Ledger
from onward.training.layers.varlen import Varlen
from onward.training.seeds import others_train
from onward.training.trainer import Trainer


class Recorder:
    """Records by keeping the computation; counts recordings and replays.

    Args:
        fails: whether it records nothing and raises.
        what: what it raises.
    """

    def __init__(self, *, fails: bool = False, what: str = "operation not permitted when stream is capturing") -> None:
        self.recorded = self.replays = 0
        self._fails, self._what = fails, what

    def __call__(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """Record."""
        self.recorded += 1
        if self._fails:
            raise RuntimeError(self._what)

        def replay() -> Any:
            self.replays += 1
            return compute()

        return replay


@contextmanager
def recording(
    monkeypatch: pytest.MonkeyPatch, steps: Recorder | OpRecorder, probes: Recorder | None = None
) -> Generator[Recorder]:
    """Let processes in the body record steps, and probes; yields the recorder of probes."""
    probes = probes or Recorder()
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


def test_other_threads_know_that_a_run_trains(model: Path, files: list[Path], tmp_path: Path) -> None:
    """From its first step to its last, and not after it."""
    found: list[bool] = []
    with ThreadPoolExecutor(1) as other:

        def observe(event: object) -> None:
            if isinstance(event, StepTaken):
                found.extend([other.submit(others_train).result(), others_train()])

        new_run(tmp_path / "run", model, batch_size=8).train(files[0], observe=observe)
        assert [True, False] * 3 == found
        assert not other.submit(others_train).result()


@pytest.mark.parametrize("another", ["driver", "onward"])
def test_a_recording_that_goes_wrong_is_not_tried_by_the_next_process(
    another: str, model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is trained nevertheless; an event says it. Another driver and another release of Onward try again."""
    let_attend_in_one_call(monkeypatch)
    run, failing = new_run(tmp_path / "run", model, batch_size=2), Recorder(fails=True)
    with recording(monkeypatch, failing):
        run.train(*files[:2])
        Run(run.layout.root).train(files[2])
    assert 1 == failing.recorded
    with Ledger(run.layout.ledger) as ledger:
        assert ["info"] == [event.level for event in ledger.events(100) if "replayed" in event.message]
        ledger.put(**{FACT: {**ledger.get(FACT), another: "another"}})
    works = Recorder()
    with recording(monkeypatch, works):
        Run(run.layout.root).train(files[3])
    assert 0 < works.replays


def test_a_recording_that_lacks_memory_is_tried_by_the_next_process(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have used the GPU for a while; this process records nothing any more, and says why."""
    let_attend_in_one_call(monkeypatch)
    run, failing = new_run(tmp_path / "run", model, batch_size=2), Recorder(fails=True, what="CUDA out of memory.")
    with recording(monkeypatch, failing):
        run.train(*files[:2])
    assert 1 == failing.recorded
    with Ledger(run.layout.ledger) as ledger:
        found = [event.message for event in ledger.events(100) if "replayed" in event.message]
    assert ["steps are no longer replayed here: RuntimeError: CUDA out of memory."] == found
    works = Recorder()
    with recording(monkeypatch, works):
        Run(run.layout.root).train(files[2])
    assert 0 < works.replays


def test_steps_that_cannot_be_recorded_leave_probes_to_be(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that is found before anything is recorded, nothing went wrong: an event says it, and probes are replayed."""
    let_attend_in_one_call(monkeypatch)
    run, steps = new_run(tmp_path / "run", model, batch_size=2), Recorder()
    with monkeypatch.context() as patched, recording(patched, steps) as probes:
        patched.setattr(Varlen, "fits", lambda *_: False)
        run.train(*files[:3])
        Run(run.layout.root).train(files[3])
    assert 0 == steps.recorded
    assert 1 == probes.replays
    with Ledger(run.layout.ledger) as ledger:
        assert ledger.get(FACT) is None
        found = {event.message for event in ledger.events(100) if "replayed" in event.message}
    why = "RuntimeError: attention is computed row by row, for which the host has to know the rows"
    assert {f"steps are not replayed here: {why}"} == found


def test_a_probe_that_cannot_be_recorded_is_not_tried_by_the_next_process(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed at every boundary, an event says it, and from then on no steps are recorded either."""
    let_attend_in_one_call(monkeypatch)
    run, steps, failing = new_run(tmp_path / "run", model, batch_size=2), Recorder(), Recorder(fails=True)
    with recording(monkeypatch, steps, failing):
        run.train(*files[:3])
        replays = steps.replays
        Run(run.layout.root).train(files[3])
    assert 1 == failing.recorded
    assert 0 < replays == steps.replays
    assert ["bitwise"] * 4 == [entry["handover"] for entry in run.history()]
    with Ledger(run.layout.ledger) as ledger:
        found = [event.message for event in ledger.events(100) if "replayed" in event.message]
    assert [
        "the probe is no longer replayed here: RuntimeError: operation not permitted when stream is capturing"
    ] == found


def test_a_recording_that_breaks_its_step_is_not_tried_by_the_next_process(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the device is lost together with it, the process ends; the next one trains the file without recordings."""
    let_attend_in_one_call(monkeypatch)
    run, failing = new_run(tmp_path / "run", model, batch_size=2), Recorder(fails=True)
    fill = Trainer._fill

    def lost(trainer: Trainer) -> None:
        if failing.recorded:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        fill(trainer)

    with recording(monkeypatch, failing), monkeypatch.context() as patched:
        patched.setattr(Trainer, "_fill", lost)
        with pytest.raises(DeviceLost):
            run.train(*files[:2])
    with recording(monkeypatch, failing):
        Run(run.layout.root).train()
    assert 1 == failing.recorded
    assert ["done"] * 2 == [entry["state"] for entry in run.history()]


def _train(root: str) -> None:
    patch = pytest.MonkeyPatch()
    let_attend_in_one_call(patch)
    Run(root).train()


def _die_recording(root: str) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("onward.training.measuring.probe.recorder_for", lambda _: Recorder())
    patch.setattr("onward.training.steps.economy.sharing_recorder", lambda _: lambda _: os._exit(9))
    _train(root)


def test_a_process_that_dies_of_a_recording_does_not_cost_the_file(
    model: Path, files: list[Path], tmp_path: Path
) -> None:
    """After two deaths in the same place, the next process records nothing in that file, and an event says so."""
    run = new_run(tmp_path / "run", model, batch_size=2)
    run.add(files[0])
    assert 0 == apart(_train, str(run.layout.root))  # its commits are complete: each death is at the same one
    run.add(files[1])
    assert [9, 9, 0] == [apart(_die_recording, str(run.layout.root)) for _ in range(3)]
    assert ["done"] * 2 == [entry["state"] for entry in run.history()]
    with Ledger(run.layout.ledger) as ledger:
        found = [event.message for event in ledger.events(100) if "replayed" in event.message]
    assert ["nothing is replayed here: 2 processes died in this place"] == found
    run.add(files[2])
    assert 9 == apart(_die_recording, str(run.layout.root))


def test_cuda_graphs_may_be_off(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then neither steps nor probes are recorded; the key changes no bit, and may change between two steps."""
    let_attend_in_one_call(monkeypatch)
    run, steps = new_run(tmp_path / "run", model, batch_size=2, cuda_graphs="off"), Recorder()
    with recording(monkeypatch, steps) as probes:
        run.train(*files[:2])
        assert (0, 0) == (steps.recorded, probes.recorded)
        text = run.layout.config.read_text()
        run.layout.config.write_text(re.sub(r"(?m)^cuda_graphs: .*$", "cuda_graphs: auto", text))
        Run(run.layout.root).train(files[2])
    assert 0 < steps.replays
