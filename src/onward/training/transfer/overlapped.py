"""Copies from a GPU: behind training, in a number of launches that hardly grows with the number of tensors.

Small tensors are gathered on the device, by the computing stream, and leave it in a few copies on a stream of their
own; so the next step may change them at once. Large ones are copied one by one, and the computing stream waits for
these before it changes a weight. The process waits for nothing; the reader of the copy does.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import call, is_
from typing import Any

import torch

from onward.training.transfer.layout import Form, Layout, Memory, Sizes
from onward.training.transfer.marks import Marks, folded, row_sums
from onward.training.transfer.staging import Stage, stages_of
from onward.training.transfer.ways import Copied


class Overlapped:
    """Copies from a GPU.

    Args:
        streams: `torch.cuda`, or a substitute for it.
        pins: whether copies are pinned.
        sizes: what is gathered.
    """

    def __init__(self, streams: Any = torch.cuda, *, pins: bool = True, sizes: Sizes | None = None) -> None:
        self._streams, self._pins = streams, pins
        self._side: Any = None
        """The stream on which copies are made."""
        self._layout = Layout([], 0, sizes or Sizes())
        self._stages: list[Stage] = []
        self._seen: list[weakref.ref[torch.Tensor]] = []
        """The tensors that the layout was made for. It does not keep them alive."""

    @torch.no_grad()
    def copy(self, weights: Sequence[torch.Tensor], rest: Sequence[torch.Tensor], into: Copied | None = None) -> Copied:
        """Copy after everything computed so far and before what comes next."""
        tensors = [*weights, *rest]
        layout = self._layout_of(tensors, len(weights))
        memory = None if into is None else into.memory
        if memory is None or memory.layout is not layout:
            memory = Memory(layout, pins=self._pins)
        computing, sums = self._streams.current_stream(), list[torch.Tensor]()
        for stage, pieces in zip(self._stages, memory.pieces, strict=True):
            stage.gather(tensors, computing)
            stage.slot.left = self._send(pieces, stage.segments)
            sums += row_sums(stage.filled)  # before another chunk is gathered there
        large = [tensors[number] for number in layout.apart]
        if large or not self._stages:
            done = self._send([memory.tensors[number] for number in layout.apart], large)
        else:
            done = self._stages[-1].slot.left
        for tensor in large:
            sums += row_sums(tensor)  # while they are copied
        if large:
            computing.wait_event(done)
        return Copied(memory.tensors, done.synchronize, folded(sums), memory)

    @torch.no_grad()
    def marks(self, weights: Sequence[torch.Tensor], rest: Sequence[torch.Tensor]) -> Marks:
        """Return a 64-bit number for each device that holds a part of the state."""
        tensors = [*weights, *rest]
        layout = self._layout_of(tensors, len(weights))
        computing, sums = self._streams.current_stream(), list[torch.Tensor]()
        for stage in self._stages:
            stage.gather(tensors, computing)
            sums += row_sums(stage.filled)
        for number in layout.apart:
            sums += row_sums(tensors[number])
        return folded(sums)

    def _send(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Any:
        """Copy on the other stream, after what was computed so far; return the event of its end."""
        self._side.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._side):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            done = self._streams.Event()
            done.record(self._side)
        return done

    def _layout_of(self, tensors: list[torch.Tensor], weights: int) -> Layout:
        """Return the layout of tensors; the last one if the tensors, or their forms, are the same."""
        if len(tensors) == len(self._seen) and all(map(is_, map(call, self._seen), tensors)):
            return self._layout
        self._seen = [weakref.ref(tensor) for tensor in tensors]
        self._side = self._side or self._streams.Stream()
        forms = tuple(map(Form.of, tensors))
        if forms != self._layout.forms or weights != self._layout.weights:
            self._stages = []  # free their memory first
            self._layout = Layout(forms, weights, self._layout.sizes)
            self._stages = stages_of(self._layout, self._side)
        return self._layout
