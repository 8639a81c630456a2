"""What must not happen: an evaluation that changes the model, a head that does more than multiply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from onward.training.environment import deterministic
from onward.training.state import digest_tensors

_EDGE = 1 << 12
"""Elements of a weight looked at from each end: what is done in place is done to all of it."""


class Marks:
    """What every weight and buffer of a model was at one moment: which tensor, and the digest of its ends."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(_marks(model))

    def changed(self) -> list[str]:
        """Return the names of weights and buffers that are not what they were."""
        now = dict(_marks(self._model))
        return sorted(name for name in now.keys() | self._before.keys() if now.get(name) != self._before.get(name))


def _marks(model: nn.Module) -> Iterator[tuple[str, tuple[int, str]]]:
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        yield name, (id(parameter), digest_tensors([("ends", torch.cat([flat[:_EDGE], flat[-_EDGE:]]))]))
    for name, buffer in model.named_buffers():
        yield name, (id(buffer), digest_tensors([("all", buffer)]))


def head_only_multiplies(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether logits are the head's output and nothing else, for large hidden states too.

    A model that scales or caps its logits, or shifts them, does more; so does one without a head of its own.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if head is None or body is model:
        return False
    width = getattr(head, "in_features", None)
    if not isinstance(width, int):
        return False
    weight = cast(torch.Tensor, head.weight)
    hidden = torch.linspace(-30.0, 30.0, 3 * width, device=device).sin().mul(30.0).to(weight.dtype).view(1, 3, width)

    def replace(_part: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    hook = body.register_forward_hook(replace)
    try:
        with torch.no_grad(), deterministic(device):
            ids = torch.zeros(1, 3, dtype=torch.long, device=device)
            logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
            return bool(torch.allclose(logits.float(), head(hidden).float(), rtol=1e-4, atol=1e-4))
    except Exception:  # a model that hands its hidden states on in another way: then it is not known
        return False
    finally:
        hook.remove()
