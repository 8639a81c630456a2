"""What an admission found, as a plain record that the run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from onward.training.model.treatment import Treatment

FACT = "admission"
"""The fact of the ledger under which a run keeps its findings."""

END_TO_END, PADDED, BY_LENGTH = "end to end", "padded", "by length"
LAID = {
    END_TO_END: "rows are packed end to end",
    PADDED: "rows are padded",
    BY_LENGTH: "rows are computed together with rows of equal length",
}
"""How the rows of a step are laid out, in words."""

REFUSABLE = "a new run would be refused"
"""How a line begins that says what is wrong in a run that goes on all the same."""


@dataclass(frozen=True)
class Findings:
    """What was proven of a model on small inputs, and what was left out.

    Args:
        rows: `end to end`, `padded` or `by length` (no row is filled up): how the rows of a step are laid out.
        why_padded: what speaks against laying rows end to end; empty where they are.
        difference: the largest relative difference of a gradient from that of plain transformers, row by row.
        trained: trained weights, in numbers.
        reach: share of the weights outside embeddings and head that is trained or has an adapter.
        left_out: what no gradient reaches or PEFT does not load back: modules for an adapter, weights where all are
            trained.
        unreached: large matrices (experts) that have no adapter, by the end of their names.
        settings: config keys that were given another value than their default, since the default does not work.
        warnings: what would refuse a new run, in a run that has trained already.
        environment: versions and device that this was found with.
        seconds: how long it took, the loading of the model aside.
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

    @property
    def treatment(self) -> Treatment:
        """How the model is treated from now on."""
        return Treatment(self.rows == END_TO_END, self.left_out, self.rows == BY_LENGTH)

    def writers_in(self, environment: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return what writes to weights in evaluation mode; None where it was found in another environment."""
        same = all(environment.get(key) == value for key, value in self.environment.items())
        return self.writers if same else None

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return {**asdict(self), "settings": dict(self.settings), "environment": dict(self.environment)}

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self | None:
        """Return the findings that a ledger kept; None where it kept none."""
        if values is None:
            return None
        lists: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def lines(self) -> list[str]:
        """Return what a person should know, one line each; the first one sums up."""
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
"""What a GPU without bfloat16 does, by compute type."""


def _of_machine(environment: Mapping[str, Any]) -> list[str]:
    """Return what is to be known of type and device of a model, where it is not the usual."""
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
    """Return names for a line of text, layer numbers as `*`, at most some of them."""
    patterns = list(dict.fromkeys(pattern_of(name) for name in names))
    more = f" and {len(patterns) - at_most} more" if len(patterns) > at_most else ""
    return f"{', '.join(patterns[:at_most])}{more}"


def pattern_of(name: str) -> str:
    """Return a name with every number in it as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
