"""Which weights are trained: those that no gradient reaches, those without an adapter, and the share of the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from onward.training.admission.findings import pattern_of
from onward.training.model.adapter_shape import plain_name

_LARGE = 0.02
"""The share of the model from which a kind of matrices without an adapter is reported."""


def without_gradient(trained: Iterable[str], reached: Collection[str]) -> tuple[str, ...]:
    """Return the trained weights that no gradient can reach.

    An expert that no token of a small row was routed to does not count if another one of its layer was reached.

    Args:
        trained: names of all trained weights.
        reached: names of the weights that got a gradient.
    """
    experts = {expert for name in reached if (expert := _without_expert(name)) is not None}
    return tuple(name for name in trained if name not in reached and _without_expert(name) not in experts)


def _without_expert(name: str) -> str | None:
    """Return a name without the expert's number; None if it contains only the number of its layer."""
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
        found[plain_name(module)] = None
    return tuple(found)


def weights_of(names: Iterable[str], left_out: frozenset[str]) -> list[str]:
    """Return those of a model's weights that a run leaves out by these names: weights, or modules of the base."""
    return [name for name in names if name in left_out or not left_out.isdisjoint(modules_of([name]))]


def share_reached(model: nn.Module, base: PreTrainedModel) -> float:
    """Return the share of the weights outside embeddings and head that are trained or have an adapter."""
    reached, others = _split(model, base)
    total = sum(parameter.numel() for parameter in [*reached.values(), *others.values()])
    return sum(parameter.numel() for parameter in reached.values()) / max(total, 1)


def large_without_adapter(model: nn.Module, base: PreTrainedModel, left_out: Collection[str]) -> tuple[str, ...]:
    """Return matrices without an adapter that are a considerable part of the model, by the ends of their names.

    Args:
        left_out: modules that no gradient reaches, which are reported separately.
    """
    reached, others = _split(model, base)
    total = sum(parameter.numel() for parameter in [*reached.values(), *others.values()])
    sizes: dict[str, int] = {}
    for name, parameter in others.items():
        plain = plain_name(name)
        if parameter.dim() >= 2 and not any(plain.startswith(f"{module}.") for module in left_out):
            end = pattern_of(plain).rpartition("*.")[2]
            sizes[end] = sizes.get(end, 0) + parameter.numel()
    return tuple(name for name, size in sizes.items() if size >= _LARGE * total)


def _split(model: nn.Module, base: PreTrainedModel) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the weights outside embeddings and head that are trained or have an adapter, and all others."""
    tables = [part for part in base.modules() if isinstance(part, nn.Embedding)]
    outside = _ids([*tables, base.get_input_embeddings(), base.get_output_embeddings()])
    adapted = _adapted(model)
    reached: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in base.named_parameters():
        if id(parameter) in outside or ".lora_" in name:
            continue
        (reached if parameter.requires_grad or id(parameter) in adapted else others)[name] = parameter
    return reached, others


def _adapted(model: nn.Module) -> set[int]:
    """Return the `id` of each weight with a trained adapter."""
    found: set[int] = set()
    for part in model.modules():
        if isinstance(part, BaseTunerLayer) and any(weight.requires_grad for weight in part.parameters()):
            held: Any = part.get_base_layer()
            name = getattr(part, "parameter_name", None)
            own = [getattr(held, name)] if isinstance(name, str) else cast(nn.Module, held).parameters(recurse=False)
            found |= {id(parameter) for parameter in own}
    return found


def _ids(parts: Iterable[Any]) -> set[int]:
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
