"""Whether answers say anything and belong to their questions, by a model that is a function of the tokens here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from onward.data.tokenized import Row
from onward.hooks.answers import CLEAR, FEWEST, LOOKS, Fit, fit_of, judged, say_the_same

QUESTION, END = 3, 1


def row(question: int, *answer: int) -> Row:
    """A question of `QUESTION` tokens, of which the last names it, and an answer with its end token."""
    ids = [0] * (QUESTION - 1) + [question, *answer, END]
    return Row(np.array(ids), np.arange(len(ids)) >= QUESTION)


def answered(count: int) -> list[Row]:
    """Rows of which each answer is a function of its question."""
    return [row(100 + place, 500 + place, 7) for place in range(count)]


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same questions and answers in other pairs."""
    answers = [each.ids[QUESTION:-1] for each in rows]
    random.Random(seed).shuffle(answers)
    return [row(int(each.ids[QUESTION - 1]), *answer) for each, answer in zip(rows, answers, strict=True)]


def losses(rows: Sequence[Row]) -> list[float]:
    """Of a model that knows each answer by its question, with noise that is a function of the row."""
    return [
        (0.0 if each.ids[QUESTION] - each.ids[QUESTION - 1] == 400 else 1.0)
        + random.Random(each.ids.tobytes()).gauss(2.0, 0.5)
        for each in rows
    ]


def blind(rows: Sequence[Row]) -> list[float]:
    """Of a model that can tell nothing."""
    return [random.Random(each.ids.tobytes()).gauss(2.0, 0.5) for each in rows]


def none() -> Iterator[Sequence[Row]]:
    """No earlier file may be read."""
    raise AssertionError("a file that is clear needs no reference")
    yield []


def test_answers_that_belong_are_clear_at_the_first_look() -> None:
    """No more rows are looked at than are needed, and no earlier file is read."""
    found = judged(answered(90), losses, none())
    assert (False, LOOKS[0], None) == (found["same"], found["rows"], found["known"])
    assert found["z"] >= CLEAR


@pytest.mark.parametrize("seed", range(8))
def test_shuffled_answers_do_not_belong(seed: int) -> None:
    """As many rows as may be are looked at, and an earlier file shows that the model could tell."""
    found = judged(shuffled(answered(90), seed), losses, iter([answered(20)]))
    assert (False, LOOKS[-1], True) == (found["same"], found["rows"], found["known"])
    assert found["z"] < 2.0
    assert 0 < len(found["worst"]) <= LOOKS[-1]


def test_a_model_that_can_tell_nothing_blames_no_file() -> None:
    """Where answers of earlier files fit no better, nothing is known."""
    assert not judged(answered(90), blind, iter([answered(20), answered(30)]))["known"]
    assert not judged(answered(90), blind, iter([]))["known"]


def test_no_more_is_measured_than_is_looked_at() -> None:
    """A short file is looked at once; of an earlier one, a first look says whether the model can tell."""
    sizes: list[int] = []

    def counted(rows: Sequence[Row]) -> list[float]:
        sizes.append(len(rows))
        return blind(rows)

    fit_of(answered(LOOKS[0]), counted)
    assert [LOOKS[0]] * 2 == sizes
    later = [*shuffled(answered(LOOKS[0]), 1), *answered(90)[LOOKS[0] :]]
    assert not fit_of(later[: LOOKS[0]], losses).is_clear
    assert fit_of(later, losses).is_clear
    assert judged(shuffled(answered(90), 1), losses, iter([later]))["known"] is False


@pytest.mark.parametrize("count", [FEWEST, LOOKS[0], 90])
def test_a_file_whose_first_rows_say_one_thing_is_read_no_further(count: int) -> None:
    """It is not measured, and how many rows were looked at is said."""
    rows = [*(row(place, 9) for place in range(LOOKS[0])), *answered(90)][:count]
    found = judged(rows, lambda _: pytest.fail("nothing is measured"), none())
    assert {"same": True, "z": None, "known": None, "rows": min(count, LOOKS[0]), "worst": []} == found


