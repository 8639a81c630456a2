"""Merges a base and its adapter into one model, and proves that it computes what they compute together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from onward.atomic import system_errors
from onward.errors import VerificationFailed
from onward.training.model.load import load_model
from onward.training.model.quiet import quiet

TOLERANCE = 1e-4
"""The largest difference of float32 logits, relative to the largest logit, that other orders of sums explain."""
ROWS, LENGTH = 2, 48
"""The shape of the tokens that both models are run on."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merging:
    """What merging changed.

    Args:
        merged: largest difference of logits between base with adapter and the merged model, both in float32.
        written: the same for the model as it was written and read back, computed in float32.
        largest: the largest logit.
    """

    merged: float
    written: float
    largest: float


def write_merged(
    checkpoint: Path, base: Path, dtype: torch.dtype, target: Path, stop_ids: Sequence[int] = ()
) -> Merging:
    """Write the model of a checkpoint, its adapter merged into a freshly loaded base, and prove it.

    Args:
        checkpoint: an adapter, or a full model.
        base: the base of an adapter; it is loaded as it is, even if training quantizes it.
        dtype: type of the weights that are written.
        target: folder to write into.
        stop_ids: ids of the tokens at which an answer ends; who generates with the model stops there too.

    Raises:
        VerificationFailed: the merged model, or what was written, computes something else.
    """
    model = load_model(checkpoint, base, CPU, torch.float32)
    tokens = _tokens(model)
    expected = _logits(model, tokens)
    with quiet():
        whole = cast(PreTrainedModel, cast(Any, model).merge_and_unload() if isinstance(model, PeftModel) else model)
    largest = float(expected.abs().max())
    merged = _require_equal(expected, _logits(whole, tokens), TOLERANCE * largest, "the merged model")
    _let_stop(whole, stop_ids)
    _tell_untied(whole)
    weights = {name: weight.to(dtype) for name, weight in whole.state_dict().items() if weight.is_floating_point()}
    _write(whole, dtype, target)
    del model, whole
    back = load_model(target, target, CPU, dtype)
    for name, weight in back.state_dict().items():
        if name in weights and not torch.equal(weight, weights[name]):
            raise VerificationFailed(f"weight {name} was not written as it is", where=target)
    written = float((_logits(back.float(), tokens) - expected).abs().max())
    return Merging(merged, written, largest)


def _let_stop(model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Add ids to those at which generation ends: a base ends texts, and often not the turns of a chat."""
    generation: Any = model.generation_config
    if generation is None:
        return
    own: int | list[int] | None = generation.eos_token_id
    known = own if isinstance(own, list) else [] if own is None else [own]
    if not set(stop_ids) <= set(known):
        generation.eos_token_id = list(dict.fromkeys([*known, *stop_ids]))


def _tell_untied(model: PreTrainedModel) -> None:
    """Correct a config that ties embedding and head though its files have two: other programs follow the config."""
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = model.config.tie_word_embeddings = torch.equal(head.weight, embedding.weight)


def _write(model: PreTrainedModel, dtype: torch.dtype, target: Path) -> None:
    model.to(cast(Any, dtype))
    model.config.use_cache = True
    generation: Any = model.generation_config
    if generation is not None and not generation.do_sample:  # sampling settings are refused if decoding is greedy
        generation.temperature = generation.top_p = generation.top_k = None
    with quiet(), system_errors(target):
        model.save_pretrained(target)


def _tokens(model: nn.Module) -> torch.Tensor:
    """Return the tokens that both models are run on, shape (ROWS, LENGTH): a function of the vocabulary's size."""
    rows = int(cast(Any, model).get_input_embeddings().weight.shape[0])
    return torch.randint(rows, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits.float()


def _require_equal(expected: torch.Tensor, found: torch.Tensor, tolerance: float, what: str) -> float:
    difference = float((expected - found).abs().max())
    if not difference <= tolerance:
        raise VerificationFailed(
            f"{what} gives different logits from base and adapter: they differ by {difference:.3g}",
            hint="Export the adapter, which is used alongside its base: --format adapter",
        )
    return difference
