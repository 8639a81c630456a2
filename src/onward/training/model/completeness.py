"""Checks that the files of a model contain exactly its weights: transformers fills in missing ones at random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import ModelError

_NAMED = 3
"""How many names of missing weights are given."""


def require_all_weights(loaded: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model if some of its weights were not in its files, or had another shape there.

    Weights that are tied to others are not missing.

    Args:
        loaded: the loading info of `from_pretrained`.

    Raises:
        ModelError: a weight is missing or does not fit.
    """
    missing = sorted(str(name) for name in loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"{_count(missing)} missing in the model's files: {_list(missing)}; they would be random numbers",
            where=folder,
            hint="Get the complete model again; a model without a head (a base encoder) cannot be trained on text.",
        )
    wrong = sorted((str(name), tuple(there), tuple(here)) for name, there, here in loaded["mismatched_keys"])
    if wrong:
        name, there, here = wrong[0]
        raise ModelError(
            f"{_count(wrong)} not of the shape that config.json says, {name} first: {list(there)} in the files, "
            f"{list(here)} in the config",
            where=folder,
            hint="Put back the config.json that belongs to these weights.",
        )


def require_no_others(loaded: Mapping[str, Any], folder: Path) -> None:
    """Refuse files with weights that the model has no place for: they belong to another model.

    Raises:
        ModelError: there are such weights.
    """
    names = sorted(str(name) for name in loaded["unexpected_keys"])
    if names:
        raise ModelError(
            f"{_count(names)} in the model's files that the model has no place for: {_list(names)}",
            where=folder,
            hint="If they are not needed, save the model without them: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER), the tokenizer too; then: onward init --model NEW_FOLDER",
        )


def _count(names: list[Any]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
