"""8-bit moments that another tool saved: those of bitsandbytes' AdamW continue as `optimizer: adamw_8bit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from onward.training.foreign.refusal import NotTaken
from onward.training.optimizers import ADAMW_8BIT
from onward.training.optimizers.adamw_8bit import WRAPPED
from onward.training.optimizers.blockwise import is_rounded
from onward.training.state import TrainState

RENAMED = {"exp_avg": "state1", "exp_avg_sq": "state2"}


def is_of_8_bits(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry holds moments that are rounded to 256 values."""
    flat = {**entry, **cast(Mapping[str, Any], entry.get(WRAPPED, {}))}
    return any(name.startswith(("qmap", "absmax")) for name in flat)


def as_adamw_8bit(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry in the form of `adamw_8bit`.

    Raises:
        NotTaken: it belongs to another optimizer.
    """
    try:
        found = ADAMW_8BIT.from_file(entry)
    except (KeyError, ValueError) as error:
        raise NotTaken(f"the moments are those of an 8-bit optimizer: {error}") from None
    if not {ADAMW_8BIT.counter, *ADAMW_8BIT.slots} <= set(found):
        raise NotTaken(f"the optimizer's state is not that of AdamW: it keeps {', '.join(sorted(found))}")
    return found


def as_small(state: TrainState, entries: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]] | None:
    """Return AdamW's entries as those of `adamw_8bit`; None if that would keep 8-bit moments of any weight.

    If every weight is small, a tool's file does not show which of the two it was.
    """
    if any(is_rounded(weight) for weight in state.parameters.values()):
        return None
    return {key: {RENAMED.get(slot, slot): value for slot, value in entry.items()} for key, entry in entries.items()}
