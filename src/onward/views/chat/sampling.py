"""How an answer is drawn: the settings. Importing them loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onward.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessorList

COLD = 1e-30
"""Temperatures below are 0: the largest of float32 scores divided by them would not be finite."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Args:
        temperature: what scores are divided by; 0 always takes the most probable token.
        top_p: the share of probability mass from which the next token is drawn.
        top_k: how many of the most probable tokens the next one is drawn from; 0 for all.
        max_tokens: the most tokens of an answer.
        seed: with the prompt and the model, determines the answer.

    Raises:
        UsageError: a value is impossible.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0 <= self.temperature <= 100.0, "0 to 100"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0, up to 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "seed": (-(2**63) <= self.seed < 2**63, "64 bits"),
        }
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise UsageError(f"{name} cannot be {getattr(self, name)}", where=name, hint=f"It is {allowed}.")

    def processors(self, device: torch.device) -> LogitsProcessorList:
        """Return the processors that turn a model's scores into ones whose largest is the next token."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        from onward.views.chat.noise import Noise

        made = LogitsProcessorList()
        if self.temperature < COLD:
            return made
        made.append(TemperatureLogitsWarper(float(self.temperature)))  # it refuses whole numbers, as JSON has them
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            made.append(TopPLogitsWarper(self.top_p))
        made.append(Noise(self.seed, device))
        return made
