"""Texts that a base model writes on its own: unprompted samples, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from onward.training.device.environment import autocast, deterministic
from onward.training.model.load import causal_lm
from onward.training.model.quiet import quiet
from onward.training.seeds import fold, seeded

AT_ONCE = 64
"""How many texts are written at the same time."""


@dataclass(frozen=True)
class Order:
    """What to write.

    Args:
        count: how many texts.
        tokens: tokens of each, including the first; texts do not stop at an end token.
        first: the token that each begins with.
        seed: determines the draws.
        exact: use only deterministic operations (`deterministic`).
    """

    count: int
    tokens: int
    first: int
    seed: int
    exact: bool = True


class _Look(StoppingCriteria):
    """Calls a function at each token, which may raise; never stops the generation itself."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._look()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def write_texts(
    model: nn.Module, order: Order, dtype: torch.dtype, look: Callable[[], None], *, cached: bool = True
) -> list[list[int]]:
    """Let a model write texts by drawing each next token from its own unmodified distribution.

    Args:
        model: in evaluation mode.
        look: called at each token; raises to give up.

    Returns:
        Their token ids.
    """
    plain = causal_lm(model)
    device = cast(Any, plain).device
    how = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=order.tokens - 1,
        min_new_tokens=order.tokens - 1,
        eos_token_id=None, pad_token_id=0, use_cache=cached,
    )  # fmt: skip
    texts: list[list[int]] = []
    for begun in range(0, order.count, AT_ONCE):
        ids = torch.full((min(AT_ONCE, order.count - begun), 1), order.first, dtype=torch.long, device=device)
        draws = seeded(fold(order.seed, "texts", begun), device)
        exactly = deterministic(device, exact=order.exact)
        with torch.no_grad(), quiet(), exactly, draws, autocast(device, dtype):
            written = cast(Any, plain).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how,
                stopping_criteria=StoppingCriteriaList([_Look(look)]),
            )  # fmt: skip
        texts += cast(list[list[int]], written.tolist())
    return texts
