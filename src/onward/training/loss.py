"""The loss: cross-entropy over target tokens, as a sum, so that a step's parts add up to the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onward.data.loader import PaddedBatch


def target_loss(model: nn.Module, batch: PaddedBatch, device: torch.device, *, keeps_logits: bool) -> torch.Tensor:
    """Return the summed cross-entropy (nats, float32 scalar) of the batch's target tokens.

    Args:
        batch: arrays of shape (rows, length).
        keeps_logits: whether the model takes `logits_to_keep`; then only columns before a target are computed.
    """
    ids = torch.from_numpy(batch.input_ids).to(device)
    mask = torch.from_numpy(batch.attention_mask).to(device)
    wanted = torch.from_numpy(batch.targets[:, 1:])
    columns = wanted.any(dim=0).nonzero().squeeze(1).to(device)
    extra: dict[str, Any] = {"logits_to_keep": columns} if keeps_logits else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
    if not keeps_logits:
        logits = logits[:, columns]
    chosen = wanted.to(device)[:, columns]
    return functional.cross_entropy(logits[chosen].float(), ids[:, columns + 1][chosen], reduction="sum")
