"""`onward compare`: variants on copies of the run, told apart from the noise of the order of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import assert_refused, onward
from runs import new_run

from onward.errors import ConfigError, UsageError
from onward.views.compare import FIGURES, Comparison, Outcome, Trial, Variant, lines, parse_variants


def outcome(text: str, *averages: float | None) -> Outcome:
    """A variant with these average losses, one for each order of rows."""
    trials = [Trial(order, dict.fromkeys(FIGURES) | {"average": value}) for order, value in enumerate(averages)]
    return Outcome(Variant(text, {}), tuple(trials))


def comparison(*outcomes: Outcome) -> Comparison:
    """Variants on one file."""
    return Comparison(3, ("a.jsonl",), outcomes)


def test_a_lead_is_judged_by_its_noise_over_orders_of_rows() -> None:
    """What all orders have in common is no noise: variants are compared order by order."""
    found = comparison(outcome("a", 2.0, 4.0), outcome("b", 1.5, 3.25))
    assert ("b", 0.625, 0.25, True) == tuple(found.to_dict()[key] for key in ("best", "lead", "noise", "decided"))
    assert {"mean": 0.625, "spread": 0.25} == found.to_dict()["variants"][1]["behind"]
    assert "b is better: lower by 0.6250, noise 0.2500" == list(lines(found))[-1]


def test_a_lead_below_the_noise_is_no_difference() -> None:
    """A variant that is better in one order and worse in another has not won."""
    found = comparison(outcome("a", 2.0, 4.0), outcome("b", 1.0, 4.5))
    assert not found.is_decided
    assert "no difference above the noise: b is lower by 0.2500, noise 1.5000" == list(lines(found))[-1]


def test_with_one_training_each_the_noise_is_not_known() -> None:
    """One order of rows gives a lead and no verdict."""
    found = comparison(outcome("a", 2.0), outcome("b", 1.0))
    assert (None, False) == (found.noise, found.is_decided)
    assert "(--seeds 2)" in list(lines(found))[-1]


def test_what_was_not_measured_is_said() -> None:
    """Without a grid there is nothing to compare, and no number is invented."""
    found = comparison(outcome("a", None), outcome("b", None))
    assert (None, None) == (found.to_dict()["best"], found.to_dict()["variants"][0]["mean"]["average"])
    assert list(lines(found))[-1].startswith("nothing was measured")


@pytest.mark.parametrize(
    ("texts", "refusal", "reason"),
    [
        (["boundary=carry"], UsageError, "at least two different settings"),
        (["boundary=carry", "boundary=carry"], UsageError, "at least two different settings"),
        (["seed=1", "seed=2"], ConfigError, "is locked"),
        (["lora.rank=4", "lora.rank=8"], ConfigError, "is locked"),
        (["save_steps=1", "save_steps=2"], ConfigError, "changes no weight"),
        (["boundry=carry", "boundary=rewarm"], ConfigError, "boundry"),
    ],
)
def test_what_cannot_be_compared_is_refused(texts: list[str], refusal: type[Exception], reason: str) -> None:
    """Fewer than two settings, keys that are locked and keys that change no weight are refused by name."""
    with pytest.raises(refusal, match=reason):
        parse_variants(texts)


def test_without_a_finished_file_there_is_nothing_to_compare_on(model: Path, tmp_path: Path) -> None:
    """The refusal names the command that helps: to train one."""
    run = new_run(tmp_path / "run", model)
    refused = onward("compare", "epochs=1", "epochs=2", "--last", "1", "--run", run.layout.root)
    assert_refused(refused, 2, "0 files are done", "onward train FILE")


def test_settings_that_belong_together_are_one_variant() -> None:
    """Semicolons join them; each is read as in `--set`."""
    together, alone = parse_variants(["learning_rate=0.001;warmup_steps=3", "warmup_steps=0"])
    assert {"learning_rate": 1e-3, "warmup_steps": 3} == dict(together.settings)
    assert {"warmup_steps": 0} == dict(alone.settings)
