"""Measures a model at a boundary: what is affordable, in which order, and the results.

What is measured is a function of token counts and the step, never of a clock, so that a run that was stopped, killed or
trained again has the same table. What does not fit is left out; nothing is estimated in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onward.config import Config
from onward.data.tokenized import Row
from onward.training.measuring.scores import Meter, Score
from onward.training.seeds import fold

TRAINING_COST = {"full": 3}
"""How many measured tokens cost as much as one trained token, by method. Training takes a forward pass, one for the
gradients of activations and one for those of all weights; measuring takes a forward pass and scores. Otherwise
`OF_ADAPTER`."""
OF_ADAPTER = 1.75
"""The same if all but small matrices are frozen."""
WAY = 6
"""The version of how scores are computed and of what is affordable; results of other versions may differ."""
FREE_OPERATIONS = 1e9
"""Multiplications and additions that measuring may take whatever the share says: about a hundredth of a second, but a
few tenths on a tiny model, whose calls take longer than its matrix products."""
FEW_TEXTS = 4
"""The number of anchor texts below which their mean says too little."""


@dataclass(frozen=True)
class Sample:
    """The rows that a file is measured on.

    Args:
        rows: the rows.
        indices: their indices in the tokenized file.
        trained: whether the rows were trained; then retention is measured, not generalization.
    """

    rows: Sequence[Row]
    indices: Sequence[int]
    trained: bool

    @property
    def tokens(self) -> int:
        """The number of tokens of a forward pass over them."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class Subject:
    """A file that may be measured.

    Args:
        key: its SHA-256.
        sample: returns its rows; None if they cannot be read, which it has reported then.
    """

    key: str
    sample: Callable[[], Sample | None]


@dataclass(frozen=True)
class Anchor:
    """The texts that the base wrote.

    Args:
        texts: their tokens, all but the first of each being targets.
        turn: the text to begin with this time, if not all fit.
    """

    texts: Sequence[Row]
    turn: int = 0


class Measuring:
    """Measures one model within an allowance.

    Args:
        model: what is measured.
        base: makes the meter of the base model; called when first needed.
        allowance: tokens that may go through a forward pass; None for any number.
    """

    def __init__(self, model: Meter, base: Callable[[], Meter], allowance: int | None) -> None:
        self._model = model
        self._make_base = base
        self._left = allowance
        self.cost = 0
        """Tokens that went through a forward pass."""
        self.model_scores: dict[str, dict[str, Any]] = {}
        self.base_scores: dict[str, dict[str, Any]] = {}
        self.names: dict[str, str] = {}
        self.anchor: dict[str, Any] | None = None

    def base(self) -> Meter:
        """Return the meter of the base model, made once."""
        return self._base

    @cached_property
    def _base(self) -> Meter:
        return self._make_base()

    def of_model(self, subject: Subject) -> bool:
        """Measure the model on a file; return False if that does not fit."""
        return self._score(subject, lambda: self._model, self.model_scores)

    def of_base(self, subject: Subject) -> bool:
        """Measure the base on a file; return False if that does not fit."""
        return self._score(subject, lambda: self._base, self.base_scores)

    def all_of_model(self, subjects: Iterable[Subject]) -> None:
        """Measure the model on files in their order, up to the first that does not fit."""
        for subject in subjects:
            if not self.of_model(subject):
                return

    def texts_that_fit(self, rows: int, tokens: int) -> int:
        """Return how many of `rows` anchor texts of `tokens` tokens fit into half of what is left; 0 if too few."""
        count = rows if self._left is None else min(rows, self._left // 2 // (2 * tokens))
        return count if count >= min(FEW_TEXTS, rows) else 0

    def divergence(self, anchor: Anchor) -> None:
        """Measure how far the model is from the base on as many anchor texts as fit."""
        texts, each = anchor.texts, 2 * len(anchor.texts[0].ids)
        count = self.texts_that_fit(len(texts), len(texts[0].ids))
        if not count:
            return
        chosen = [texts[(anchor.turn + place) % len(texts)] for place in range(count)]
        kl = self._model.divergence(self._base, chosen)
        indices = sorted((anchor.turn + place) % len(texts) for place in range(count))
        self.anchor = {"kl": kl, "rows": indices, "tokens": sum(len(row.ids) - 1 for row in chosen)}
        self._spend(count * each)

    def result(self) -> dict[str, Any]:
        """Return what was measured, as JSON values."""
        found: dict[str, Any] = {"model": self.model_scores, "base": self.base_scores, "cost": self.cost}
        return found | {"anchor": self.anchor, "names": self.names, "way": WAY}

    def _score(self, subject: Subject, meter: Callable[[], Meter], into: dict[str, dict[str, Any]]) -> bool:
        sample = subject.sample()
        if sample is None or not any(row.targets[1:].any() for row in sample.rows):
            return True
        if self._left is not None and sample.tokens > self._left:
            return False
        into[subject.key] = described(meter().score(sample.rows), sample)
        self._spend(sample.tokens)
        return True

    def _spend(self, tokens: int) -> None:
        self.cost += tokens
        if self._left is not None:
            self._left -= tokens


def described(score: Score, sample: Sample) -> dict[str, Any]:
    """Return a score and what it was measured on, as JSON values."""
    return {
        "loss": score.loss,
        "accuracy": score.accuracy,
        "tokens": score.tokens,
        "rows": list(sample.indices),
        "trained": sample.trained,
    }


def allowance(config: Config, trained_tokens: int, spent: int, parameters: int) -> int:
    """Return how many tokens may be measured now: a share of what training cost so far, or the free minimum.

    Args:
        trained_tokens: tokens trained since the run began.
        spent: tokens that all measuring so far passed through the model.
        parameters: weights of the model.
    """
    cost = trained_tokens * TRAINING_COST.get(config.method, OF_ADAPTER)
    return max(int(FREE_OPERATIONS / (2 * parameters)), int(config.evaluation.share * cost) - spent)


def in_rotation(keys: Sequence[str], seed: int, step: int) -> list[str]:
    """Return files in their order, rotated to begin with one that is a function of the step."""
    first = fold(seed, "rotation", step) % len(keys) if keys else 0
    return [*keys[first:], *keys[:first]]
