"""The loss: cross-entropy summed over target tokens, so that the parts of a step add up to the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onward.data.loader import Batch, flatten, pad
from onward.training.adapter import head_weight
from onward.training.attention import row_arguments, takes_rows
from onward.training.cross_entropy import linear_cross_entropy
from onward.training.environment import autocast
from onward.training.model import causal_lm, keeps_logits


class TargetLoss:
    """The summed cross-entropy (nats, float32 scalar) of a batch's target tokens.

    Rows are laid end to end where the model keeps them apart (`attention.takes_rows`), else padded to the longest.

    Args:
        dtype: compute type; below float32 the forward runs under autocast.
        pad_id: the token that shorter rows are filled with when rows are padded.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, pad_id: int = 0) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.pad_id = pad_id
        self._causal_lm: Any = causal_lm(model)
        self._takes_rows = takes_rows(self._causal_lm)
        self._keeps_logits = keeps_logits(self._causal_lm)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the loss, with its graph where gradients are on."""
        with autocast(self.device, self.dtype):
            return self._flat(batch) if self._takes_rows else self._padded(batch)

    def _flat(self, batch: Batch) -> torch.Tensor:
        flat = flatten(batch)
        ids = torch.from_numpy(flat.input_ids).to(self.device)
        places = torch.from_numpy(flat.position_ids).to(self.device)
        before = torch.from_numpy(flat.before_targets).to(self.device)
        rows = row_arguments(flat.lengths, self.device)
        outputs = self._causal_lm.base_model(input_ids=ids[None], position_ids=places[None], use_cache=False, **rows)
        hidden = outputs.last_hidden_state[0]
        hidden, labels = hidden.index_select(0, before), ids[before + 1]
        head = self._causal_lm.get_output_embeddings()
        weight = head_weight(head)
        if weight is not None:
            return linear_cross_entropy(hidden, weight, labels, self.dtype)
        return functional.cross_entropy(head(hidden).float(), labels, reduction="sum")

    def _padded(self, batch: Batch) -> torch.Tensor:
        padded = pad(batch, self.pad_id)
        ids = torch.from_numpy(padded.input_ids).to(self.device)
        mask = torch.from_numpy(padded.attention_mask).to(self.device)
        wanted = torch.from_numpy(padded.targets[:, 1:])
        columns = wanted.any(dim=0).nonzero().squeeze(1).to(self.device)
        extra: dict[str, Any] = {"logits_to_keep": columns} if self._keeps_logits else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
        if not self._keeps_logits:
            logits = logits[:, columns]
        chosen = wanted.to(self.device)[:, columns]
        return functional.cross_entropy(logits[chosen].float(), ids[:, columns + 1][chosen], reduction="sum")
