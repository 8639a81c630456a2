"""Gradients of the parts of a step on a GPU, replayed where a part has the sizes of earlier ones.

The first two parts of any sizes are computed as usual. So is the third, which is also recorded; what the replay gives
must have the same bits. For the first recording, that must hold for the fourth part too, with other rows and other
random numbers, before replays are trusted. One bit that differs, too little memory or an operation that cannot be
recorded, and nothing is recorded any more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn

from onward.errors import first_line
from onward.training.device.errors import forget_frames
from onward.training.layers.recording import Recorder, Replay, Watch, is_held
from onward.training.steps.gradients import added, put, taken

SEEN = 2
"""After how many parts of the same sizes they are recorded, which takes about as long as two of them."""
PROOFS = 2
"""How many parts must have been computed both ways, with equal bits, for the first recording; for others, one."""
MOST = 64
"""The most recordings of a process; each takes some memory of the host and of the driver."""
ALIGNED = 64
"""Gradients begin at multiples of this many numbers, as separate tensors would: sums over them depend on it."""


class Given(Protocol):
    """What a part is computed from, on the device."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that differs between parts of the same kind."""
        ...

    def copied(self) -> Self:
        """Return a copy in other memory."""
        ...


Compute = Callable[[Any], torch.Tensor]
"""Adds the gradients of a part to those of the weights, and returns its loss (scalar)."""
Context = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a part is computed: with its seed, deterministic."""


@dataclass
class _Known:
    """What is known of parts of the same sizes."""

    seen: int = 0
    proofs: int = 0
    inputs: Given | None = None
    replay: Replay[torch.Tensor] | None = None


class RecordedParts:
    """Computes parts of steps, from recordings if it can.

    Args:
        weights: the trained weights; their memory must stay where it is.
        recorder: records, into memory that all recordings share.
    """

    def __init__(self, weights: Sequence[nn.Parameter], recorder: Recorder) -> None:
        self._weights, self._recorder = list(weights), recorder
        self._places = self._now()
        self._known: dict[Hashable, _Known] = {}
        self._flat: torch.Tensor | None = None
        self._gradients: list[torch.Tensor] = []
        self._watched_types: set[type] = set()
        self._is_proven = False
        self.was_tried = False
        """Whether something was to be recorded; if not, it was found before that nothing can be."""
        self.replays = 0
        """How many parts were replayed, not counting those that were computed as usual too."""
        self.hindrance = ""
        """Why nothing is recorded any more; empty as long as something may be."""

    def add(self, part: Given, compute: Compute, context: Context, kind: Hashable, *, alone: bool) -> torch.Tensor:
        """Add the gradients of a part to those of the weights, and return its loss.

        Args:
            compute: does it as usual.
            kind: what the computation depends on besides the part: its sizes and settings.
            alone: whether no other part is computed before the gradients are used.
        """
        known = self._known.setdefault(kind, _Known())
        known.seen += 1
        if not self.hindrance and type(part) not in self._watched_types:
            return self._watched(part, compute, context)
        if not self.hindrance and self._now() != self._places:
            self.forget("the weights are elsewhere")
        if self.hindrance or (known.replay is None and not self._begins(known)):
            return self._plain(part, compute, context)
        if known.proofs < (1 if self._is_proven else PROOFS):
            return self._proven(known, part, compute, context)
        try:
            loss = self._replayed(known, part, context)
        except Exception as error:  # another recording failed, for example; nothing was added yet
            self._forget(error)
            return self._plain(part, compute, context)
        self.replays += 1
        self._keep(alone=alone)
        return loss

    @property
    def keeps_some(self) -> bool:
        """Whether there are recordings, which keep memory."""
        return self._flat is not None

    def forget(self, why: str) -> None:
        """Forget all recordings, and record nothing any more; their memory is free then."""
        self.hindrance = why
        self._known.clear()
        self._flat, self._gradients = None, []

    def _forget(self, error: Exception) -> None:
        self.forget(f"{type(error).__name__}: {first_line(error)}")
        forget_frames(error)  # they hold what was allocated for the recording

    def _now(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]

    def _are_held(self) -> bool:
        """Whether an earlier computation holds a weight, not only until Python frees what refers to itself."""
        if any(map(is_held, self._weights)):
            gc.collect()
        return any(map(is_held, self._weights))

    def _begins(self, known: _Known) -> bool:
        recorded = sum(each.replay is not None for each in self._known.values())
        return known.seen > SEEN and recorded < MOST

    def _plain(self, part: Given, compute: Compute, context: Context) -> torch.Tensor:
        with context():
            return compute(part)

    def _watched(self, part: Given, compute: Compute, context: Context) -> torch.Tensor:
        self._watched_types.add(type(part))
        watch, before = Watch(self._weights[0].device, draws=True), taken(self._weights)
        same = part.copied()  # what is recorded is computed from a copy, too
        try:
            with context(), watch:
                loss = compute(same)
        except Exception as error:  # something cannot be watched; if it was something else, that is raised again
            self._forget(error)
            taken(self._weights)
            loss = self._plain(part, compute, context)
        if watch.hindrance and not self.hindrance:
            self.forget(watch.hindrance)
        put(self._weights, added(before, taken(self._weights)))
        return loss

    def _proven(self, known: _Known, part: Given, compute: Compute, context: Context) -> torch.Tensor:
        """Compute a part both ways; what counts is what is computed as usual."""
        before = taken(self._weights)
        loss = self._plain(part, compute, context)
        usual = taken(self._weights)
        try:
            if any(gradient is None for gradient in usual):
                raise RuntimeError("a part does not reach all weights")
            if known.replay is None and self._are_held():
                raise RuntimeError("an earlier computation holds a weight")
            if known.replay is None:
                self._record(known, part, compute, context)
            replayed = self._replayed(known, part, context)
            same = _same([loss, *usual], [replayed, *self._gradients])
        except Exception as error:  # too little memory, for example; the part is computed already
            self._forget(error)
        else:
            known.proofs += 1
            self._is_proven |= known.proofs == PROOFS
            if not same:
                self.forget("a replay gave other bits")
        put(self._weights, added(before, usual))
        return loss

    def _record(self, known: _Known, part: Given, compute: Compute, context: Context) -> None:
        self.was_tried = True
        if self._flat is None:
            self._flat, self._gradients = _laid_out(self._weights)
        inputs = known.inputs = part.copied()

        def whole() -> torch.Tensor:
            loss = compute(inputs)
            found = taken(self._weights)
            torch._foreach_copy_(self._gradients, found)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            return loss

        with context():
            known.replay = self._recorder(whole)

    def _replayed(self, known: _Known, part: Given, context: Context) -> torch.Tensor:
        assert known.inputs is not None
        assert known.replay is not None
        for target, source in zip(known.inputs.tensors, part.tensors, strict=True):
            target.copy_(source)
        with context():
            return known.replay().clone()

    def _keep(self, *, alone: bool) -> None:
        """Add the gradients of a replay to those of the weights; a later replay overwrites its own."""
        assert self._flat is not None
        before = taken(self._weights)
        is_added = all(gradient is not None for gradient in before)
        found = self._gradients if alone or is_added else _views(self._flat.clone(), self._weights)
        put(self._weights, added(before, found))


def _laid_out(weights: Sequence[nn.Parameter]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    size = sum(_room(weight) for weight in weights)
    flat = torch.zeros(size, dtype=weights[0].dtype, device=weights[0].device)
    return flat, _views(flat, weights)


def _views(flat: torch.Tensor, weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    pieces = flat.split([_room(weight) for weight in weights])
    return [piece[: weight.numel()].view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)]


def _room(weight: nn.Parameter) -> int:
    return -(-weight.numel() // ALIGNED) * ALIGNED


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether tensors have the same bits."""
    pairs = zip(some, others, strict=True)
    return all(torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in pairs)
