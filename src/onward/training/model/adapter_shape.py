"""The adapter that a config asks for on a model, and the refusal of requests that would have no effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onward.config import Config
from onward.errors import ConfigError
from onward.training.model.adapter import ALL_LINEAR, named_targets

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The index of a layer in a module's name, as PEFT finds it for `layers_to_transform`."""


def new_adapter_config(
    config: Config, base: Path | None, model: PreTrainedModel, left_out: Sequence[str] = ()
) -> LoraConfig:
    """Return the adapter that a run's config asks for on a model.

    Args:
        left_out: modules that get no adapter, by their full names.

    Raises:
        ConfigError: it asks for rows of the embedding, or for layers, that do not exist.
    """
    lora = config.lora
    layers = _layers(name for name, _ in model.named_modules())
    _require("lora.layers", lora.layers, layers, lambda layer, other: layer == other, lambda: sorted(layers))
    targets = named_targets(lora.targets)
    if lora.layers and targets == ALL_LINEAR:
        targets = _linear_layers(model)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=list(left_out) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base) if base is not None else None,
        init_lora_weights=cast(Any, lora.init if lora.init in ("gaussian", "orthogonal") else True),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        bias=lora.bias,
        target_parameters=lora.target_parameters or None,
        layers_to_transform=lora.layers or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=lora.modules_to_save or None,
        trainable_token_indices=cast(Any, _token_rows(lora.trainable_tokens, model)),
        ensure_weight_tying=_ties_saved(lora.modules_to_save, model),
    )


def require_effect(model: PeftModel, config: Config) -> None:
    """Refuse what a config asks of a new adapter if the model has nothing for it.

    Raises:
        ConfigError: it does; the message says what is missing, and what there is instead.
    """
    lora = config.lora
    parts: dict[str, nn.Module] = dict(model.get_base_model().named_modules())
    adapted = {name: part for name, part in parts.items() if isinstance(part, LoraLayer)}
    saved = [name for name, part in parts.items() if isinstance(part, ModulesToSaveWrapper)]
    stacked = ((name, part) for name, part in adapted.items() if isinstance(part, ParamWrapper))
    parameters = [plain_name(f"{name}.{part.parameter_name}") for name, part in stacked]
    modules = {name: part for name, part in adapted.items() if not isinstance(part, ParamWrapper)}
    layers = _layers(modules)
    _require("lora.target_parameters", lora.target_parameters, parameters, _ends_with, lambda: _stacked(model))
    _require("lora.layers", lora.layers, layers, lambda layer, other: layer == other, lambda: sorted(_layers(parts)))
    for key, patterns in (("lora.rank_pattern", lora.rank_pattern), ("lora.alpha_pattern", lora.alpha_pattern)):
        _require(key, patterns, adapted, _matches, lambda: sorted({name.rpartition(".")[2] for name in adapted}))
    _require("lora.modules_to_save", lora.modules_to_save, saved, lambda name, other: other.endswith(name), list)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and name.endswith(".bias")]
    if lora.bias != "none" and not trained:
        raise ConfigError(f"lora.bias is {lora.bias}, but there are no such biases", where="lora.bias", hint=_NONE)


def unsuitable_init(init: str, why: str, other: str) -> ConfigError:
    """Return the refusal of initial weights (`lora.init`) that a model's layers cannot have.

    Args:
        other: initial weights that may work.
    """
    what = f"lora.init {init} does not work with layers of this model: {why}"
    return ConfigError(what, where="lora.init", hint=f"Leave it out, or try {other}.")


def plain_name(name: str) -> str:
    """Return a name in an adapted model without the layers that the adapter put around a module."""
    return name.replace(".base_layer", "")


_NONE = "Leave it out: --set lora.bias=none"


def _require(
    key: str,
    asked: Iterable[Any],
    found: Collection[Any],
    fits: Callable[[Any, Any], bool],
    others: Callable[[], Iterable[Any]],
) -> None:
    for one in asked:
        if not any(fits(one, other) for other in found):
            there = ", ".join(map(str, others()))
            raise ConfigError(
                f"{key} names {one!r}, but the model has no such part that can be trained this way",
                where=key,
                hint=f"There is: {there}." if there else "Leave it out, or look at the names of the model's parts.",
            )


def _ends_with(name: str, other: str) -> bool:
    return other == name or other.endswith(f".{name}")


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _stacked(model: nn.Module) -> list[str]:
    """Return the ends of the names of parameters that hold several matrices in one tensor."""
    stacked = [plain_name(name) for name, weight in model.named_parameters() if weight.dim() == 3]
    return sorted({".".join(name.split(".")[-3:]) for name in stacked})


def _layers(parts: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in parts if (found := _LAYER.match(name))}


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers but the head, which is what `all-linear` means."""
    head = model.get_output_embeddings()
    linear = ((name, part) for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)))
    return sorted(name for name, part in linear if part is not head)


def _token_rows(tokens: list[int] | dict[str, list[int]], model: PreTrainedModel) -> dict[str, list[int]] | None:
    """Return `{module: token ids}`: embedding and head, unless modules are named; if tied, they count as one."""
    if not tokens:
        return None
    tables = dict(_token_tables(model))
    rows = min(len(cast(Any, table).weight) for table in tables.values())
    named = tokens if isinstance(tokens, dict) else dict.fromkeys(tables, tokens)
    for module, ids in named.items():
        if ids and max(ids) >= rows:
            raise ConfigError(
                f"lora.trainable_tokens names token {max(ids)} of {module}, which has {rows} rows",
                where="lora.trainable_tokens",
                hint=f"Name ids from 0 to {rows - 1}; new tokens are made with: onward init --set 'tokens=[...]'",
            )
    return {module: sorted(set(ids)) for module, ids in named.items()}


def _token_tables(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the embedding and, if it has weights of its own, the head, by name."""
    names = {id(part): name for name, part in model.named_modules()}
    embedding, head = model.get_input_embeddings(), cast(Any, model.get_output_embeddings())
    yield names[id(embedding)], embedding
    if head is not None and not _is_tied(model):
        yield names[id(head)], head


def _ties_saved(modules: Collection[str], model: PreTrainedModel) -> bool:
    """Whether embedding and head are tied and one of them is fully trained, so that both must be the trained one."""
    return bool(modules) and _is_tied(model) and ends(table_names(model)[0], modules)


def table_names(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of embedding and head, in one list if they are tied and in a list each if not."""
    names = {id(part): name for name, part in model.named_modules()}
    tables = (model.get_input_embeddings(), cast(Any, model.get_output_embeddings()))
    found = [names[id(table)] for table in tables if table is not None]
    return [found] if _is_tied(model) else [[name] for name in found]


def ends(names: Iterable[str], asked: Iterable[str]) -> bool:
    """Return whether something asked for is one of the names, or the end of one, as PEFT looks for modules."""
    return any(name.endswith(end) for name in names for end in asked)


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one weight."""
    head: Any = model.get_output_embeddings()
    return head is not None and head.weight is cast(Any, model.get_input_embeddings()).weight
