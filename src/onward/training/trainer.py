"""The loop: a generator of step results. The caller decides about logging, saving and stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from onward.config import Config
from onward.data.loader import Batch, batch_at
from onward.data.order import Plan, rows_digest
from onward.data.tokenize import TokenizedFile
from onward.errors import TrainingError
from onward.events import StepTaken
from onward.training.environment import deterministic
from onward.training.loss import TargetLoss
from onward.training.optimizers import set_learning_rate
from onward.training.parts import parts_of
from onward.training.schedule import learning_rate
from onward.training.seeds import seeded
from onward.training.state import TrainState
from onward.training.world import World

Rates = Callable[[int, int], float]


class Trainer:
    """Takes the steps of one file after another on one state.

    Args:
        state: what evolves.
        config: the config in force for the file.
        world: the processes that train, and the device of this one.
        dtype: compute type; below float32 the forward runs under autocast.
        pad_id: token id that shorter rows are padded with, where rows are padded.
        rates: the learning rate of a global step and its step in the file, both from 1; the config's if not given.
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        world: World,
        dtype: torch.dtype,
        pad_id: int,
        *,
        rates: Rates | None = None,
    ) -> None:
        self.state = state
        self.config = config
        self.rates = rates or partial(learning_rate, config)
        self.world = world
        self.loss = TargetLoss(state.model, world.device, dtype, pad_id)

    def steps(self, files: Mapping[str, TokenizedFile], plan: Plan) -> Iterator[StepTaken]:
        """Yield each step that the plan still has, from the cursor on, after it was taken.

        Args:
            files: every source of the plan, by its SHA-256.
            plan: which rows each step has.

        Raises:
            TrainingError: the loss is not finite; the state is that before the step.
        """
        while not self.state.cursor.at_boundary:
            yield self.take_step(batch_at(files, plan, self.state.cursor.step), plan)

    def take_step(self, batch: Batch, plan: Plan) -> StepTaken:
        """Train one batch as one optimizer step and move counters and cursor on."""
        begun = time.perf_counter()
        state, index = self.state, self.state.cursor.step
        rate = self.rates(state.step + 1, index + 1)
        loss = self._gradients(batch)
        self._fill()
        grad_norm = self._clip()
        self._require_finite(loss, grad_norm, batch)
        set_learning_rate(state.optimizer, rate)
        state.optimizer.step()
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
        )

    def _gradients(self, batch: Batch) -> float:
        """Accumulate the gradient of the mean loss (nats) over the step's target tokens, and return that loss."""
        total = torch.zeros((), device=self.world.device)
        try:
            for part in parts_of(batch, self.config, self.state.step, self.loss.layout):
                with deterministic(self.world.device), seeded(part.seed, self.world.device):
                    loss = self.loss(part.batch) / batch.target_tokens
                    loss.backward()
                total += loss.detach()
        finally:
            self.loss.forget()
        return float(total)

    def _fill(self) -> None:
        """Give weights that no token of the step reached (of experts) a gradient of zeros: each counts every step."""
        for parameter in self.state.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip(self) -> float:
        limit = self.config.max_grad_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(self.state.parameters.values(), limit))

    def _require_finite(self, loss: float, grad_norm: float, batch: Batch) -> None:
        if not self.world.any(not torch.isfinite(torch.tensor([loss, grad_norm])).all()):
            return
        self.state.optimizer.zero_grad(set_to_none=True)
        name = "gradient" if loss == loss and abs(loss) != float("inf") else "loss"
        lines = ", ".join(str(line) for line in sorted(batch.lines))
        raise TrainingError(
            f"the {name} of step {self.state.step + 1} is not finite (loss {loss}, gradient norm {grad_norm}); "
            f"its rows are on lines {lines}",
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
