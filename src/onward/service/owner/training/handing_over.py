"""Handovers recorded in the ledger: that the state before the first step of a file is the one that was committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.measuring.handover import GRADIENT, HandoverClass, Measurement, compare, measure
from onward.training.measuring.probe import Probed
from onward.training.state import Snapshot

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


class FirstHandover:
    """The handover of the state of step 0 while its copy is being committed; the two are compared at once.

    Nothing was trained yet that a second probe could reveal, so only one is computed. It is measured where the copy is
    written, behind the first steps, and recorded with the handover before anything later is committed.

    Args:
        copied: the copy.
        now: the state.

    Raises:
        VerificationFailed: they are not equal.
    """

    def __init__(self, crossing: Crossing, copied: Snapshot, now: Snapshot, environment: Mapping[str, Any]) -> None:
        self._crossing = crossing
        self._after = measure(now, _UNPROBED)
        self._found: Found = compare(measure(copied, _UNPROBED).to_dict(), self._after, environment, environment)

    @property
    def name(self) -> str:
        """The class that holds."""
        return self._found[0]

    def keep(self, ledger: Ledger, committed: Manifest) -> None:
        """Record the handover with what was measured of the copy."""
        before = committed.measured
        after = replace(self._after, probe_loss=before["probe_loss"], probe_gradient=before[GRADIENT])
        keep_handover(ledger, self._crossing, before, after, self._found)
