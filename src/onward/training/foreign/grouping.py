"""How releases of transformers, and tools built on it, divide trained weights into optimizer groups, by name.

An `optimizer.pt` knows weights only by their place in these groups. The sizes of the groups and the shapes of the
moments show which division was used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from onward.training.optimizers import ADAMW

Names = list[list[str]]


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _divided(model: nn.Module, decayed: set[str]) -> Names:
    trained = _trained(model)
    return [[name for name in trained if name in decayed], [name for name in trained if name not in decayed]]


def _transformers_5(model: nn.Module) -> Names:
    return [[name for name, _ in group] for group in ADAMW.groups(model)]


def _by_class(model: nn.Module, *, any_norm: bool) -> Names:
    """Divide like transformers 4: neither biases nor layers of the norm classes that it knows have weight decay."""
    norms = {type(module) for module in model.modules() if "RMSNorm" in type(module).__name__ and any_norm}
    decayed = {name for name in get_parameter_names(model, [nn.LayerNorm, *norms]) if "bias" not in name}
    return _divided(model, decayed)


def _transformers_4(model: nn.Module) -> Names:
    return _by_class(model, any_norm=True)


def _transformers_4_few_norms(model: nn.Module) -> Names:
    return _by_class(model, any_norm=False)


def _one_group(model: nn.Module) -> Names:
    return [_trained(model)]


def _decayed_last(model: nn.Module) -> Names:
    return _transformers_5(model)[::-1]


def _axolotl(model: nn.Module) -> Names:
    """Divide like Axolotl if embeddings have a learning rate of their own."""
    apart = [name for name in _trained(model) if "embed_tokens" in name or "lm_head" in name]
    decayed, others = ([name for name in group if name not in apart] for group in _transformers_5(model))
    return [decayed, apart, others]


def _lora_plus(model: nn.Module) -> Names:
    """Divide like PEFT's `create_loraplus_optimizer` and LLaMA-Factory: matrices B have their own learning rate."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    apart = [name for name in trained if "lora_embedding" in name]
    second = [name for name in trained if name not in apart and ("lora_B" in name or trained[name].ndim == 1)]
    decayed, others = ([name for name in group if name in second] for group in _transformers_5(model))
    return [[name for name in trained if name not in (*apart, *second)], apart, decayed, others]


GROUPINGS: tuple[Callable[[nn.Module], Names], ...] = (
    _transformers_5, _transformers_4, _transformers_4_few_norms, _one_group, _decayed_last, _axolotl, _lora_plus,
)  # fmt: skip
"""Every known division, the likeliest first."""


def groupings(model: nn.Module, left_out: Collection[str] = ()) -> Iterator[Names]:
    """Yield the non-empty groups of every known division of a model's trained weights, the likeliest first.

    Args:
        left_out: frozen weights that a Trainer would have trained; they are in the groups that come after all others.
    """
    for grouping in GROUPINGS:
        yield [group for group in grouping(model) if group]
    frozen = [weight for name, weight in model.named_parameters() if name in left_out and not weight.requires_grad]
    if not frozen:
        return
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        found = [[group for group in grouping(model) if group] for grouping in GROUPINGS]
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    yield from found
