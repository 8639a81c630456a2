"""The proof of a model, as far as it got: what is being proven, and what was found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from onward.data.plan.loader import Batch
from onward.errors import ModelError
from onward.training.admission import gradients
from onward.training.model.spec import ModelSpec


@dataclass
class Proof:
    """A model being proven.

    Args:
        strict: raise at the first problem; otherwise collect problems as warnings.
    """

    spec: ModelSpec
    strict: bool
    warnings: list[str] = field(default_factory=list)
    is_finite: bool = True
    """Whether every loss that plain transformers computed so far is finite."""

    def refuse(self, what: str, hint: str, *, where: object = None) -> None:
        """Refuse the model with a reason and a way out; without `strict`, only warn of it.

        Raises:
            ModelError: it is refused.
        """
        if self.strict:
            raise ModelError(what, where=where or self.spec.base, hint=hint)
        self.warnings.append(what)

    def row_by_row(self, model: nn.Module, batch: Batch) -> gradients.Gradients:
        """Return the gradients that plain transformers computes for rows."""
        taken = gradients.of_rows(self.spec, model, batch)
        self.is_finite &= math.isfinite(taken.loss)
        return taken

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits of rows."""
        spec = self.spec
        return gradients.logits_of(model, batch, spec.device, spec.dtype, exact=spec.config.deterministic)


@dataclass
class Found:
    """What was found about a model, as far as the proof got."""

    trained: int = 0
    reach: float = 0.0
    left_out: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    """Large weights that `all-linear` gives no adapter; not looked for if targets are named."""
    end_to_end: bool = False
    by_length: bool = False
    why_padded: str = ""
    difference: float = 0.0
    writers: tuple[str, ...] | None = None
