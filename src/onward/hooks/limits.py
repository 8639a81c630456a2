"""What a guard holds a file against: losses on earlier files, distance from the base, the usual range of its steps.

A step's loss and gradient norm are judged by robust z-scores (distance from the median in units of the median absolute
deviation, scaled to the standard deviation of a normal distribution; Iglewicz and Hoaglin, "How to Detect and Handle
Outliers", 1993) over the steps of the same file before it: a new domain begins with another loss than the file before
had, and that is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Kind = Literal["forgetting", "anchor", "spike", "answers"]

WINDOW = 50
"""Steps of the file before a step that its usual range is taken from, at most."""

WARM_UP = 20
"""Steps of a file before the first that is judged."""

RUNNING = 3
"""Steps in a row that have to lie outside of the range: one alone may be a hard batch."""

NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

LEAST = 0.05
"""Least share of the median that counts as one deviation: a file whose losses hardly differ has no tight range."""


@dataclass(frozen=True)
class Limits:
    """What a file may do; None for a limit that is off.

    Args:
        forgetting: by which share the loss on the rows of any earlier file may grow.
        anchor: by how much the KL divergence from the base, in nats a token, may grow.
        spike: robust z-score that neither loss nor gradient norm may pass for several steps running.
        answers: by how many standard errors answers must fit their own questions better than others.
    """

    forgetting: float | None = None
    anchor: float | None = None
    spike: float | None = None
    answers: float | None = None


@dataclass(frozen=True)
class Finding:
    """A limit that was passed: what was found, for a person, and the earlier file that suffered, by position."""

    kind: Kind
    text: str
    position: int | None = None


def grown(
    before: Mapping[int, float], after: Mapping[int, float], limits: Limits, base: Mapping[int, float] | None = None
) -> Iterator[Finding]:
    """Yield the earlier files whose loss grew by more than the limit, the worst first.

    A file that lies far below its base, because little but its form was new, swings by more than its low loss says: its
    growth is held against what was gained over the base, where that is more.

    Args:
        before: loss of each file, by position, at the boundary before.
        after: the same at the boundary in question; files that one of them lacks are not judged.
        base: the same of the base model, as far as it is known.
    """
    if limits.forgetting is None:
        return
    gained = {position: max(0.0, loss - before[position]) for position, loss in (base or {}).items()}
    whole = {position: max(before[position], gained.get(position, 0.0)) for position in before if after.get(position)}
    growth = {position: (after[position] - before[position]) / whole[position] for position in whole}
    for position, share in sorted(growth.items(), key=lambda pair: -pair[1]):
        if share > limits.forgetting:
            change = f"{before[position]:.4f} to {after[position]:.4f}"
            of_what = "" if whole[position] == before[position] else " of what it had gained over the base"
            yield Finding(
                "forgetting",
                f"loss on file {position} grew by {share:.0%}{of_what}, from {change} (limit {limits.forgetting:.0%})",
                position,
            )


def moved_away(before: float | None, after: float | None, limits: Limits) -> Iterator[Finding]:
    """Yield whether the model moved away from its base by more than the limit, in nats a token."""
    if limits.anchor is None or after is None:
        return
    growth = after - (before or 0.0)
    if growth > limits.anchor:
        text = f"KL from the base grew by {growth:.3f} nats per token, to {after:.3f} (limit {limits.anchor:g})"
        yield Finding("anchor", text)


def unanswered(judged: Mapping[str, Any] | None, limits: Limits) -> Iterator[Finding]:
    """Yield whether the answers of a file say nothing, or do not belong to their questions.

    Args:
        judged: what `answers.judged` found before the file's first step; None or without its keys where nothing was.
    """
    if limits.answers is None or judged is None or "same" not in judged:
        return
    if judged["same"]:
        yield Finding("answers", f"its rows all say the same ({judged['rows']} were checked)")
    elif judged["known"] and judged["z"] < limits.answers:
        yield Finding(
            "answers",
            f"its answers fit the questions of other rows as well as their own ({judged['rows']} rows: "
            f"{judged['z']:.1f} standard errors better, limit {limits.answers:g}); "
            "the model can tell those of earlier files apart",
        )


@dataclass(frozen=True)
class Judged:
    """A step of the file as a guard sees it: its loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float


def spiked(steps: Sequence[Judged], limits: Limits) -> Finding | None:
    """Judge the newest steps of a file against those before them; None while all is in its usual range.

    It is a function of the file's own steps, so that a resumed process finds what an uninterrupted one does.

    Args:
        steps: the file's steps so far, in order; the last `WINDOW + RUNNING` are enough.
    """
    if limits.spike is None or len(steps) < WARM_UP + RUNNING:
        return None
    newest, usual = steps[-RUNNING:], steps[-RUNNING - WINDOW : -RUNNING]
    for name in ("loss", "grad_norm"):
        values = [float(getattr(step, name)) for step in usual]
        scores = [robust_z(float(getattr(step, name)), values) for step in newest]
        if min(scores) > limits.spike:
            what = name.replace("grad_norm", "gradient norm")
            return Finding(
                "spike",
                f"{what} left its usual range at step {newest[0].step}: {getattr(newest[-1], name):.4f}, "
                f"median before {median(values):.4f} (robust z {min(scores):.1f}, limit {limits.spike:g})",
            )
    return None


def robust_z(value: float, usual: Sequence[float]) -> float:
    """Return how many deviations a value lies above the median of others; infinite where it is not finite."""
    if not math.isfinite(value):
        return math.inf
    middle = median(usual)
    deviation = NORMAL * median(abs(other - middle) for other in usual)
    return (value - middle) / max(deviation, LEAST * abs(middle), 1e-12)
