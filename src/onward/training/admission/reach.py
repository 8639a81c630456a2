"""Which weights are trained: those that no gradient reaches, those that an adapter passes over, and the share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from onward.training.admission.findings import pattern_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def without_gradient(trained: Iterable[str], reached: Collection[str]) -> tuple[str, ...]:
    """Return the trained weights that no gradient can reach.

    An expert that no token of a small row was sent to is none of them: one beside it was reached.

    Args:
        trained: names of all trained weights.
        reached: names of those that got a gradient.
    """
    experts = {expert for name in reached if (expert := _beside(name)) is not None}
    return tuple(name for name in trained if name not in reached and _beside(name) not in experts)


def _beside(name: str) -> str | None:
    """Return a name without the number of the expert in it; None where it has no more than that of its layer."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if len(numbers) < 2:
        return None
    return ".".join([*parts[: numbers[-1]], "*", *parts[numbers[-1] + 1 :]])


def modules_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of the base that weights of an adapter belong to, by their names in the base."""
    found: dict[str, None] = {}
    for name in names:
        module = name.partition(".lora_")[0].removeprefix("base_model.model.")
        found[module.replace(".base_layer", "")] = None
    return tuple(found)


def share_reached(model: nn.Module, base: PreTrainedModel) -> float:
    """Return which share of the weights outside embeddings and head is trained, or has an adapter."""
    tables = [part for part in base.modules() if isinstance(part, nn.Embedding)]
    outside = _ids([*tables, base.get_input_embeddings(), base.get_output_embeddings()])
    adapted: set[int] = set()
    for part in model.modules():
        if isinstance(part, BaseTunerLayer) and any(weight.requires_grad for weight in part.parameters()):
            held: Any = part.get_base_layer()
            name = getattr(part, "parameter_name", None)
            own = [getattr(held, name)] if isinstance(name, str) else cast(nn.Module, held).parameters(recurse=False)
            adapted |= {id(parameter) for parameter in own}
    total = reached = 0
    for name, parameter in base.named_parameters():
        if id(parameter) in outside or ".lora_" in name:
            continue
        total += parameter.numel()
        reached += parameter.numel() if parameter.requires_grad or id(parameter) in adapted else 0
    return reached / max(total, 1)


def stacked_without_adapter(model: nn.Module) -> tuple[str, ...]:
    """Return weights of experts, kept as one tensor of three dimensions, that have no adapter: names without layers."""
    wrapped: set[int] = set()
    for part in model.modules():
        name = getattr(part, "parameter_name", None)
        if isinstance(part, BaseTunerLayer) and isinstance(name, str):
            wrapped.add(id(getattr(part.get_base_layer(), name)))
    found: dict[str, None] = {}
    for prefix, part in model.named_modules():
        if isinstance(part, _CONVOLUTIONS):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            is_stack = parameter.dim() == 3 and min(parameter.shape) > 1 and not parameter.requires_grad
            if is_stack and id(parameter) not in wrapped:
                full = f"{prefix}.{name}".removeprefix("base_model.model.")
                found[pattern_of(full).rpartition("*.")[2]] = None
    return tuple(found)


def _ids(parts: Iterable[Any]) -> set[int]:
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