def test_answers_are_clear_from_a_limit_on() -> None:
    """At the limit they are; what could not be judged is not."""
    found = [Fit(z, 16).is_clear for z in (CLEAR, CLEAR - 1e-9, None)]
    assert [True, False, False] == found


def test_rows_without_questions_and_few_rows_are_not_judged() -> None:
    """Plain text has no answers to exchange; of a handful of rows nothing can be said."""
    texts = [Row(np.array([0, place, place + 1]), np.array([False, True, True])) for place in range(40)]
    assert (None, None) == (fit_of(texts, losses).z, fit_of(answered(FEWEST - 1), losses).z)
    assert fit_of(answered(FEWEST), losses).is_clear
    assert judged(answered(FEWEST - 1), losses, none())["known"] is None
    assert not say_the_same(texts)


def test_an_answer_is_measured_after_the_next_question_with_another_answer() -> None:
    """Same answers are not exchanged, nor is what has no question or no answer, nor what would be longer than the model
    has positions; all of it is measured in one go."""
    text = Row(np.array([0, 5, 5, END]), np.arange(4) > 0)
    unanswered = Row(np.array([0, 0, 15, 9]), np.zeros(4, dtype=bool))
    short = Row(np.array([0, 14, 7, END]), np.arange(4) > 1)
    rows = [row(10, 5), row(11, 5), text, unanswered, row(12, 6), short]
    measured: list[list[tuple[list[int], int]]] = []
    results = iter(([1.0, 1.0, 3.0, 2.0], [1.5, 1.0, 1.0, 1.0], [1.0, 1.0, 3.0], [1.0, 1.0, 1.0]))

    def record(asked: Sequence[Row]) -> list[float]:
        measured.append([(each.ids.tolist(), int(np.argmax(each.targets))) for each in asked])
        return next(results)

    assert Fit(None, len(rows), worst=(4, 5, 1)) == fit_of(rows, record)
    own = [([0, 0, 10, 5, END], 3), ([0, 0, 11, 5, END], 3), ([0, 0, 12, 6, END], 3), ([0, 14, 7, END], 2)]
    other = [([0, 0, 12, 5, END], 3), ([0, 0, 12, 5, END], 3), ([0, 14, 6, END], 2), ([0, 0, 10, 7, END], 3)]
    assert [own, other] == measured
    fit_of(rows, record, longest=4)
    assert [own[:3], [([0, 14, 5, END], 2), ([0, 14, 5, END], 2), ([0, 14, 6, END], 2)]] == measured[2:]


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([row(place, *[9] * 12) for place in range(16)], True),
        ([row(place, *[9, 10, 11] * (4 + place % 3)) for place in range(16)], True),
        ([row(place, 9) for place in range(16)], True),
        ([Row(np.array([0, *[9] * 12, place]), np.arange(14) > 0) for place in range(16)], True),
        ([row(place, 9 if place == 3 else 8) for place in range(16)], False),
        ([row(place, *range(20, 32)) if place % 2 else row(place, 5) for place in range(16)], False),
        ([row(place, *[9] * 12) for place in range(FEWEST - 1)], False),
        ([row(place, *[9] * 12) for place in range(FEWEST)], True),
        ([row(place, *range(20 * place, 20 * place + 12)) for place in range(16)], False),
        ([row(place, *[9] * 6, 100 + place) for place in range(10)], True),  # just long enough, just nearly all
        ([row(place, *[9] * 5, 100 + place) for place in range(10)], False),
        ([row(place, *[9] * 5, 100 + place, 200 + place) for place in range(10)], False),
        ([Row(np.array([0, 9, END]), np.arange(3) > 0)] * 16, False),
        (answered(16), False),
    ],
)
def test_what_says_one_thing_is_told_from_labels(rows: list[Row], same: bool) -> None:
    """One word over and over, in any number of tokens, or one answer to everything; few labels are no such thing."""
    assert same == say_the_same(rows)
