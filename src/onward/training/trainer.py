"""The loop: a generator of step results. The caller decides about logging, saving and stopping."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import nn

from onward.config import Config
from onward.data.plan.loader import Batch, batch_at
from onward.data.plan.order import Plan, rows_digest
from onward.data.tokenized import TokenizedFile
from onward.errors import TrainingError
from onward.events import StepTaken
from onward.training.accumulation import Accumulation
from onward.training.device.errors import caused_by_no_row
from onward.training.device.execution import Execution
from onward.training.optimizers import set_learning_rate
from onward.training.ranks.orders import file_order, step_order
from onward.training.ranks.sameness import hold_same
from onward.training.schedule import learning_rate
from onward.training.seeds import taking_steps
from onward.training.state import TrainState
from onward.training.steps.ahead import Ahead
from onward.training.steps.anchor import AnchorTerm
from onward.training.steps.economy import Economy, Learned
from onward.training.steps.loss import TargetLoss

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
        self.rates = rates or partial(learning_rate, config)
        self.anchor = anchor
        self.execution = execution
        self.world = execution.world
        self.accumulation = Accumulation(state, config, execution, anchor, learned or Learned())

    @property
    def config(self) -> Config:
        """The config in force for the file."""
        return self.accumulation.config

    @property
    def economy(self) -> Economy:
        """What decides how a step uses memory."""
        return self.accumulation.economy

    @property
    def loss(self) -> TargetLoss:
        """What computes the loss."""
        return self.accumulation.loss

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
            total, anchors = self.accumulation.gradients(batch, factor=factor)
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
