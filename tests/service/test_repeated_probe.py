"""How often a state is measured at a boundary, where its copy is proven on its device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from late_copies import Late
from runs import new_run

from onward import Run
from onward.store.ledger import Ledger
from onward.training.measuring.probe import Probe, Probed
from onward.training.transfer import InPlace, Overlapped, Transfer


def count_probes(monkeypatch: pytest.MonkeyPatch, way: type[Transfer]) -> list[Probed]:
    """Have states copied in this way; returns what is measured of them where they are trained."""
    found: list[Probed] = []
    of_model = Probe.of_model

    def counted(probe: Probe) -> Probed:
        found.append(of_model(probe))
        return found[-1]

    def transfer_of(_: Any) -> Transfer:
        return way(Late(), pins=False) if way is Overlapped else way()

    monkeypatch.setattr(Probe, "of_model", counted)
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
    of_model = Probe.of_model
    drift = iter(range(1, 100))

    def drifting(probe: Probe) -> Probed:
        probed = of_model(probe)
        return Probed(probed.loss * (1 + 1e-6 * next(drift)), probed.gradient)

    monkeypatch.setattr(Probe, "of_model", drifting)
    run.train(*(tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in range(4)))
    assert 3 == len(found)
    assert [(0, "not deterministic", True), *((2 * n, "not deterministic", False) for n in (1, 2, 3))] == handovers(run)
