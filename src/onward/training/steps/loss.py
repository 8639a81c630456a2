"""The loss: weighted cross-entropy summed over target tokens, so that the parts of a step add up to the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from onward.data.plan.loader import Batch, PaddedBatch, flatten, pad
from onward.training.device.environment import autocast
from onward.training.layers.attention import PADDING_FREE, row_arguments, takes_rows
from onward.training.layers.buffers import Buffers
from onward.training.layers.cross_entropy import linear_cross_entropy
from onward.training.layers.fused_lora import fused_layers, lowered
from onward.training.layers.head import Head, LossOfChunk, Tail, counted_cross_entropy, find_head, scores_of
from onward.training.layers.rope import EVERY_LENGTH, angles_of
from onward.training.layers.varlen import RowKernel, Varlen, kernel_for, to_device
from onward.training.model.adapter import head_weight
from onward.training.model.load import causal_lm, keeps_logits
from onward.training.steps.parts import RowLayout
from onward.training.steps.sizes import Sizes, filled, sizes_of

_Targets: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""For each target: the head's input or output, shape (targets, any); the label; its weight (None for 1 each)."""


@dataclass(frozen=True)
class Placed:
    """The rows of a batch laid end to end, on the computing device.

    Args:
        ids: token ids, int64, shape (tokens,).
        positions: of each token in its row, int64, shape (tokens,).
        before: the index of the token before each target, int64, shape (targets,).
        counts: the weight of each target's loss, float32, shape (targets,); None if each has weight 1.
        rows: keywords that tell attention where rows begin.
        sizes: the sizes that they are filled up to; None if they are not.
        share: what the loss of a part is multiplied by for the mean over its step, float32 scalar.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    before: torch.Tensor
    counts: torch.Tensor | None
    rows: Mapping[str, Any]
    sizes: Sizes | None = None
    share: torch.Tensor | float = 1.0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that differs between parts of the same sizes."""
        given = (self.ids, self.positions, self.before, self.counts, self.rows["row_kernel"].places, self.share)
        return [tensor for tensor in given if isinstance(tensor, torch.Tensor)]

    def copied(self) -> Placed:
        """Return a copy in other memory, which knows the lengths of rows on the device only."""
        kernel: RowKernel = self.rows["row_kernel"]
        rows = {**self.rows, "row_lengths": (), "row_kernel": replace(kernel, places=kernel.places.clone())}
        copies = {
            each.name: value.clone()
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        return replace(self, rows=rows, **copies)


def add_gradients(loss: torch.Tensor) -> None:
    """Add a loss's gradients to those of the weights; there are none if LayerDrop skipped all trained ones."""
    if loss.requires_grad:
        loss.backward()


class TargetLoss:
    """The summed cross-entropy (nats, float32 scalar) of a batch's target tokens.

    Rows are laid end to end if the model keeps them apart (`attention.takes_rows`), else padded to the longest.

    Args:
        dtype: compute type; below float32, the forward pass runs under autocast.
        pad_id: the token that shorter rows are filled with when rows are padded.
        by_length: whether all rows of a part have the same length, for models that padding affects.
        kernel: attends to all rows in one call, if it fits; by default the device's, if it has one.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        pad_id: int = 0,
        *,
        by_length: bool = False,
        kernel: Varlen | None = None,
    ) -> None:
        self.model = model
        self.through: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda compute: compute()
        """Calls the computation of a loss with the weights in place."""
        self.device = device
        self.dtype = dtype
        self.pad_id = pad_id
        self._kernel = kernel or kernel_for(device, dtype)
        if self._kernel is not None:
            self._kernel.prepare(device, dtype)
        self._causal_lm: Any = causal_lm(model)
        self._takes_rows = takes_rows(self._causal_lm)
        self._keeps_logits = keeps_logits(self._causal_lm)
        self._buffers = Buffers(model)
        angles = EVERY_LENGTH if by_length else angles_of(self._causal_lm.config, self._causal_lm)
        self._fused = fused_layers(model)
        self.layout = RowLayout(padded=not self._takes_rows, angles=angles)
        """How a step must be split into parts for this model."""
        known = self._takes_rows and self._causal_lm.config.model_type in PADDING_FREE
        self._head = None if known else self._find_head()

    def __call__(self, batch: Batch | Placed) -> torch.Tensor:
        """Return the loss, with its graph if gradients are enabled.

        All rows must have the same angles (`layout.angles`), as the rows of a part of a step do.

        Args:
            batch: the rows, or what `placed` returned for them.
        """
        self.forget()
        return self.through(partial(self._compute, batch))

    def placed(self, batch: Batch) -> Batch | Placed:
        """Return a batch on the computing device, for losses that nothing is copied for; as it is if it is padded."""
        return self._place(batch) if self._takes_rows else batch

    def sizes(self, lengths: Sequence[int], targets: int) -> Sizes | None:
        """Return the sizes that a part of a step is filled up to; None if it is not."""
        return None if self._kernel is None or not self._takes_rows else sizes_of(lengths, targets, self.parameters)

    def filled(self, batch: Batch, weight: float) -> Batch | Placed:
        """Return a part of a step on the computing device, filled up to round sizes, or as it is if it is not.

        Args:
            weight: the total weight of the targets of the step.
        """
        sizes = self.sizes([len(row.ids) for row in batch.rows], batch.target_tokens)
        if sizes is None:
            return batch
        share = to_device(torch.ones(()) / weight, self.device)
        return replace(self._place(batch, sizes), share=share)

    @cached_property
    def parameters(self) -> int:
        """About how many weights a forward pass multiplies by: all of the model's, once."""
        return sum(weight.numel() for weight in self.model.parameters())

    def _place(self, batch: Batch, sizes: Sizes | None = None) -> Placed:
        flat = flatten(batch) if sizes is None else filled(flatten(batch), sizes)
        shape = None if sizes is None else (sizes.rows, sizes.longest)
        counts = None if flat.weights is None else self._to_device(flat.weights)
        ids, positions, before = map(self._to_device, (flat.input_ids, flat.position_ids, flat.before_targets))
        rows = row_arguments(flat.lengths, self.device, self._kernel, shape)
        return Placed(ids, positions, before, counts, rows, sizes)

    def _compute(self, batch: Batch | Placed) -> torch.Tensor:
        with autocast(self.device, self.dtype), lowered(self._fused, self.dtype):
            rows = batch if isinstance(batch, Placed) else self.placed(batch)
            return self._flat(rows) if isinstance(rows, Placed) else self._padded(rows)

    def _find_head(self) -> Head | None:
        try:
            with autocast(self.device, self.dtype):
                return find_head(self.model, self.device)
        finally:
            self.forget()

    def forget(self) -> None:
        """Restore the model's buffers after forward passes."""
        self._buffers.restore()

    def _to_device(self, values: NDArray[Any]) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self.device)

    def logits(self, batch: Batch | Placed) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits of a batch's targets, float32 (tokens, vocabulary), and their labels, a chunk of tokens at a
        time.

        All rows must have the same angles. Whether gradients are recorded is up to the caller.

        Args:
            batch: the rows, or what `placed` returned for them.
        """
        self.forget()
        yield from self._logits(batch, self._below_head(batch))

    def sum_over_chunks(self, batch: Batch | Placed, loss: LossOfChunk) -> torch.Tensor:
        """Return the sum of a loss over the chunks of `logits`, with its graph, which keeps the logits of no chunk.

        Args:
            loss: returns the loss (scalar) of a chunk from its logits and the places of its targets in the batch.
        """
        self.forget()
        below = self._below_head(batch)
        if below is None:
            ((logits, labels),) = self._logits(batch, None)
            return loss(logits, slice(0, len(labels)))
        head, hidden, _ = below

        def compute(part: torch.Tensor, there: slice) -> torch.Tensor:
            return loss(self._logits_of(head, part), there)

        slices = head.slices(len(hidden))
        if len(slices) == 1:
            return compute(hidden, slices[0])
        return head.in_chunks(hidden, slices[::-1], compute)  # in the order in which autograd adds their gradients

    def scores(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy (nats, float32) of each target of a batch, and whether it has the largest logit.

        Both have shape (targets,); of equal logits, the first counts as the largest. All rows must have the same
        angles.
        """
        self.forget()
        below = self._below_head(batch)
        if below is not None:
            head, hidden, labels = below
            found = head.scores(hidden, labels, self.dtype)
            if found is not None:
                return found
        losses, hits = zip(*(scores_of(*part) for part in self._logits(batch, below)), strict=True)
        return torch.cat(losses), torch.cat(hits)

    def _logits(
        self, batch: Batch | Placed, below: tuple[Head, torch.Tensor, torch.Tensor] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if below is None:
            assert isinstance(batch, Batch)
            with autocast(self.device, self.dtype), lowered(self._fused, self.dtype):
                logits, labels, _ = self._chosen_logits(batch)
            yield logits, labels
            return
        head, hidden, labels = below
        for there in head.slices(len(hidden)):
            yield self._logits_of(head, hidden[there]), labels[there]

    def _logits_of(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.dtype):
            return head.logits(hidden)

    def _below_head(self, batch: Batch | Placed) -> tuple[Head, torch.Tensor, torch.Tensor] | None:
        """Return the head, its input for each target, and the labels; None if the model computes all logits itself."""
        if not self._takes_rows and self._head is None:
            return None
        with autocast(self.device, self.dtype), lowered(self._fused, self.dtype):
            hidden, labels, _ = self._hidden(batch)
        return self._head or Head(self._causal_lm.get_output_embeddings(), Tail()), hidden, labels

    def _hidden(self, batch: Batch | Placed) -> _Targets:
        """Return the head's input for each target, shape (targets, width), the labels, and the weights."""
        rows = batch if isinstance(batch, Placed) else self.placed(batch)
        return self._flat_hidden(rows) if isinstance(rows, Placed) else self._padded_hidden(rows)

    def _flat_hidden(self, rows: Placed) -> _Targets:
        model = self.model if self._head is not None else self._causal_lm.base_model
        forward = partial(
            model, input_ids=rows.ids[None], position_ids=rows.positions[None], use_cache=False, **rows.rows
        )
        hidden = self._head.hidden(forward) if self._head is not None else forward().last_hidden_state
        return hidden[0].index_select(0, rows.before), rows.ids[rows.before + 1], rows.counts

    def _flat(self, rows: Placed) -> torch.Tensor:
        hidden, labels, counts = self._flat_hidden(rows)
        if self._head is not None:
            return self._head.loss(hidden, labels, self.dtype, counts)
        head = self._causal_lm.get_output_embeddings()
        weight = head_weight(head)
        if weight is not None:
            return linear_cross_entropy(hidden, weight, labels, self.dtype, counts)
        return counted_cross_entropy(head(hidden).float(), labels, counts)

    def _padded_inputs(self, batch: Batch) -> tuple[Callable[..., Any], torch.Tensor, PaddedBatch]:
        padded = pad(batch, self.pad_id)
        ids, mask = map(self._to_device, (padded.input_ids, padded.attention_mask))
        return partial(self.model, input_ids=ids, attention_mask=mask, use_cache=False), ids, padded

    def _counts(self, padded: PaddedBatch) -> torch.Tensor | None:
        return None if padded.weights is None else self._to_device(padded.weights[padded.targets])

    def _padded_hidden(self, batch: Batch) -> _Targets:
        assert self._head is not None
        forward, ids, padded = self._padded_inputs(batch)
        wanted = torch.from_numpy(padded.targets[:, 1:])
        before = to_device(torch.nonzero(functional.pad(wanted, (0, 1)).reshape(-1)).squeeze(1), self.device)
        hidden = self._head.hidden(forward)
        return hidden.flatten(0, 1).index_select(0, before), ids.reshape(-1)[before + 1], self._counts(padded)

    def _padded(self, batch: Batch) -> torch.Tensor:
        if self._head is None:
            return counted_cross_entropy(*self._chosen_logits(batch))
        hidden, labels, counts = self._padded_hidden(batch)
        return self._head.loss(hidden, labels, self.dtype, counts)

    def _chosen_logits(self, batch: Batch) -> _Targets:
        """Return logits, labels and weights of targets from a model that computes its logits itself."""
        forward, ids, padded = self._padded_inputs(batch)
        wanted = torch.from_numpy(padded.targets[:, 1:])
        columns = wanted.any(dim=0).nonzero().squeeze(1)
        rows, places = wanted[:, columns].nonzero(as_tuple=True)  # here, where it waits for no device
        kept, row, place, label = (
            to_device(each, self.device) for each in (columns, rows, places, columns[places] + 1)
        )
        extra: dict[str, Any] = {"logits_to_keep": kept} if self._keeps_logits else {}
        logits = forward(**extra).logits
        if not self._keeps_logits:
            logits = logits[:, kept]
        return logits[row, place].float(), ids[row, label], self._counts(padded)
