"""Handovers recorded in the ledger: that the state before the first step of a file is the one that was committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.measuring.handover import HandoverClass, Measurement, class_of_equal, compare, measure
from onward.training.measuring.probe import Probed
from onward.training.state import Snapshot, TrainState

Found: TypeAlias = tuple[HandoverClass, float]
"""The class that holds and the relative difference of the probe's losses, as `compare` returns them."""
_UNPROBED = Probed(0.0, "")
"""A placeholder on both sides for what the probe gives with a state and with its copy, while that is unknown."""


@dataclass(frozen=True)
class Crossing:
    """The place where a state is handed over.

    Args:
        kind: `boundary`, or `resume` after a stop within a file.
        file_id: the file that begins or continues.
    """

    kind: str
    step: int
    file_id: int | None


def keep_handover(
    ledger: Ledger, crossing: Crossing, before: Mapping[str, Any], after: Measurement, found: Found
) -> None:
    """Record a handover: the measurements on both sides, and the class and difference that were found."""
    name, difference = found
    with ledger.without_waiting():
        ledger.add_handover(
            kind=crossing.kind, step=crossing.step, file_id=crossing.file_id, difference=difference, name=name,
            before=json.dumps(before), after=json.dumps(after.to_dict()),
        )  # fmt: skip


@dataclass(frozen=True)
class LateHandover:
    """A handover whose probe is measured where the copy is written, behind the first steps.

    That the state is the one that was copied is found out before those steps; a second probe would tell nothing. The
    record is kept before anything later is committed.

    Args:
        name: the class that holds.
    """

    crossing: Crossing
    name: HandoverClass

    @classmethod
    def of_proven(
        cls, crossing: Crossing, copy: Snapshot, state: TrainState, environment: Mapping[str, Any]
    ) -> Self | None:
        """Return the handover of a state that is proven on its device to be the one that was copied; else None."""
        return cls(crossing, class_of_equal(environment)) if state.is_proven(copy) else None

    @classmethod
    def of_first(cls, crossing: Crossing, copy: Snapshot, state: TrainState, environment: Mapping[str, Any]) -> Self:
        """Return the handover of the state of step 0, whose digests are compared here.

        Raises:
            VerificationFailed: they are not equal.
        """
        before, after = measure(copy, _UNPROBED), measure(state.view(), _UNPROBED)
        return cls(crossing, compare(before.to_dict(), after, environment, environment)[0])

    def keep(self, ledger: Ledger, committed: Manifest) -> None:
        """Record the handover with what was measured of the copy, to which the state was equal."""
        before = committed.measured
        keep_handover(ledger, self.crossing, before, Measurement(**before), (self.name, 0.0))
