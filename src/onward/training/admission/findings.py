"""What an admission found, as a plain record that the run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from onward.training.device.environment import differences
from onward.training.model.treatment import Treatment

FACT = "admission"
"""The ledger's fact in which a run keeps its findings."""

END_TO_END, PADDED, BY_LENGTH = "end to end", "padded", "by length"
LAID = {
    END_TO_END: "rows are laid end to end",
    PADDED: "rows are padded",
    BY_LENGTH: "rows are computed together with rows of equal length",
}
"""Descriptions of how the rows of a step are laid out, from the one that asks most of a model to the one that asks
least."""

DEPENDS_ON = ("device", "dtype", "capability", "torch", "transformers", "peft", "libraries")
"""Facts of an environment with which a proof may come out otherwise."""

REFUSABLE = "a new run would be refused"
"""The beginning of a line about a problem in a run that continues nevertheless."""


@dataclass(frozen=True)
class Findings:
    """What was proven about a model on small inputs, and what was left out.

    Args:
        rows: how the rows of a step are laid out: `end to end`, `padded`, or `by length` (no row is padded).
        why_padded: the reason against laying rows end to end; empty if they are.
        difference: the largest relative difference of a gradient from that of plain transformers, row by row.
        trained: the number of trained weights.
        reach: the share of the weights outside embeddings and head that are trained or have an adapter.
        left_out: what no gradient reaches or PEFT does not load back: modules for an adapter, weights in full training.
        unreached: large matrices (experts) without an adapter, by the ends of their names.
        settings: config keys that were given another value because their default does not work.
        warnings: what would refuse a new run, if this one has trained already.
        environment: the versions and the device with which this was found.
        seconds: how long it took, without loading the model.
        writers: types of modules that write to weights in evaluation mode; None in findings of earlier releases.
    """

    rows: str
    why_padded: str
    difference: float
    trained: int
    reach: float
    left_out: tuple[str, ...]
    unreached: tuple[str, ...]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]
    seconds: float
    writers: tuple[str, ...] | None = None

    def changes_to(self, environment: Mapping[str, Any]) -> str:
        """Return in words what the proof depends on that is different in an environment; empty if nothing is."""
        before, here = (
            {key: each[key] for key in DEPENDS_ON if key in each} for each in (self.environment, environment)
        )
        return differences(before, here)

    def confirmed(self, found: Self) -> Self:
        """Return these findings of a run that has trained, proven again.

        Its weights stay those that it has, and its rows are laid out as before, unless that is not proven any more.

        Args:
            found: what the proof found now.
        """
        rows = max(self.rows, found.rows, key=list(LAID).index)
        why = found.why_padded if rows == found.rows else self.why_padded
        return replace(
            self, rows=rows, why_padded=why, difference=found.difference, warnings=(), environment=found.environment,
            seconds=found.seconds, writers=found.writers,
        )  # fmt: skip

    @property
    def treatment(self) -> Treatment:
        """How the model is treated from now on."""
        return Treatment(self.rows == END_TO_END, self.left_out, self.rows == BY_LENGTH)

    def writers_in(self, environment: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return what writes to weights in evaluation mode; None if that was found in another environment."""
        same = all(environment.get(key) == value for key, value in self.environment.items())
        return self.writers if same else None

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return {**asdict(self), "settings": dict(self.settings), "environment": dict(self.environment)}

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self | None:
        """Return the findings that a ledger kept; None if there are none."""
        if values is None:
            return None
        lists: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def lines(self) -> list[str]:
        """Return what the user should know, in lines; the first one is a summary."""
        rows = LAID[self.rows]
        lines = [
            "the model passed: it attends only to earlier tokens, a step's gradients are those of its rows in plain "
            f"transformers; {rows}, {self.reach:.0%} of its layers' weights are trained or have an adapter"
        ]
        if self.why_padded:
            lines.append(f"{LAID[self.rows]}: {self.why_padded}")
        lines += [
            f"{key} is {value} in this run: its default does not work here" for key, value in self.settings.items()
        ]
        if self.left_out:
            lines.append(
                f"left out (no gradient reaches them, or PEFT does not load them back): {named(self.left_out)}"
            )
        if self.unreached:
            lines.append(f"without an adapter: {named(self.unreached)}")
        lines += _of_machine(self.environment)
        return lines + [f"{REFUSABLE}: {warning}" for warning in self.warnings]


NO_BFLOAT16 = {
    "float32": "computes in float32; to use its float16 hardware, make a new run with --set dtype=float16",
    "bfloat16": "emulates bfloat16, which is slow",
}
"""What a GPU without bfloat16 does instead, by compute type."""


def _of_machine(environment: Mapping[str, Any]) -> list[str]:
    """Return what the user should know about the type and the device of a model, if they are unusual."""
    lines: list[str] = []
    capability = environment.get("capability")
    if capability is not None and not environment.get("bfloat16", True):
        how = NO_BFLOAT16.get(environment["dtype"], "computes in float16")
        lines.append(f"this GPU (compute capability {capability}) has no hardware for bfloat16 and {how}")
    if environment.get("device") == "mps":
        lines.append("equal bits are not promised on an Apple GPU: handovers are `close` at most")
    if not environment.get("deterministic", True):
        lines.append("nondeterministic operations are allowed: handovers say `not deterministic`")
    return lines


def named(names: tuple[str, ...], at_most: int = 4) -> str:
    """Return names as text, with layer numbers as `*`, at most `at_most` of them."""
    patterns = list(dict.fromkeys(pattern_of(name) for name in names))
    more = f" and {len(patterns) - at_most} more" if len(patterns) > at_most else ""
    return f"{', '.join(patterns[:at_most])}{more}"


def pattern_of(name: str) -> str:
    """Return a name with every number in it as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
