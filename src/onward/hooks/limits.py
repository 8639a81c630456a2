"""What the guard judges a file by: losses on earlier files, distance from the base, the usual range of its steps.

A step's loss and gradient norm are judged by robust z-scores (distance from the median in units of the median absolute
deviation, scaled to the standard deviation of a normal distribution; Iglewicz and Hoaglin, "How to Detect and Handle
Outliers", 1993) over the earlier steps of the same file: a new domain begins with another loss than the previous file
had, and that is not a fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 50
"""How many preceding steps of the file the usual range of a step is taken from, at most."""

WARM_UP = 20
"""How many steps of a file precede the first one that is judged."""

RUNNING = 3
"""How many steps in a row have to be outside the range: one alone may be a hard batch."""

NORMAL = 1.4826
"""The standard deviation of a normal distribution in median absolute deviations."""

LEAST = 0.05
"""The smallest share of the median that counts as one deviation, so that nearly constant losses get no tight range."""


@dataclass(frozen=True)
class Limits:
    """What a file may do; None for a limit that is off.

    Args:
        forgetting: the share by which the loss on the rows of any earlier file may grow, for each file trained.
        anchor: how much the KL divergence from the base may grow, in nats per token, for each file trained.
        spike: the robust z-score that neither loss nor gradient norm may exceed for several steps in a row.
        answers: how many standard errors better answers must fit their own questions than others.
    """

    forgetting: float | None = None
    anchor: float | None = None
    spike: float | None = None
    answers: float | None = None


@dataclass(frozen=True)
class Finding:
    """A limit that was exceeded: what was found, in words, and the position of the earlier file that suffered."""

    text: str
    position: int | None = None


def grown(
    before: Mapping[int, float],
    after: Mapping[int, float],
    limits: Limits,
    base: Mapping[int, float] | None = None,
    files: Mapping[int, int] | None = None,
) -> Iterator[Finding]:
    """Yield the earlier files whose loss grew by more than the limit, the worst first; one that is not finite grew.

    A file whose loss is far below that of the base, because little but its form was new, fluctuates by more than its
    low loss suggests: its growth is judged relative to the gain over the base, if that is larger.

    Args:
        before: loss of each file, by position, at the previous boundary.
        after: the same at this boundary; files missing from either are not judged.
        base: the same for the base model, as far as it is known.
        files: how many files were trained since the loss before was measured, where that is more than one.
    """
    if limits.forgetting is None:
        return
    gained = {position: loss - before[position] for position, loss in (base or {}).items()}
    whole = {position: max(before[position], gained.get(position, 0.0)) for position in before if position in after}
    grew = {position: after[position] - before[position] for position in whole}
    grew = {position: more if math.isfinite(after[position]) else math.inf for position, more in grew.items()}
    growth = {position: grew[position] / loss for position, loss in whole.items() if loss > 0}
    for position, share in sorted(growth.items(), key=lambda pair: -pair[1]):
        if share == math.inf:
            yield Finding(f"loss on file {position} is no longer finite, after {before[position]:.4f}", position)
        elif share > limits.forgetting * (count := (files or {}).get(position, 1)):
            change = f"{before[position]:.4f} to {after[position]:.4f}"
            of_what = "" if whole[position] == before[position] else " of what it had gained over the base"
            over, each = _over(count)
            limit = f"limit {limits.forgetting:.0%}{each}"
            yield Finding(
                f"loss on file {position} grew by {share:.0%}{of_what}{over}, from {change} ({limit})", position
            )


def moved_away(before: float | None, after: float | None, limits: Limits, files: int = 1) -> Iterator[Finding]:
    """Yield a finding if the model moved away from its base by more than the limit, in nats per token.

    Args:
        files: how many files were trained since `before` was measured.
    """
    if limits.anchor is None or after is None:
        return
    growth = after - (before or 0.0)
    if not growth <= limits.anchor * files:  # one that is no number grew
        over, each = _over(files)
        limit = f"limit {limits.anchor:g}{each}"
        yield Finding(f"KL from the base grew by {growth:.3f} nats per token{over}, to {after:.3f} ({limit})")


def _over(files: int) -> tuple[str, str]:
    """Return what a finding says of its growth and of its limit, if that is of several files."""
    return (f" over {files} files", " for each") if files > 1 else ("", "")


def unanswered(judged: Mapping[str, Any] | None, limits: Limits) -> Iterator[Finding]:
    """Yield a finding if the answers of a file say nothing, or do not belong to their questions.

    Args:
        judged: what `answers.judged` found before the file's first step; None or without its keys if it did not run.
    """
    if limits.answers is None or judged is None or "same" not in judged:
        return
    if judged["same"]:
        yield Finding(f"its rows all say the same ({judged['rows']} were checked)")
    elif judged["known"] and judged["z"] < limits.answers:
        yield Finding(
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
    """Judge the newest steps of a file against those before them; return None while all is in the usual range.

    The result is a function of the file's own steps, so a resumed process finds what an uninterrupted one does.

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
                f"{what} left its usual range at step {newest[0].step}: {getattr(newest[-1], name):.4f}, "
                f"median before {median(values):.4f} (robust z {min(scores):.1f}, limit {limits.spike:g})",
            )
    return None


def robust_z(value: float, usual: Sequence[float]) -> float:
    """Return how many deviations a value is above the median of others; infinity if the value is not finite."""
    if not math.isfinite(value):
        return math.inf
    middle = median(usual)
    deviation = NORMAL * median(abs(other - middle) for other in usual)
    return (value - middle) / max(deviation, LEAST * abs(middle), 1e-12)
