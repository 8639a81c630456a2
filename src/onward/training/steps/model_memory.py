"""What a model takes of the device's memory, measured on the model itself.

What the backward pass keeps of a row is counted in small forward passes. It is a polynomial in the row's length: a
constant, a term per token, and one per pair of tokens if attention keeps its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
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
"""Tokens of the longest row that is measured, unless a large share of what it leaves does not depend on its length."""
FIXED = 0.1
"""Such a share."""
ROUNDING = 0.02
"""The share up to which sizes count as equal."""
BLOCKS = (64, 128, 256, 512)
"""Multiples of tokens that models fill rows up to, for a scan, or for linear attention in chunks."""
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
        layers=_layers_like_the_largest(model, lambda: loss(_rows([max(8, min(LONGEST, config.max_length))]))),
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


def crude_of(model: nn.Module) -> Polynomial:
    """Return an upper bound of the bytes that a part keeps, without computing anything.

    It holds for models whose rows are laid end to end: others compute what their weights do not tell.
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
    scores = heads * layers if drops and isinstance(heads, int) and isinstance(layers, int) else 0
    return Polynomial(0.0, float(CRUDE * features), float(SCORE * scores))


def _fit(model: nn.Module, loss: Callable[[Batch], torch.Tensor], longest: int) -> Polynomial:
    def size(*lengths: int) -> int:
        return kept_by_backward(model, lambda: loss(_rows(lengths)))

    top = max(8, min(LONGEST, longest))
    one = _through({length: size(length) for length in (top // 2, 3 * top // 4, top)})
    if one.constant < FIXED * one([top]):
        return one
    filled = size(top, top) - one([top, top])
    if filled < ROUNDING * one([top]):
        return one
    block = next((each for each in BLOCKS if _begins_another(one, size, min(2 * each, longest))), longest)
    return replace(one, constant=one.constant - filled, filled=float(filled), block=block)


def _through(sizes: Mapping[int, int]) -> Polynomial:
    lengths, found = np.array(list(sizes)), np.array(list(sizes.values()), dtype=float)
    constant, token, pair = np.linalg.solve(np.vander(lengths, increasing=True).astype(float), found)
    if abs(pair) * lengths[-1] ** 2 < ROUNDING * found[-1]:  # blocks of a kernel, not attention scores
        (token, constant), pair = np.polyfit(lengths, found, 1), 0.0
    return Polynomial(max(0.0, float(constant)), float(token), max(0.0, float(pair)))


def _begins_another(one: Polynomial, size: Callable[[int], int], length: int) -> bool:
    """Whether a row of this length keeps more than one that is filled up to the same block."""
    return size(length) > (1.0 + ROUNDING) * one([length])


def _rows(lengths: Sequence[int]) -> Batch:
    rows = [Row(np.ones(length, dtype=np.int64), np.arange(length) > 0) for length in lengths]
    return Batch(rows, [RowReference("memory", place) for place in range(len(rows))], list(range(len(rows))))


def _layers_like_the_largest(model: nn.Module, forward: Callable[[], torch.Tensor]) -> float:
    """Return what all layers keep, in layers that keep as much as the largest one; 1 if there are no layers."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {id(part) for each in lists for part in each.modules() if part is not each}  # experts of a layer
    layers = max((list(each) for each in lists if id(each) not in inner), key=len, default=[])
    kept = [size for layer, size in _kept_by(model, layers, forward).items() if layer is not None]
    return sum(kept) / max(kept) if any(kept) else 1.0


def kept_by_backward(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that the backward pass would need from a forward pass, in addition to weights and buffers."""
    return sum(_kept_by(model, (), forward).values())


def _kept_by(
    model: nn.Module, layers: Iterable[nn.Module], forward: Callable[[], torch.Tensor]
) -> dict[nn.Module | None, int]:
    """Return what a forward pass keeps by layer, and outside of them (None)."""
    places = {_place(each) for each in (*model.parameters(), *model.buffers())}
    sizes: dict[nn.Module | None, int] = {}
    now: list[nn.Module | None] = [None]

    def pack(tensor: torch.Tensor) -> None:
        place = _place(tensor)
        if place not in places:
            places.add(place)
            sizes[now[0]] = sizes.get(now[0], 0) + tensor.untyped_storage().nbytes()

    def enter(layer: nn.Module, _given: object) -> None:
        now[0] = layer

    def leave(_layer: nn.Module, _given: object, _made: object) -> None:
        now[0] = None

    handles = [handle for each in layers for handle in (
        each.register_forward_pre_hook(enter), each.register_forward_hook(leave)
    )]  # fmt: skip
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _never_unpacked(_nothing: None) -> torch.Tensor:
    raise AssertionError("there is no backward pass")


def _place(tensor: torch.Tensor) -> StorageWeakRef:
    """Return an identifier of a tensor's memory that is the same for all views, even if it has no memory.

    No other memory gets it while it exists, even if the tensor does not any more: nothing that is counted is kept.
    """
    return cast(Any, StorageWeakRef)(tensor.untyped_storage())
