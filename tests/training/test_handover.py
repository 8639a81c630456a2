"""Which class of handover holds, and when the run stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onward.config import Config
from onward.errors import TrainingError, VerificationFailed
from onward.training.measuring.handover import Measurement, compare
from onward.training.measuring.probe import Probe, probe_batch
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.state import TrainState

BEFORE = Measurement(weights="w", moments="m", adam_step=7, learning_rate=1e-3, probe_loss=2.0)
HERE = {"device": "cpu", "threads": 2, "dtype": "float32"}
ELSEWHERE = {"device": "cpu", "threads": 4, "dtype": "float32"}
OTHER_TYPE = {"device": "cuda", "threads": 2, "dtype": "bfloat16"}


def test_equal_is_bitwise() -> None:
    """Equal measurements are `bitwise`, wherever they were made."""
    assert ("bitwise", 0.0) == compare(BEFORE.to_dict(), BEFORE, HERE, HERE)
    assert ("bitwise", 0.0) == compare(BEFORE.to_dict(), BEFORE, ELSEWHERE, HERE)


@pytest.mark.parametrize(
    "change",
    [{"weights": "x"}, {"moments": "x"}, {"adam_step": 6}, {"learning_rate": 0.0}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("environment", [HERE, ELSEWHERE, OTHER_TYPE], ids=["here", "elsewhere", "other type"])
def test_another_state_stops_the_run(change: dict[str, object], environment: dict[str, object]) -> None:
    """Weights, moments, Adam's counter and learning rate must be equal in every environment."""
    with pytest.raises(VerificationFailed, match=next(iter(change))):
        compare(BEFORE.to_dict(), replace(BEFORE, **change), environment, HERE)  # type: ignore[arg-type]


def test_another_probe_loss_here_stops_the_run() -> None:
    """The same bits in the same environment give the same loss; another one is an error."""
    with pytest.raises(VerificationFailed, match=r"weights and moments are those before .* another loss"):
        compare(BEFORE.to_dict(), replace(BEFORE, probe_loss=2.0000001), HERE, HERE)


@pytest.mark.parametrize(
    ("fact", "name"),
    [
        ({"deterministic": False}, "not deterministic"), ({"device": "mps"}, "close"), ({"ranks": "unequal"}, "close"),
        ({"exchange": "fast"}, "close"),
    ],
)  # fmt: skip
def test_equal_bits_that_were_not_promised_are_not_bitwise(fact: dict[str, object], name: str) -> None:
    """They are equal by chance, on whichever side the promise was missing."""
    unsure = {**HERE, **fact}
    for both in ((unsure, HERE), (HERE, unsure), (unsure, unsure)):
        assert (name, 0.0) == compare(BEFORE.to_dict(), BEFORE, *both)


def test_a_gradient_is_compared_where_both_have_one() -> None:
    """Measurements of earlier releases have none; between two that have one, another one here is an error."""
    one, other = replace(BEFORE, probe_gradient="a"), replace(BEFORE, probe_gradient="b")
    old = {key: value for key, value in BEFORE.to_dict().items() if key != "probe_gradient"}
    for before, after in ((old, one), (one.to_dict(), BEFORE), (one.to_dict(), one)):
        assert ("bitwise", 0.0) == compare(before, after, HERE, HERE)
    with pytest.raises(VerificationFailed, match="gradient of the probe differs"):
        compare(one.to_dict(), other, HERE, HERE)
    assert ("close", 0.0) == compare(one.to_dict(), other, ELSEWHERE, HERE)


def test_elsewhere_is_close_or_not_comparable() -> None:
    """Another thread count may change the last bits; another compute type cannot be compared; a jump is an error."""
    name, difference = compare(BEFORE.to_dict(), replace(BEFORE, probe_loss=2.0002), ELSEWHERE, HERE)
    assert "close" == name
    assert 0 < difference < 2e-4
    assert "not comparable" == compare(BEFORE.to_dict(), replace(BEFORE, probe_loss=2.5), OTHER_TYPE, HERE)[0]
    with pytest.raises(VerificationFailed, match="differs by"):
        compare(BEFORE.to_dict(), replace(BEFORE, probe_loss=2.5), ELSEWHERE, HERE)


def test_probe_is_a_function_of_the_seed() -> None:
    """The probe batch depends on seed and vocabulary only, and stays inside the vocabulary."""

    def ids(seed: int, vocabulary: int, given: int | None = None) -> list[list[int]]:
        return [row.ids.tolist() for row in probe_batch(seed, vocabulary, given=given).rows]

    assert ids(1, 50) == ids(1, 50)
    assert ids(1, 50) != ids(2, 50)
    assert max(map(max, ids(3, 5))) < 5
    assert ids(1, 50) == ids(1, 50, given=50)
    fewer = ids(1, 50, given=40)  # a model that embeds ids which it has no logits for
    assert max(map(max, fewer)) < 40
    assert [[each % 40 for each in row] for row in ids(1, 50)] == fewer


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_copy_is_measured_while_training_goes_on(method: str, model: Path) -> None:
    """In another thread, after the weights moved on, a copy has the loss that the state had when it was copied."""
    config, cpu = Config.model_validate({"model": str(model), "method": method}), torch.device("cpu")
    built = build_model(ModelSpec(config, model, cpu, torch.float32))
    state = TrainState.start(built, config)
    probe = Probe(built, config.seed, cpu, torch.float32)
    copied, losses = None, []
    with ThreadPoolExecutor(1) as other:
        for _ in range(3):  # the first copy has no moments, the third goes into the memory of the second
            losses.append(probe.of_model())
            copied = state.snapshot(into=copied)
            measure = probe.of_copy(copied)
            for parameter in state.parameters.values():
                parameter.grad = torch.ones_like(parameter)
            state.optimizer.step()
            assert losses[-1] == other.submit(measure).result()
            assert losses[-1] != probe.of_model()
    assert built.training
    assert 3 == len(set(losses))


def test_a_loss_that_is_not_finite_is_no_commit(model: Path) -> None:
    """A state whose probe has no finite loss is refused, measured now or behind training."""
    config, cpu = Config.model_validate({"model": str(model)}), torch.device("cpu")
    built = build_model(ModelSpec(config, model, cpu, torch.float32))
    state = TrainState.start(built, config)
    for parameter in state.parameters.values():
        parameter.data.fill_(float("nan"))
    probe = Probe(built, config.seed, cpu, torch.float32)
    for measure in (probe.of_model, probe.of_copy(state.snapshot())):
        with pytest.raises(TrainingError, match="no longer finite"):
            measure()
