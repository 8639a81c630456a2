"""How often a state is measured at a boundary, where its copy is proven on its device."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from late_copies import Late
from runs import new_run

from onward import Run
from onward.errors import TrainingError
from onward.events import StepTaken
from onward.service.proof.verify import verify
from onward.store.ledger import Ledger
from onward.training.measuring.probe import Probe, Probed
from onward.training.state import Snapshot
from onward.training.transfer import InPlace, Overlapped, Transfer


def count_probes(monkeypatch: pytest.MonkeyPatch, way: type[Transfer]) -> list[Probed]:
    """Have states copied in this way; returns what is measured of them where they are trained."""
    found: list[Probed] = []
    begin = Probe.begin

    def counted(probe: Probe) -> Callable[[], Probed]:
        probed = begin(probe)()
        found.append(probed)
        return lambda: probed

    def transfer_of(_: Any) -> Transfer:
        return way(Late(), pins=False) if way is Overlapped else way()

    monkeypatch.setattr(Probe, "begin", counted)
    monkeypatch.setattr("onward.training.state.transfer_of", transfer_of)
    return found


def handovers(run: Run) -> list[tuple[int, str, bool]]:
    """Return the step and the class of each, and whether both sides are equal."""
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        return [
            (each.step, each.name, json.loads(each.before) == json.loads(each.after)) for each in ledger.handovers()
        ]


def weights_of(run: Run) -> bytes:
    """Return the newest weights, as they lie on the disk."""
    return (run.layout.current / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("way", "probes"), [(Overlapped, 1), (InPlace, 3)])
def test_a_probe_that_repeats_is_taken_once(
    way: type[Transfer], probes: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one tells nothing that marks of the state do not, once one has repeated; elsewhere each is taken.

    The next process knows nothing of that, and measures what it resumes.
    """
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in range(5)]
    plain = new_run(tmp_path / "plain", model, batch_size=2)
    plain.train(*files)
    run = new_run(tmp_path / "run", model, batch_size=2)
    found = count_probes(monkeypatch, way)
    run.train(*files[:4])
    assert probes == len(found)
    again = Run(run.layout.root)
    again.train(files[4])
    assert probes + 1 == len(found)
    assert [(2 * n, "bitwise", True) for n in range(5)] == handovers(run)
    assert weights_of(plain) == weights_of(again)
    assert run.verify(deep=True).ok


def test_a_probe_that_does_not_repeat_is_taken_each_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no equal bits are promised a handover has two, and says what they differ by."""
    run = new_run(tmp_path / "run", model, batch_size=2, deterministic=False)
    found = count_probes(monkeypatch, Overlapped)
    begin = Probe.begin
    drift = iter(range(1, 100))

    def drifting(probe: Probe) -> Callable[[], Probed]:
        probed = begin(probe)()
        drifted = Probed(probed.loss * (1 + 1e-6 * next(drift)), probed.gradient)
        return lambda: drifted

    monkeypatch.setattr(Probe, "begin", drifting)
    run.train(*(tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in range(4)))
    assert 3 == len(found)
    assert [(0, "not deterministic", True), *((2 * n, "not deterministic", False) for n in (1, 2, 3))] == handovers(run)


def gate_probe(monkeypatch: pytest.MonkeyPatch, step: int, gate: Callable[[], object]) -> None:
    """Call a function before the probe of a step's copy is measured."""
    of_copy = Probe.of_copy

    def gated(probe: Probe, copy: Snapshot) -> Callable[[], Probed]:
        measure = of_copy(probe, copy)
        return measure if copy.step != step else lambda: (gate(), measure())[1]

    monkeypatch.setattr(Probe, "of_copy", gated)


def test_steps_do_not_wait_for_a_probe_that_repeats(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next file begins, and a verification finds nothing missing, before the copy is measured; then it is kept."""
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in range(3)]
    run = new_run(tmp_path / "run", model, batch_size=2)
    count_probes(monkeypatch, Overlapped)
    begun, kept, proofs = threading.Event(), list[bool](), list[bool]()
    gate_probe(monkeypatch, 4, lambda: kept.append(begun.wait(60)))

    def observe(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 5:
            with Ledger(run.layout.ledger, read_only=True) as ledger:  # as after a kill
                proofs.extend(check.ok for check in verify(run.layout, ledger).checks if check.name == "handovers")
            begun.set()

    run.train(*files, observe=observe)
    assert ([True], [True]) == (kept, proofs)
    assert [(2 * n, "bitwise", True) for n in range(3)] == handovers(run)
    assert run.verify().ok


def test_a_copy_that_cannot_be_measured_commits_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained meanwhile is lost, and trained again to the same bits once it can be measured."""
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in range(3)]
    plain = new_run(tmp_path / "plain", model, batch_size=2)
    plain.train(*files)
    run = new_run(tmp_path / "run", model, batch_size=2)
    count_probes(monkeypatch, Overlapped)

    def fail() -> None:
        raise TrainingError("the loss is not finite", where="the probe batch", hint="Try again.")

    with monkeypatch.context() as patched:
        gate_probe(patched, 4, fail)
        with pytest.raises(TrainingError):
            run.train(*files)
    assert [(0, "bitwise", True), (2, "bitwise", True)] == handovers(run)
    again = Run(run.layout.root)
    again.train()
    assert [(step, "bitwise", True) for step in (0, 2, 2, 4)] == handovers(again)
    assert weights_of(plain) == weights_of(again)
    assert again.verify().ok
