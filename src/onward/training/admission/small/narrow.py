"""Lowers limits of a model to the length of small rows, and turns off its randomness, for a proof."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

LIMIT = 8
"""The lowered length of sliding windows, attention chunks and original position encodings, in tokens."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
_ORIGINAL = ("original_max_position_embeddings",)
_CHOICES = ("index_topk", "keep_window_size", "indexer_budget")
_OF_ROTARY = ("original_max_seq_len", "max_seq_len_cached")


def narrow(model: PreTrainedModel) -> None:
    """Lower sliding windows and the original length of position encodings to `LIMIT` tokens.

    Both sides of each limit can then be tested with rows of a few tokens. The model is then usable only for the proof.
    """
    for config in configs_of(model):
        for key in (*_WINDOWS, *_ORIGINAL):
            _lower(config, key)
        for parameters in _mappings(getattr(config, "rope_parameters", None)):
            for key in _ORIGINAL:
                if _is_above(parameters.get(key)):
                    parameters[key] = LIMIT
            if "dynamic" in str(parameters.get("rope_type")):  # its original length is the model's
                _lower(config, "max_position_embeddings")
    for part in model.modules():
        for key in (*_WINDOWS, *_OF_ROTARY):
            _lower(part, key)


def lower_choices(model: PreTrainedModel, max_length: int) -> int | None:
    """Lower the numbers of tokens that attention selects to `LIMIT`, if rows may have more.

    The model is then usable only for the proof.

    Args:
        max_length: tokens of the longest row that the run may have.

    Returns:
        The smallest number that was lowered; None if there is none.
    """
    found: list[int] = []
    for owner in (*configs_of(model), *model.modules()):
        for key in _CHOICES:
            value = vars(owner).get(key)
            if isinstance(value, int) and _is_above(value) and value < max_length:
                found.append(value)
                _lower(owner, key)
    return min(found, default=None)


@contextlib.contextmanager
def still(model: nn.Module) -> Generator[None]:
    """Turn off dropout, layer drop and jitter in the body, so that two ways to compute the same can be compared.

    Some models read them from their config in every pass (Falcon).
    """
    found: list[tuple[Any, str, float]] = []
    for owner in (*configs_of(model), *model.modules()):
        for key, value in vars(owner).items():
            is_dropout = key == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]
            if isinstance(value, float) and (is_dropout or "drop" in key or "jitter" in key):
                found.append((owner, key, value))
    for owner, key, _ in found:
        setattr(owner, key, 0.0)
    try:
        yield
    finally:
        for owner, key, value in found:
            setattr(owner, key, value)


def _lower(owner: Any, key: str) -> None:
    with contextlib.suppress(Exception):  # a config may refuse to be read or changed: then nothing is lowered
        if _is_above(vars(owner).get(key)):
            setattr(owner, key, LIMIT)


def _is_above(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > LIMIT


def configs_of(model: nn.Module) -> list[Any]:
    """Return every config that a part of the model holds, each once."""
    found = {id(config): config for part in model.modules() if (config := vars(part).get("config")) is not None}
    for config in list(found.values()):
        found |= {id(inner): inner for inner in vars(config).values() if hasattr(inner, "model_type")}
    return list(found.values())


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a mapping and those in it: models with several kinds of layers keep one for each."""
    if isinstance(value, dict):
        mapping = cast(dict[str, Any], value)
        yield mapping
        for inner in mapping.values():
            yield from _mappings(inner)
