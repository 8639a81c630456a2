"""What a model takes of the device's memory, measured on the model itself.

What the backward pass keeps of a row is counted in small forward passes. It is a polynomial in the row's length: a
constant, a term per token, and one per pair of tokens if attention keeps its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.training.layers.recompute import Recomputation
from onward.training.model.load import causal_lm
from onward.training.optimizers import OptimizerMethod
from onward.training.steps.memory import Polynomial, Profile
from onward.training.transfer import Sizes

LONGEST = 48
"""Tokens of the longest row that is measured."""
CRUDE = 8
"""The most bytes that a token leaves, in usual models, per feature that goes into or out of a linear layer, those of
chosen experts included."""
SCORE = 12
"""The most bytes that attention leaves for each of its scores, where it keeps them: scores, mask and product."""


def profile_of(
    model: nn.Module, method: OptimizerMethod, loss: Callable[[Batch], torch.Tensor], config: Config, device: str
) -> Profile:
    """Measure a model in a few forward passes over small rows, without changing it.

    Args:
        model: a model in training mode; its tensors need no memory (`model/outline.py`).
        method: the optimizer, which determines what is kept for each trained weight.
        loss: computes the summed loss of a part, with its graph.
    """
    recomputation = Recomputation(model)
    weights = {id(weight): weight.numel() * weight.element_size() for weight in model.parameters()}
    parameters = {name: weight for group in method.groups(model) for name, weight in group}
    sizes = [weights[id(weight)] for weight in parameters.values()]
    trained = sum(sizes)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    embedding = int(causal_lm(model).get_input_embeddings().weight.shape[0])  # type: ignore[union-attr,arg-type]
    head = causal_lm(model).get_output_embeddings()
    whole = _fit(model, loss, config.max_length)
    with recomputation.on():
        again = _fit(model, loss, config.max_length)
    is_quantized = any(map(_is_quantized, model.parameters()))
    mapped = _mapped(model) if device == "cpu" and is_quantized else 0
    return Profile(
        base=sum(weights.values()) - trained + buffers + mapped,
        trained=trained,
        moments=method.bytes(parameters),
        whole=whole,
        recomputed=again if again.token < 0.9 * whole.token else None,
        layers=max((len(part) for part in model.modules() if isinstance(part, nn.ModuleList)), default=1),
        vocabulary=embedding,
        trained_head=sum(weights[id(weight)] for weight in _trained_in(head)),
        trained_rows=4 * head.weight.numel() if isinstance(head, TrainableTokensWrapper) else 0,  # type: ignore[operator]
        device=device,
        kind="4-bit" if is_quantized else "adapter" if isinstance(model, PeftModel) else "full",
        workspace=method.workspace(parameters) if device == "cpu" else 0,
        pinned=pinned(sizes, method.bytes(parameters)) if device == "cuda" else 0,
    )


def pinned(weights: Sequence[int], moments: int) -> int:
    """Return the main memory for a copy from a GPU: PyTorch rounds each pinned storage up to a power of two.

    Args:
        weights: bytes of each trained weight; large ones have a storage each (`transfer/layout.py`).
        moments: bytes of the optimizer's state, which has one.
    """
    large = [size for size in weights if size > Sizes().small]
    return sum(1 << (size - 1).bit_length() for size in (*large, sum(weights) - sum(large), moments) if size)


def _is_quantized(weight: nn.Parameter) -> bool:
    return hasattr(weight, "quant_state")


def _mapped(model: nn.Module) -> int:
    """Return what the files of a model that was quantized on a CPU take beside its weights: they stay mapped, since the
    weights that are not quantized lie in them.
    """
    files = sum(file.stat().st_size for file in Path(str(causal_lm(model).name_or_path)).glob("*.safetensors"))
    plain = (each for each in model.parameters() if not each.requires_grad and not _is_quantized(each))
    return max(0, files - sum(each.numel() * each.element_size() for each in plain))


def _trained_in(head: object) -> list[nn.Parameter]:
    return [weight for weight in head.parameters() if weight.requires_grad] if isinstance(head, nn.Module) else []


def crude_of(model: nn.Module, *, padded: bool) -> Polynomial:
    """Return an upper bound of the bytes that a part keeps in usual models, without computing anything.

    Args:
        padded: whether rows are padded: then attention is the model's own, which may keep its scores.
    """
    config: Any = cast(Any, causal_lm(model).config).get_text_config()
    chosen, heads, layers = (
        getattr(config, key, None) for key in ("num_experts_per_tok", "num_attention_heads", "num_hidden_layers")
    )
    apart = (part for part in model.modules() if not isinstance(part, nn.Embedding))
    shapes = [weight.shape for part in apart for weight in part.parameters(recurse=False)]
    # GPT-2 has linear layers of its own class, and stacked experts are weights of their own
    features = sum(sum(shape) for shape in shapes if len(shape) == 2)
    features += sum((chosen or shape[0]) * sum(shape[1:]) for shape in shapes if len(shape) == 3)
    drops = any(getattr(config, key, None) for key in ("attention_dropout", "attn_pdrop"))
    scores = heads * layers if isinstance(heads, int) and isinstance(layers, int) and (padded or drops) else 0
    return Polynomial(0.0, float(CRUDE * features), float(SCORE * scores))


def _fit(model: nn.Module, loss: Callable[[Batch], torch.Tensor], longest: int) -> Polynomial:
    top = max(8, min(LONGEST, longest))
    lengths = [top // 2, 3 * top // 4, top]
    sizes = [float(_kept(model, partial_loss)) for partial_loss in ((lambda n=n: loss(_row(n))) for n in lengths)]
    matrix = np.array([[1.0, length, length**2] for length in lengths])
    constant, token, pair = np.linalg.solve(matrix, np.array(sizes))
    if abs(pair) * top**2 < 0.02 * sizes[-1]:  # rounding of blocks, not attention scores
        (token, constant), pair = np.polyfit(lengths, sizes, 1), 0.0
    return Polynomial(max(0.0, float(constant)), float(token), max(0.0, float(pair)))


def _row(length: int) -> Batch:
    targets = np.arange(length) > 0
    return Batch([Row(np.ones(length, dtype=np.int64), targets)], [RowReference("memory", 0)], [0])


def _kept(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that the backward pass would need from a forward pass, in addition to weights and buffers."""
    places = {_place(each) for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = _place(tensor)
        if place not in places:
            kept.setdefault(place, tensor.detach())  # held, so that no other tensor gets its memory
        return tensor.detach()  # nodes that hold their own outputs, here or in `kept`, are never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _place(tensor: torch.Tensor) -> int:
    """Return an identifier of a tensor's memory that is the same for all views, even if it has no memory."""
    return cast(Any, StorageWeakRef)(tensor.untyped_storage()).cdata
