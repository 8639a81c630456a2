"""Draws that are a function of a seed.

transformers draws from the process's global generator. Here Gumbel noise from a generator of the answer's own is added
to the scores, and the largest is taken: the distribution is the same (Gumbel-max trick; Maddison et al., arXiv
1411.0030), and simultaneous answers do not disturb each other.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor


class Noise(LogitsProcessor):
    """Adds Gumbel noise to scores, so that the largest is a draw from their distribution."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores with noise.

        Args:
            input_ids: the tokens so far, shape (1, T).
            scores: scores of the next token, shape (1, V).
        """
        del input_ids
        wide: torch.Tensor = scores.float()
        noise = torch.empty_like(wide).exponential_(generator=self._generator).log()
        return wide - noise
