"""How stacked experts are computed: transformers has several ways, not all of them deterministic on a GPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

GROUPED = "grouped_mm"
ONE_BY_ONE = "eager"


def let_experts_repeat(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the experts of a model one by one on a GPU.

    If computed all at once, they are counted by `torch.histc`, which has no deterministic form there. Nothing changes
    elsewhere or for a model without experts.
    """
    config = cast(Any, model.config)
    if device.type == "cuda" and getattr(config, "_experts_implementation", None) == GROUPED:
        model.set_experts_implementation(ONE_BY_ONE)
