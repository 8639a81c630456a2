"""The anchor in the loss: the KL divergence from the base on texts that the base wrote, a few of them in each step.

The base's distribution is kept as its most probable tokens and the rest as one, so that the base itself need not be in
memory. Learning Without Forgetting (Li and Hoiem, 2016) keeps a model close to its earlier answers in the same way; for
evidence that the model's own text works better than raw web text, see arXiv:2605.26097.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.plan.permutation import Permutation
from onward.data.tokenized import Row
from onward.training.layers.varlen import to_device
from onward.training.seeds import fold
from onward.training.steps.loss import Placed, TargetLoss, add_gradients
from onward.training.steps.parts import parts_of

TOP = 64
"""How many tokens of the base's distribution, the most probable ones, are kept."""
ROWS_PER_TEXT = 8
"""How many rows of a step there are per additional anchor text; there is at least one text."""


@dataclass(frozen=True)
class PlacedTexts:
    """Texts of a step that are computed together, on the computing device.

    Args:
        batch: the texts.
        rows: what the loss is called with.
        ids: the base's most probable tokens at each target, int64, shape (tokens, top).
        logs: their log-probabilities, float32, the same shape.
        targets: the targets of all texts of the step.
    """

    batch: Batch
    rows: Batch | Placed
    ids: torch.Tensor
    logs: torch.Tensor
    targets: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that differs between texts of the same lengths; those of rows only if they lie end to end."""
        return [*(self.rows.tensors if isinstance(self.rows, Placed) else ()), self.ids, self.logs]

    def copied(self) -> PlacedTexts:
        """Return a copy in other memory."""
        rows = self.rows.copied() if isinstance(self.rows, Placed) else self.rows
        return replace(self, rows=rows, ids=self.ids.clone(), logs=self.logs.clone())


@dataclass(frozen=True)
class AnchorTerm:
    """The additional term in the loss of a step: weight times the divergence, mean over tokens.

    Args:
        texts: tokens of the texts, all of the same length; all tokens but the first of each are targets.
        ids: the base's most probable tokens at each target, int64, shape (texts, targets, top).
        logs: their log-probabilities, float32, the same shape.
        weight: the factor of the divergence.
    """

    texts: Sequence[Row]
    ids: torch.Tensor
    logs: torch.Tensor
    weight: float

    def chosen(self, step: int, config: Config) -> list[int]:
        """Return the texts of the step after `step`, a function of seed and step; none repeats before all have come."""
        count = texts_of_step(config)
        found: list[int] = []
        for number in range(step * count, (step + 1) * count):
            turn, place = divmod(number, len(self.texts))
            found.append(Permutation(len(self.texts), f"onward anchor 1:{config.seed}:{turn}".encode())[place])
        return found

    def seed(self, step: int, config: Config) -> int:
        """Return the seed of the dropout of the step after `step`."""
        return fold(config.seed, "step", step, "anchor")

    def placed(self, loss: TargetLoss, step: int, config: Config) -> list[PlacedTexts]:
        """Return the texts of the step after `step` on the computing device, as they are computed together."""
        places = self.chosen(step, config)
        batch = Batch([self.texts[place] for place in places], [RowReference("", place) for place in places], places)
        at_once = config.model_copy(update={"gradient_accumulation": "auto", "parts": 1})
        found: list[PlacedTexts] = []
        for part in parts_of(batch, at_once, step, loss.layout):
            own = part.batch.lines
            ids, logs = (to_device(kept[own].flatten(0, 1), loss.device) for kept in (self.ids, self.logs))
            found.append(PlacedTexts(part.batch, loss.placed(part.batch), ids, logs, batch.target_tokens))
        return found

    def add_gradients(self, loss: TargetLoss, texts: PlacedTexts, factor: float = 1.0) -> torch.Tensor:
        """Add the gradients of the term for some texts of a step; nothing waits for the device.

        Args:
            factor: what the gradients are multiplied by.

        Returns:
            the share of these texts in the divergence in nats per token, float32 scalar on the device.
        """
        divergences: list[torch.Tensor] = []

        def loss_of(logits: torch.Tensor, there: slice) -> torch.Tensor:
            divergence = top_divergences(texts.ids[there], texts.logs[there], logits).sum()
            divergences.append(divergence.detach())
            return self.weight * factor * (divergence / texts.targets)

        add_gradients(loss.sum_over_chunks(texts.rows, loss_of))
        return torch.stack(divergences[::-1]).sum() / texts.targets


def texts_of_step(config: Config) -> int:
    """Return how many texts a step has."""
    return max(1, config.batch_size // ROWS_PER_TEXT)


def top_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable tokens and their log-probabilities, shape (tokens, top), from (tokens, vocabulary)."""
    found = functional.log_softmax(logits, -1).topk(min(TOP, logits.shape[-1] - 1), -1)
    return found.indices, found.values


def top_divergences(ids: torch.Tensor, logs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(base || model) in nats for each token, where all tokens that were not kept count as one.

    That is at most the divergence over all tokens.

    Args:
        ids: kept tokens of the base, shape (tokens, top).
        logs: their log-probabilities.
        logits: logits of the model, shape (tokens, vocabulary).
    """
    every = functional.log_softmax(logits, -1)
    rows = torch.arange(0, every.numel(), every.shape[-1], device=every.device)[:, None]
    here = every.view(-1).gather(0, (rows + ids).view(-1)).view_as(ids)  # flat, as in `cross_entropy._less_one`
    rest_there, rest_here = (torch.log1p(-each.exp().sum(-1).clamp(max=1 - 1e-6)) for each in (logs, here))
    return (logs.exp() * (logs - here)).sum(-1) + rest_there.exp() * (rest_there - rest_here)
