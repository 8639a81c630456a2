"""Measuring a model at a boundary: what is affordable, in which order, and what comes of it.

What is measured is a function of counted tokens and of the step, never of a clock, so that a run that was stopped,
killed or trained again has the same table. What does not fit is left out: nothing is estimated in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onward.config import Config
from onward.data.tokenized import Row
from onward.training.scores import Meter, Score
from onward.training.seeds import fold

TRAINING_COST = {"full": 3}
"""Measured tokens that cost what a trained one does, by method. It is one forward pass, one for the gradient of what
layers return, and one for that of all weights; measuring is a forward pass, and its scores. Elsewhere `OF_ADAPTER`."""
OF_ADAPTER = 1.75
"""The same where all but small matrices are frozen."""
WAY = 5
"""How scores are computed and what is affordable: another number than an earlier release's, whose may differ."""
FREE_OPERATIONS = 1e9
"""Multiplications and additions that measuring may take whatever the share says: about a hundredth of a second, but
some tenths on a tiny model, whose calls take longer than its products."""
FEW_TEXTS = 4
"""Anchor texts below which their mean says too little."""


@dataclass(frozen=True)
class Sample:
    """The rows of one file that it is measured on.

    Args:
        rows: the rows.
        indices: their indices in the tokenized file.
        trained: whether they are rows that were trained: retention is measured then, not generalization.
    """

    rows: Sequence[Row]
    indices: Sequence[int]
    trained: bool

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass over them."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class Subject:
    """A file that may be measured.

    Args:
        key: its SHA-256.
        sample: returns its rows; None where they cannot be read, which was said then.
    """

    key: str
    name: str
    sample: Callable[[], Sample | None]


@dataclass(frozen=True)
class Anchor:
    """The texts that the base wrote.

    Args:
        texts: their tokens, all but the first of each being targets.
        turn: the text that comes first this time, when not all fit.
    """

    texts: Sequence[Row]
    turn: int = 0


class Measuring:
    """Measures one model as far as the allowance goes.

    Args:
        model: what is measured.
        base: makes what measures the base; called when it is first needed.
        allowance: tokens that may be passed forward; None for any number.
    """

    def __init__(self, model: Meter, base: Callable[[], Meter], allowance: int | None) -> None:
        self._model = model
        self._make_base = base
        self._left = allowance
        self.cost = 0
        """Tokens that were passed forward."""
        self.model_scores: dict[str, dict[str, Any]] = {}
        self.base_scores: dict[str, dict[str, Any]] = {}
        self.names: dict[str, str] = {}
        self.anchor: dict[str, Any] | None = None

    def base(self) -> Meter:
        """Return what measures the base; it is made once."""
        return self._base

    @cached_property
    def _base(self) -> Meter:
        return self._make_base()

    def of_model(self, subject: Subject) -> bool:
        """Measure the model on a file; False where that does not fit."""
        return self._score(subject, lambda: self._model, self.model_scores)

    def of_base(self, subject: Subject) -> bool:
        """Measure the base on a file; False where that does not fit."""
        return self._score(subject, lambda: self._base, self.base_scores)

    def all_of_model(self, subjects: Iterable[Subject]) -> None:
        """Measure the model on files in their order, up to the first that does not fit."""
        for subject in subjects:
            if not self.of_model(subject):
                return

    def texts_that_fit(self, rows: int, tokens: int) -> int:
        """Return how many of `rows` anchor texts of so many tokens half of what is left is enough for; 0 if too few."""
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
    """Return how many tokens may be passed forward now: a share of what training cost so far, or what is free.

    Args:
        trained_tokens: tokens trained since the run began.
        spent: tokens passed forward by all measuring before.
        parameters: weights of the model.
    """
    cost = trained_tokens * TRAINING_COST.get(config.method, OF_ADAPTER)
    return max(int(FREE_OPERATIONS / (2 * parameters)), int(config.evaluation.share * cost) - spent)


def in_rotation(keys: Sequence[str], seed: int, step: int) -> list[str]:
    """Return files in their order, beginning with one that is a function of the step."""
    first = fold(seed, "rotation", step) % len(keys) if keys else 0
    return [*keys[first:], *keys[:first]]
