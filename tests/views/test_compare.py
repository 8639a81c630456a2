"""`onward compare`: variants on copies of the run, told apart from the noise of the order of rows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import assert_refused, onward, snapshot
from daemons import configure
from runs import new_run

from onward import Run
from onward.errors import ConfigError, TrainingError, UsageError
from onward.service.wishes import Stopped, Wishes
from onward.views.compare import (
    FIGURES,
    Comparison,
    Outcome,
    Trial,
    Trials,
    Variant,
    comparable,
    figures_of,
    lines,
    measured,
    parse_variants,
)


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
    """A variant that is better in one order and worse in another has not won, nor one that leads by just the noise."""
    equal = comparison(outcome("a", 2.0, 4.0), outcome("b", 1.5, 2.5))
    assert (1.0, 1.0, False) == (equal.lead, equal.noise, equal.is_decided)
    found = comparison(outcome("a", 2.0, 4.0), outcome("b", 1.0, 4.5))
    assert not found.is_decided
    assert "no difference above the noise: b is lower by 0.2500, noise 1.5000" == list(lines(found))[-1]


def test_with_one_training_each_the_noise_is_not_known() -> None:
    """One order of rows gives a lead and no verdict."""
    found = comparison(outcome("a", 2.0), outcome("b", 1.0))
    assert (None, False) == (found.noise, found.is_decided)
    assert "(--seeds 2)" in list(lines(found))[-1]


def test_orders_that_make_no_difference_tell_no_noise() -> None:
    """The rows of a file that fits into one step are trained together in any order: that is no proof of a lead."""
    found = comparison(outcome("a", 2.0, 2.0), outcome("b", 1.5, 1.5))
    assert ("b", 0.5, None, False) == tuple(found.to_dict()[key] for key in ("best", "lead", "noise", "decided"))
    assert (
        "b is lower by 0.5000; every order of rows trained the same, so the noise is not known" == [*lines(found)][-1]
    )
    alike = comparison(outcome("a", 2.0, 2.5), outcome("b", 1.5, 2.0))
    assert (0.5, 0.0, True) == (alike.lead, alike.noise, alike.is_decided)


def test_what_was_not_measured_is_said() -> None:
    """Without a grid there is nothing to compare, and no number is invented."""
    found = comparison(outcome("a", None), outcome("b", None))
    assert (None, None) == (found.to_dict()["best"], found.to_dict()["variants"][0]["mean"]["average"])
    assert list(lines(found))[-1].startswith("no file was measured on the same rows under each setting")


def test_figures_are_over_what_every_training_has(trained: Run) -> None:
    """A file that was measured on other rows under one setting, or at a boundary of one alone, counts for none."""
    whole = measured(trained.layout)
    first, second, third, _ = (column.key for column in whole.columns)
    *before, newest = whole.scores
    other_rows = {**newest, second: {**newest[second], "rows": [0]}}
    fewer = [{key: score for key, score in row.items() if key != first} for row in before]
    found = comparable([whole, replace(whole, scores=[*fewer, other_rows])])
    for table in found:
        assert {first, third} == set(table.scores[-1]) & {first, second, third}
        assert (newest[first]["loss"] + newest[third]["loss"]) / 2 == table.average
        assert {1: 0.0} == table.forgotten(), "the better loss of an earlier boundary is known of one alone"


@pytest.mark.parametrize(
    ("texts", "refusal", "reason"),
    [
        (["boundary=carry"], UsageError, "at least two different settings"),
        (["boundary=carry", "boundary=carry"], UsageError, "at least two different settings"),
        (["boundary=carry", "boundary=rewarm", "boundary=carry"], UsageError, "at least two different settings"),
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
    together, alone = parse_variants(["learning_rate=0.001; warmup_steps=3", "warmup_steps=0"])
    assert {"learning_rate": 1e-3, "warmup_steps": 3} == dict(together.settings)
    assert {"warmup_steps": 0} == dict(alone.settings)


SETTINGS: dict[str, Any] = {
    "batch_size": 4, "max_length": 128, "warmup_steps": 0, "learning_rate": 0.05, "lora": {"rank": 2},
    "evaluation": {"share": 1, "files": ["questions.jsonl"]}, "anchor": {"rows": 2, "tokens": 8},
    "keep_boundaries": 1, "keep_days": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (6, 5, 9)]


@pytest.fixture(scope="module")
def trained(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of these files; the boundary before the last one is kept."""
    run = new_run(tmp_path_factory.mktemp("compare") / "run", model, **SETTINGS)
    tiny.write_jsonl(run.layout.root / "questions.jsonl", tiny.chat_rows(2))
    run.train(*files)
    return run


