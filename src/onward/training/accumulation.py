"""The gradients of a step: of its parts, share by share, and of the anchor's texts, in the memory that there is."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from itertools import groupby

import torch

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.training.device.environment import deterministic, release_freed_memory
from onward.training.device.errors import caused_by_no_row, forget_frames, is_out_of_memory
from onward.training.device.execution import Execution
from onward.training.ranks.exchange import exchange_of
from onward.training.seeds import seeded
from onward.training.state import TrainState
from onward.training.steps.anchor import AnchorTerm, PlacedTexts
from onward.training.steps.economy import Economy, Learned
from onward.training.steps.loss import Placed, TargetLoss, add_gradients
from onward.training.steps.parts import Part, parts_of
from onward.training.steps.recorded_parts import RecordedParts


class Accumulation:
    """Accumulates the gradients of steps in the weights of a state.

    Args:
        learned: what the process already knows about the model.
    """

    def __init__(
        self, state: TrainState, config: Config, execution: Execution, anchor: AnchorTerm | None, learned: Learned
    ) -> None:
        assert learned.loss is None or learned.loss.model is state.model, "what was learned is of another model"
        self.state = state
        self.config = config
        self.anchor = anchor
        self.execution = execution
        self.world = execution.world
        self.exchange = execution.placement or exchange_of(execution.world, config.exchange)
        self.loss = self._loss(learned)
        self.economy = Economy(state, self.loss, config, execution.world.device, learned)

    def _loss(self, learned: Learned) -> TargetLoss:
        execution = self.execution
        if execution.placement is not None:
            return execution.placement.loss
        if learned.loss is None:  # it walks through the whole model
            device, by_length = execution.world.device, execution.by_length
            model, pad_id = self.state.model, execution.pad_id
            learned.loss = TargetLoss(model, device, execution.dtype, pad_id, by_length=by_length)
        return learned.loss

    def gradients(self, batch: Batch, *, factor: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Accumulate the gradient of the mean loss (nats) over the step's targets by weight, and of the anchor's term.

        If memory runs out, everything is repeated without recordings, then with recomputation, to the same bits.

        Args:
            factor: what the gradient, but no loss, is multiplied by.

        Returns:
            that loss, and what sums up to the anchor's divergence.
        """
        parts = parts_of(batch, self.config, self.state.step, self.loss.layout)
        again: Sequence[bool] | None
        with self.world.together():
            texts = [] if self.anchor is None else self.anchor.placed(self.loss, self.state.step, self.config)
            again = self._recomputed([part.batch for part in parts], [text.batch for text in texts])
        while True:
            is_anchored = False
            try:
                total = self._accumulate(parts, again[: len(parts)], batch.weight, factor)
                if self.anchor is None:
                    return total, []
                is_anchored = True
                with self.world.together():
                    return total, self._anchor_gradients(self.anchor, texts, again[len(parts) :], factor)
            except Exception as error:
                self.state.optimizer.zero_grad(set_to_none=True)
                again = self._with_less(error, again) if is_out_of_memory(error) else None
                if again is None:
                    doing = "the anchor's part of a step was computed"
                    with caused_by_no_row(doing) if is_anchored else contextlib.nullcontext():
                        raise

    def _with_less(self, error: Exception, recompute: Sequence[bool]) -> Sequence[bool] | None:
        """Let go of what a step that lacked memory can do without; return which parts to recompute, None if it cannot.

        Recordings go first, which only a process that trains alone has.
        """
        had_recordings = self.economy.record_nothing()
        if not had_recordings and (self.economy.setting != "auto" or not self.world.any(not all(recompute))):
            return None
        forget_frames(error)  # they hold the graph
        release_freed_memory()
        if had_recordings:
            return recompute
        with self.world.together():
            may_recompute = self.economy.may_recompute()
        if not may_recompute:
            return None
        self.economy.always = True
        return [True] * len(recompute)

    def _recomputed(self, parts: Sequence[Batch], texts: Sequence[Batch]) -> list[bool]:
        """Return for each part, then for each of the anchor's, whether its layers are recomputed.

        This may measure, so it comes before any gradient. If weights are sharded, every rank does the same, and layers
        are gathered again in any case.
        """
        if self.execution.placement is not None:
            return [self.economy.setting != "off"] * (len(parts) + len(texts))
        return [
            *(self.economy.recomputes(part) for part in parts),
            *(self.economy.recomputes(text, of_anchor=True) for text in texts),
        ]

    def _accumulate(
        self, parts: Sequence[Part], recompute: Sequence[bool], weight: float, factor: float
    ) -> torch.Tensor:
        """Leave the gradients of all parts in the weights, added share by share, and return the loss."""
        pairs = zip(parts, recompute, strict=True)
        shares = [list(share) for _, share in groupby(pairs, key=lambda pair: pair[0].share)]
        alone = len(parts) == 1 and self.world.size == 1 and self.anchor is None
        compute = partial(self._compute, weight=weight, factor=factor, alone=alone)
        return self.exchange.total(shares, compute, self.state.parameters.values())

    def _compute(
        self, share: Sequence[tuple[Part, bool]], weight: float, factor: float, *, alone: bool
    ) -> torch.Tensor:
        """Add the gradients of some parts to those of the weights, and return their loss."""
        total = torch.zeros((), device=self.world.device)
        try:
            for part, again in share:
                total += self._add_part(part, weight, factor, again=again, alone=alone)
        finally:
            self.loss.forget()
        return total

    def _add_part(self, part: Part, weight: float, factor: float, *, again: bool, alone: bool) -> torch.Tensor:
        rows, context = self.loss.filled(part.batch, weight), partial(self._context, part.seed)
        add = partial(self._add_gradients, weight=weight, factor=factor, again=again)
        recorded = self._recorded(part.batch) if isinstance(rows, Placed) and not again else None
        if isinstance(rows, Placed) and recorded is not None:
            return recorded.add(rows, add, context, (rows.sizes, self.config.lora.dropout), alone=alone)
        with context():
            return add(rows)

    def _recorded(self, batch: Batch) -> RecordedParts | None:
        """Return what computes parts from recordings; None if this one is not recorded."""
        is_plain = self.state.scale is None and self.world.size == 1
        return self.economy.recorded_parts(batch) if is_plain else None

    def _add_gradients(self, rows: Batch | Placed, weight: float, factor: float, *, again: bool) -> torch.Tensor:
        with self.economy.recomputation.on(again):
            total = self.loss(rows)
            loss = total / weight if isinstance(rows, Batch) else total * rows.share
            add_gradients(loss if factor == 1.0 else loss * factor)  # here, since layers may hold layers
        return loss.detach()

    @contextlib.contextmanager
    def _context(self, seed: int) -> Generator[None]:
        device = self.world.device
        with deterministic(device, exact=self.config.deterministic), seeded(seed, device):
            yield

    def _anchor_gradients(
        self, anchor: AnchorTerm, texts: Sequence[PlacedTexts], recompute: Sequence[bool], factor: float
    ) -> list[torch.Tensor]:
        """Add the gradient of the anchor's term, and return what sums up to its divergence."""
        context = partial(self._context, anchor.seed(self.state.step, self.config))
        compute = partial(anchor.add_gradients, self.loss, factor=factor)
        try:
            recorded = None if any(recompute) else self._recorded_texts(texts)
            if recorded is not None:
                kind = anchor.weight, len(texts[0].batch), texts[0].batch.tokens, self.config.lora.dropout
                return [recorded.add(texts[0], compute, context, kind, alone=False)]
            found: list[torch.Tensor] = []
            with context():
                for text, again in zip(texts, recompute, strict=True):
                    with self.economy.recomputation.on(again):
                        found.append(compute(text))
            return found
        finally:
            self.loss.forget()

    def _recorded_texts(self, texts: Sequence[PlacedTexts]) -> RecordedParts | None:
        """Return what computes the anchor's texts from recordings; None if they are computed as usual."""
        batch = texts[0].batch
        if len(texts) > 1 or self.loss.sizes([len(row.ids) for row in batch.rows], batch.target_tokens) is None:
            return None  # several parts draw random numbers one after another
        return self._recorded(batch)
