"""The loop: a generator of step results. The caller decides about logging, saving and stopping."""

from __future__ import annotations

import contextlib
import math
import operator
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import groupby

import torch
from torch import nn

from onward.config import Config
from onward.data.plan.loader import Batch, batch_at
from onward.data.plan.order import Plan, rows_digest
from onward.data.tokenized import TokenizedFile
from onward.errors import TrainingError
from onward.events import StepTaken
from onward.training.device.environment import deterministic, release_freed_memory
from onward.training.device.errors import caused_by_no_row, forget_frames, is_out_of_memory
from onward.training.device.execution import Execution
from onward.training.optimizers import set_learning_rate
from onward.training.ranks.exchange import exchange_of
from onward.training.ranks.orders import file_order, step_order
from onward.training.ranks.sameness import hold_same
from onward.training.schedule import learning_rate
from onward.training.seeds import seeded, taking_steps
from onward.training.state import TrainState
from onward.training.steps.ahead import Ahead
from onward.training.steps.anchor import AnchorTerm, PlacedTexts
from onward.training.steps.economy import Economy, Learned
from onward.training.steps.loss import Placed, TargetLoss, add_gradients
from onward.training.steps.parts import Part, parts_of
from onward.training.steps.recorded_parts import RecordedParts

Rates = Callable[[int, int], float]


