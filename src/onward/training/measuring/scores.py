"""Scores of a model on rows: loss and accuracy on target tokens, divergence from another model. Nothing is changed.

They are measured on a twin (`layers/twin.py`), so that nothing that training reads is written, with sums in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.training.device.environment import deterministic
from onward.training.device.execution import Execution
from onward.training.layers.twin import let_write_nothing, with_weights, writers_in_evaluation
from onward.training.measuring.texts import Order, write_texts
from onward.training.seeds import fold, seeded
from onward.training.steps.loss import TargetLoss
from onward.training.steps.parts import parts_of

BATCH_TOKENS = 2048
"""The most tokens of a forward pass: fewer than those of a step, so that a stop is noticed within its duration. A GPU,
which so few leave idle, gets as many as a part of a step has."""
Look = Callable[[], None]
"""Called between two forward passes; raises to give up."""


@dataclass(frozen=True)
class Score:
    """What a model scores on the target tokens of some rows.

    Args:
        loss: mean cross-entropy over the target tokens, nats.
        accuracy: the share of target tokens that have the highest logit.
        tokens: target tokens.
    """

    loss: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Compute:
    """How and where a model is measured.

    Args:
        config: provides rows per step and their parts; none is larger than in training.
        execution: where and how to compute, as in training.
        look: called between two forward passes; raises to give up.
    """

    config: Config
    execution: Execution
    look: Look = lambda: None

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.execution.world.device

    @property
    def tokens_at_once(self) -> int:
        """The most tokens of a forward pass, unless one row has more."""
        if self.device.type != "cuda" or self.config.gradient_accumulation != "auto":
            return BATCH_TOKENS
        return max(BATCH_TOKENS, self.config.part_tokens)

    def loss(self, model: nn.Module) -> TargetLoss:
        """Return the loss of a model as training computes it."""
        of = self.execution
        return TargetLoss(model, self.device, of.dtype, of.pad_id, by_length=of.by_length)


class Meter:
    """Measures one model, which may be in training, with its weights at the time of each call.

    Args:
        model: any causal language model, with or without an adapter.

        writers: types of modules that write to weights in evaluation mode; found out if not given.

    Raises:
        ModelError: the model cannot be evaluated without a change of its weights.
    """

    def __init__(self, model: nn.Module, compute: Compute, writers: frozenset[type[nn.Module]] | None = None) -> None:
        self._compute = compute
        writers = writers_in_evaluation(model, self._try) if writers is None else writers
        self._twin = let_write_nothing(with_weights(model, {}), writers)
        self._loss = compute.loss(self._twin)

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        return self._loss.parameters

    def _try(self, twin: nn.Module) -> object:
        row = Row(torch.tensor([0, 1]).numpy(), torch.tensor([False, True]).numpy())
        loss = self._compute.loss(twin)
        return loss(Batch([row], [RowReference("", 0)], [0]))

    def without_adapter(self) -> Meter:
        """Return a meter of the same model with its adapter off, sharing every weight."""
        other = object.__new__(Meter)
        other._compute = self._compute
        other._twin = with_weights(self._twin, {})
        for before, after in zip(self._twin.modules(), other._twin.modules(), strict=True):
            after.training = before.training
        for module in other._twin.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                vars(module)["_disable_adapters"] = True  # `disable_adapter` would freeze weights that training shares
        other._loss = self._compute.loss(other._twin)
        return other

    def under(self, compute: Compute) -> Meter:
        """Return a meter of the same model under another config."""
        other = object.__new__(Meter)
        other._compute, other._twin, other._loss = compute, self._twin, self._loss
        return other

    def write(self, shape: tuple[int, int], first: int) -> list[list[int]]:
        """Let the model write texts: `shape` is how many, and how many tokens each, including `first`."""
        compute, raised = self._compute, list[BaseException]()
        order = Order(*shape, first, compute.config.seed, compute.config.deterministic)

        def look() -> None:
            try:
                compute.look()
            except BaseException as error:
                raised.append(error)
                raise

        def write(*, cached: bool) -> list[list[int]]:
            return write_texts(self._twin, order, compute.execution.dtype, look, cached=cached)

        try:
            return write(cached=True)
        except Exception:  # some families have no key-value cache, or one of their own kind
            if raised:
                raise
            return write(cached=False)
        finally:
            self._loss.forget()

    def score(self, rows: Sequence[Row]) -> Score:
        """Return loss and accuracy over the target tokens of rows, at least one of them with a target."""
        loss = correct = tokens = 0.0
        for batch in self.batches(rows):
            self._compute.look()
            with self._repeatably():
                losses, hits = self._loss.scores(batch)
            self._loss.forget()
            loss += float(losses.double().sum())
            correct += int(hits.sum())
            tokens += len(losses)
        return Score(loss / tokens, correct / tokens, int(tokens))

    def divergence(self, base: Meter, rows: Sequence[Row]) -> float:
        """Return KL(base || model) in nats, mean over the target tokens of rows."""
        total, tokens = 0.0, 0
        for batch in self.batches(rows):
            for (here, _), (there, _) in zip(self.logits(batch), base.logits(batch), strict=True):
                total += float(divergences(there, here).double().sum())
                tokens += len(here)
        return total / tokens

    def batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """Yield rows in batches of at most `tokens_at_once`, including padding, or one row."""
        some: list[Row] = []
        for row in (*rows, None):
            if row is None or (some and self._tokens_of([*some, row]) > self._compute.tokens_at_once):
                yield from self._parts(some)
                some = []
            if row is not None:
                some.append(row)

    def _tokens_of(self, rows: Sequence[Row]) -> int:
        lengths = [len(row.ids) for row in rows]
        return len(rows) * max(lengths) if self._loss.layout.padded else sum(lengths)

    def _parts(self, rows: list[Row]) -> Iterator[Batch]:
        batch = Batch(rows, [RowReference("", place) for place in range(len(rows))], list(range(len(rows))))
        at_once = self._compute.config.model_copy(update={"gradient_accumulation": "auto", "parts": 1})
        return (part.batch for part in parts_of(batch, at_once, 0, self._loss.layout))

    def logits(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits, float32 (tokens, vocabulary), and labels of a batch's targets, some at a time."""
        self._compute.look()
        chunks = self._loss.logits(batch)
        while True:
            with self._repeatably():
                found = next(chunks, None)
            if found is None:
                break
            yield found
        self._loss.forget()

    @contextmanager
    def _repeatably(self) -> Generator[None]:
        device, config = self._compute.device, self._compute.config
        draws = seeded(fold(config.seed, "scores"), device)
        with torch.no_grad(), deterministic(device, exact=config.deterministic), draws:
            yield


def divergences(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return KL(base || model) in nats for each token, shape (tokens,), from logits of shape (tokens, vocabulary)."""
    there, here = functional.log_softmax(base, -1), functional.log_softmax(model, -1)
    return (there.exp() * (there - here)).sum(-1)
