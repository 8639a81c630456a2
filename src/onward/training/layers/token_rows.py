"""Trained rows of an embedding, put into it without a wait for the device.

PEFT copies the places of the rows to the device in every pass, and a GPU's host waits for such a copy. Here they stay
there, and so a part of a step can be recorded, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn


def keep_places(model: nn.Module) -> None:
    """Let the layers of a model whose rows are trained keep the places of these rows on the device."""
    for layer in model.modules():
        if type(layer) is TrainableTokensLayer:
            layer.__class__ = TokenRows  # it stays the object that tied layers refer to
            cast(TokenRows, layer).places = {}


class TokenRows(TrainableTokensLayer):
    """PEFT's layer, with the same results."""

    places: dict[tuple[str, torch.device], torch.Tensor]
    """The places of an adapter's rows on a device, int64, shape (rows,)."""

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """Return the matrix with the trained rows in their places, shape (tokens, width)."""
        matrix = cast(torch.Tensor, cast(Any, self.base_layer).weight)
        for name in active_adapters:
            rows = self.trainable_tokens_delta[name].to(matrix)
            matrix = matrix.index_copy(0, self._places(name, matrix.device), rows)
        return matrix

    def _places(self, name: str, device: torch.device) -> torch.Tensor:
        if (name, device) not in self.places:
            with torch.inference_mode(False):  # a tensor of that mode could not be used in training
                self.places[name, device] = torch.tensor(self.token_indices[name]).to(device)
        return self.places[name, device]