class Trainer:
    """Takes the steps of one file after another on one state.

    Args:
        state: what evolves.
        config: the config in force for the file.
        execution: where and how steps are computed.
        anchor: an additional term in the loss; None for none.
        learned: what the process already knows about the model, if it trains file after file.
        rates: the learning rate of a global step and its step in the file, both from 1; the config's if not given.
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        execution: Execution,
        anchor: AnchorTerm | None = None,
        *,
        learned: Learned | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.state = state
        self.config = config
        self.rates = rates or partial(learning_rate, config)
        self.anchor = anchor
        self.execution = execution
        self.world = execution.world
        self.exchange = execution.placement or exchange_of(execution.world, config.exchange)
        device = execution.world.device
        learned = learned or Learned()
        assert learned.loss is None or learned.loss.model is state.model, "what was learned is of another model"
        self.loss = self._loss(learned)
        self.economy = Economy(state, self.loss, config, device, learned)

    def _loss(self, learned: Learned) -> TargetLoss:
        execution = self.execution
        if execution.placement is not None:
            return execution.placement.loss
        if learned.loss is None:  # it walks through the whole model
            device, by_length = execution.world.device, execution.by_length
            model, pad_id = self.state.model, execution.pad_id
            learned.loss = TargetLoss(model, device, execution.dtype, pad_id, by_length=by_length)
        return learned.loss

    def steps(self, files: Mapping[str, TokenizedFile], plan: Plan) -> Iterator[StepTaken]:
        """Take the remaining steps of the plan, from the cursor on, and yield each after it was taken.

        Args:
            files: every source of the plan, by its SHA-256.
            plan: which rows each step has.

        Raises:
            TrainingError: the loss is not finite; the state is the one before the step.
        """
        self.world.tell(lambda: file_order(self.state, self.config, self.execution, plan, files, self.anchor))
        if self.execution.placement is None or self.execution.placement.holds_whole:
            hold_same(lambda: self.state, self.world, self.anchor)
        else:
            with self.world.together():  # the others prepare
                pass
        ahead = Ahead(lambda step: batch_at(files, plan, step), plan.steps, self.world.device)
        with taking_steps(), ahead as batches:
            while not self.state.cursor.at_boundary:
                batch = batches.at(self.state.cursor.step)
                self.world.tell(lambda: step_order(self.economy.setting))
                yield self.take_step(batch, plan)

    def take_step(self, batch: Batch, plan: Plan) -> StepTaken:
        """Train one batch as one optimizer step and advance counters and cursor."""
        begun = time.perf_counter()
        state, index = self.state, self.state.cursor.step
        rate = self.rates(state.step + 1, index + 1)
        loss, grad_norm, divergence = self._finite_gradients(batch, plan)
        set_learning_rate(state.optimizer, rate)
        with caused_by_no_row("the optimizer took a step"):
            state.optimizer.step()
        if self.execution.placement is not None:
            self.execution.placement.stepped()
        state.optimizer.zero_grad(set_to_none=True)
        self._count(batch)
        replayed = tuple(row for row in batch.references if row.sha256 != plan.sha256)
        return StepTaken(
            step=state.step,
            step_in_file=index + 1,
            steps_in_file=plan.steps,
            epoch=plan.epoch_of(index),
            rows=len(batch) - len(replayed),
            rows_digest=rows_digest(batch.references, plan.sources),
            tokens=batch.tokens,
            target_tokens=batch.target_tokens,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            seconds=time.perf_counter() - begun,
            replayed=replayed,
            anchor=divergence,
        )

    def _finite_gradients(self, batch: Batch, plan: Plan) -> tuple[float, float, float | None]:
        """Compute and clip the gradients of a step; return its loss, their norm, and the anchor's divergence.

        Under float16, a step whose gradients overflow is computed again with half the scale, until they do not.

        Raises:
            TrainingError: they are not finite at any scale; the state is the one before the step.
        """
        scale = self.state.scale
        while True:
            factor = 1.0 if scale is None else scale.value
            total, anchors = self._gradients(batch, factor=factor)
            with self.world.together(), caused_by_no_row("the gradients of a step were clipped"):
                self._fill()
                self._unscale(factor)
                scalars = torch.stack([total, self._clip().to(total), *anchors])
                loss, grad_norm, *divergences = scalars.tolist()  # the only wait for the device
            overflowed = math.isfinite(loss) and not math.isfinite(grad_norm)
            if scale is None or not scale.can_fall or not self.world.any(overflowed):
                break
            scale = scale.halved()
            self.state.optimizer.zero_grad(set_to_none=True)
        self._require_finite(loss, grad_norm, batch, plan)
        self.state.scale = None if scale is None else scale.after_step()
        divergence = reduce(operator.add, divergences, 0.0) if divergences else None  # sum() may round otherwise
        return loss, grad_norm, divergence

    def _unscale(self, factor: float) -> None:
        if factor != 1.0:
            gradients = [weight.grad for weight in self.state.parameters.values() if weight.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / factor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def _gradients(self, batch: Batch, *, factor: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
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
                is_anchored = True
                with self.world.together():
                    return total, self._anchor_gradients(texts, again[len(parts) :], factor)
            except Exception as error:
                self.state.optimizer.zero_grad(set_to_none=True)
                again = self._with_less(error, again) if is_out_of_memory(error) else None
                if again is None and is_anchored:
                    with caused_by_no_row("the anchor's part of a step was computed"):
                        raise
                if again is None:
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
        self, texts: Sequence[PlacedTexts], recompute: Sequence[bool], factor: float
    ) -> list[torch.Tensor]:
        """Add the gradient of the anchor's term, if there is one, and return what sums up to its divergence."""
        if self.anchor is None:
            return []
        context = partial(self._context, self.anchor.seed(self.state.step, self.config))
        compute = partial(self.anchor.add_gradients, self.loss, factor=factor)
        try:
            recorded = None if any(recompute) else self._recorded_texts(texts)
            if recorded is not None:
                kind = self.anchor.weight, len(texts[0].batch), texts[0].batch.tokens, self.config.lora.dropout
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

    def _fill(self) -> None:
        """Give weights that no token of the step reached (experts) zero gradients, so that each counts every step."""
        for parameter in self.state.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip(self) -> torch.Tensor:
        limit = self.config.max_grad_norm or float("inf")
        if self.execution.placement is not None:
            return self.execution.placement.clip(limit)
        return nn.utils.clip_grad_norm_(self.state.parameters.values(), limit)

    def _require_finite(self, loss: float, grad_norm: float, batch: Batch, plan: Plan) -> None:
        if not self.world.any(not torch.isfinite(torch.tensor([loss, grad_norm])).all()):
            return
        self.state.optimizer.zero_grad(set_to_none=True)
        name = "gradient" if loss == loss and abs(loss) != float("inf") else "loss"
        raise TrainingError(
            f"the {name} of step {self.state.step + 1} is not finite (loss {loss}, gradient norm {grad_norm}); "
            f"{_places_of(batch, plan)}",
            where=f"step {self.state.step + 1}",
            hint="The step was not kept. Look at these rows, or lower learning_rate, then: onward train",
        )

    def _count(self, batch: Batch) -> None:
        counters = self.state.counters
        counters.step += 1
        counters.rows += len(batch.rows)
        counters.tokens += batch.tokens
        counters.target_tokens += batch.target_tokens
        self.state.cursor = replace(self.state.cursor, step=self.state.cursor.step + 1)


def _places_of(batch: Batch, plan: Plan) -> str:
    """Return where the rows of a step stand: their lines in the plan's file, and how many are of other files."""
    pairs = zip(batch.lines, batch.references, strict=True)
    own = sorted(line for line, row in pairs if row.sha256 == plan.sha256)
    others = len(batch) - len(own)
    lines = f"line {own[0]}" if len(own) == 1 else f"lines {', '.join(map(str, own))}"
    said = [f"on {lines}"] * bool(own) + [f"{others} of earlier files"] * bool(others)
    return f"its {'row is' if len(batch) == 1 else 'rows are'} {' and '.join(said)}"
