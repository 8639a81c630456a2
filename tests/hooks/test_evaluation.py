"""What is measured at a boundary within an allowance, by a meter that remembers what it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest

from onward.data.tokenized import Row
from onward.hooks.evaluation import FEW_TEXTS, Anchor, Measuring, Sample, Subject, in_rotation
from onward.training.measuring.scores import Meter, Score


class Remembering:
    """Measures nothing, and remembers the tokens of the rows."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def score(self, rows: Sequence[Row]) -> Score:
        self.asked.append([row.ids.tolist() for row in rows])
        return Score(loss=2.5, accuracy=0.25, tokens=3)

    def divergence(self, base: Remembering, rows: Sequence[Row]) -> float:
        assert base is not self
        self.asked.append([row.ids.tolist() for row in rows])
        return 0.5


def row(first: int, tokens: int, *, has_target: bool = True) -> Row:
    """A row of consecutive tokens; all but the first are targets, or the first alone, which no model predicts."""
    places = np.arange(tokens)
    return Row(places + first, places > 0 if has_target else places == 0)


def subject(name: str, *rows: Row) -> Subject:
    """A file with these rows."""
    return Subject(name, lambda: Sample(rows, range(5, 5 + len(rows)), trained=True))


def measuring(model: Remembering, base: Remembering, allowance: int | None) -> Measuring:
    """Measure with these meters."""
    return Measuring(cast(Meter, model), cast(Callable[[], Meter], lambda: base), allowance)


FILES = [subject("a", row(0, 4), row(10, 3)), subject("b", row(20, 5)), subject("c", row(30, 2))]
SCORE: dict[str, Any] = {"loss": 2.5, "accuracy": 0.25, "tokens": 3, "trained": True}


@pytest.mark.parametrize(
    ("allowance", "names"), [(0, ""), (6, ""), (7, "a"), (11, "a"), (12, "ab"), (13, "ab"), (14, "abc"), (None, "abc")]
)
def test_files_are_measured_in_their_order_up_to_the_first_that_does_not_fit(allowance: int | None, names: str) -> None:
    """What is spent is the tokens of the rows that were measured, never more than is allowed."""
    model, base = Remembering(), Remembering()
    one = measuring(model, base, allowance)
    one.all_of_model(FILES)
    assert list(names) == list(one.model_scores)
    assert {"": 0, "a": 7, "ab": 12, "abc": 14}[names] == one.cost
    assert ([], {}, None) == (base.asked, one.base_scores, one.anchor)
    if "a" in names:
        assert [[0, 1, 2, 3], [10, 11, 12]] == model.asked[0]
        assert {**SCORE, "rows": [5, 6]} == one.result()["model"]["a"]


def test_the_base_is_measured_by_its_own_meter_from_the_same_allowance() -> None:
    """A file fits for the model, and then not for the base."""
    model, base = Remembering(), Remembering()
    one = measuring(model, base, 13)
    assert [True, False, True] == [one.of_model(FILES[0]), one.of_base(FILES[0]), one.of_base(FILES[1])]
    assert ([["a"], ["b"]], 12) == ([list(one.model_scores), list(one.base_scores)], one.cost)
    assert [[[20, 21, 22, 23, 24]]] == base.asked


@pytest.mark.parametrize("sample", [None, Sample([row(0, 9, has_target=False)], [0], trained=False)])
def test_what_has_nothing_to_measure_costs_nothing_and_keeps_nothing_out(sample: Sample | None) -> None:
    """Rows that cannot be read, or have no target that a model predicts, are passed over."""
    one = measuring(Remembering(), Remembering(), 2)
    one.all_of_model([Subject("none", lambda: sample), FILES[2]])
    assert (["c"], 2) == (list(one.model_scores), one.cost)
    some = measuring(Remembering(), Remembering(), 6)
    some.all_of_model([subject("d", row(0, 2), row(0, 4, has_target=False))])
    assert (["d"], 6) == (list(some.model_scores), some.cost)


@pytest.mark.parametrize("turn", [0, 3, 13])
@pytest.mark.parametrize("texts", [2, 6])
def test_as_many_anchor_texts_as_half_the_allowance_takes(texts: int, turn: int) -> None:
    """Both models read each text; they begin with the turn's and go round; too few of them say too little."""
    for allowance in (*range(0, 110, 5), None):
        model, base = Remembering(), Remembering()
        one = measuring(model, base, allowance)
        one.divergence(Anchor([row(100 * place, 4) for place in range(texts)], turn))
        fits = texts if allowance is None else min(texts, allowance // 16)  # half of it, 4 tokens for either model
        if fits < min(FEW_TEXTS, texts):
            assert ([], None, 0) == (model.asked, one.anchor, one.cost)
            continue
        places = [(turn + step) % texts for step in range(fits)]
        assert [[list(range(100 * place, 100 * place + 4)) for place in places]] == model.asked
        assert {"kl": 0.5, "rows": sorted(places), "tokens": 3 * fits} == one.result()["anchor"]
        assert 8 * fits == one.result()["cost"]


def test_files_take_turns_at_being_first() -> None:
    """The order goes round, and where it begins is a function of seed and step that reaches every file."""
    orders = {tuple(in_rotation("abc", 7, step)) for step in range(50)}
    assert {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")} == orders
    assert [] == in_rotation([], 7, 1)