def trials(last: int, orders: int = 1) -> Trials:
    """How variants are tried, silently."""
    return Trials(last, orders, lambda _: None, lambda _: None, Wishes())


def test_a_trial_is_what_the_run_would_be_under_those_settings(
    trained: Run, files: list[Path], model: Path, tmp_path: Path
) -> None:
    """To the last bit: its own settings in its own order give the run's own figures, others those of a run that had
    them from there on; another order of rows gives others, the same for every variant. The run is not touched.
    """
    before, said = snapshot(trained.layout.root), list[str]()
    variants = parse_variants(["learning_rate=0.05", "learning_rate=0.01;epochs=2"])
    found = replace(trials(1, 2), report=said.append).compare(trained.layout, variants)
    assert [f"{variant.text}: training {order} of 2" for variant in variants for order in (1, 2)] == said
    assert before == snapshot(trained.layout.root)
    assert (4, ("9.jsonl",)) == (found.step, found.files)
    own, other = (outcome.trials for outcome in found.outcomes)
    assert ([0, 1], [0, 1]) == ([trial.order for trial in own], [trial.order for trial in other])
    assert figures_of(measured(trained.layout)) == own[0].figures
    assert None not in own[0].figures.values()
    assert own[0].figures != own[1].figures
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    (twin.layout.root / "questions.jsonl").write_bytes((trained.layout.root / "questions.jsonl").read_bytes())
    twin.train(*files[:2])
    configure(twin, learning_rate=0.01, epochs=2)
    twin.train(*files[2:])
    assert figures_of(measured(twin.layout)) == other[0].figures


def test_a_setting_that_the_guard_would_not_let_pass_is_compared_all_the_same(trained: Run, tmp_path: Path) -> None:
    """No file is taken back under one setting alone; what cannot be trained at all is named with its setting."""
    run = Run(shutil.copytree(trained.layout.root, tmp_path / "run"))
    limits = {"action": "reject", "anchor": 1e-9, "forgetting": 1e-9, "spike": 0, "answers": 0}
    configure(run, guard=limits)
    texts = ["learning_rate=0.05", "learning_rate=0.1"]
    compared = [trials(1).compare(each.layout, parse_variants(texts)).to_dict() for each in (trained, run)]
    assert compared[0] == compared[1]
    with pytest.raises(TrainingError, match="is not finite") as refused:
        trials(1).compare(run.layout, parse_variants(["learning_rate=1e30", "learning_rate=0.05"]))
    assert ("learning_rate=1e30", "Leave this setting out; the run is unchanged.") == (
        refused.value.where,
        refused.value.hint,
    )


def test_a_stop_ends_the_comparison_with_the_training_in_which_it_came(trained: Run) -> None:
    """What that one had trained is no trial."""
    stop, said = Wishes(), list[str]()
    cut = Trials(1, 2, lambda _: stop.ask("test"), said.append, stop)
    with pytest.raises(Stopped):
        cut.compare(trained.layout, parse_variants(["epochs=2", "epochs=3"]))
    assert 1 == len(said)
    assert [] == list(trained.layout.reading.iterdir())


@pytest.mark.parametrize(
    ("last", "hint"), [*((last, "The restore points allow: --last 1.") for last in (2, 3)), (4, "--last 1")]
)
def test_what_cannot_be_trained_again_is_refused(trained: Run, last: int, hint: str) -> None:
    """More files than there are, or than there are restore points before; the hint says how many can be."""
    with pytest.raises(UsageError) as refused:
        trials(last).compare(trained.layout, parse_variants(["epochs=1", "epochs=2"]))
    assert hint == refused.value.hint


def test_a_comparison_for_people() -> None:
    """The best variant comes first; each figure is its mean with half of its spread, what was not measured a dash."""
    found = comparison(
        outcome("long name", 2.0, 4.0), outcome("b", 1.5, 3.25), outcome("c", None, 1.0), outcome("d", 5.0, None)
    )
    heads = ("average", "forgetting", "worst", "anchor", "behind the best")
    rows = [
        ("c", "1.0000", "-", "-", "-", ""),
        ("b", "2.3750 +- 0.8750", "-", "-", "-", "2.2500"),
        ("long name", "3.0000 +- 1.0000", "-", "-", "-", "3.0000"),
        ("d", "5.0000", "-", "-", "-", "-"),
    ]
    expected = [f"{row[0]:9}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in (("", *heads), *rows)]
    assert expected == list(lines(found))[:-1]
