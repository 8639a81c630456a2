"""A base model of the run's own: with a larger vocabulary, or with an adapter's initial weights taken out of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onward.atomic import system_errors
from onward.config import Config
from onward.errors import ConfigError, ModelError, VerificationFailed
from onward.training.model.adapter import add_adapter
from onward.training.model.adapter_shape import (
    ends,
    new_adapter_config,
    require_effect,
    table_names,
    unsuitable_init,
)
from onward.training.model.load import causal_lm, load_base, load_tokenizer
from onward.training.model.quiet import quiet
from onward.training.model.roundtrip import prove_roundtrip
from onward.training.model.weights import save_adapter
from onward.training.seeds import fold, seeded

CPU = torch.device("cpu")


def make_own_base(config: Config, base: Path, tokenizer: Path, target: Path, adapter: Path) -> Config:
    """Write a run's own base with its tokenizer and, if it was taken out of the base, the adapter that the run starts
    from.

    Args:
        base: folder of the model that the config names.
        tokenizer: folder of its tokenizer.
        target: folder to write the base into.
        adapter: folder to write the adapter into.

    Returns:
        The config, with the new tokens among those whose rows an adapter trains.

    Raises:
        ConfigError: a token is in the vocabulary already, or the adapter needs something that the model lacks.
        ModelError: the base cannot be loaded.
    """
    words = load_tokenizer(tokenizer)
    model = load_base(base, torch.float32 if config.takes_from_base else None)
    with quiet(), seeded(fold(config.seed, "own base"), CPU):
        if config.tokens:
            config = _with_rows(config, _grow(model, words, config.tokens), model)
        if config.takes_from_base:
            model = _take_out(model, config, base, adapter)
        with system_errors(target):
            model.save_pretrained(target)
            words.save_pretrained(target)
    return config


def _grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add tokens to tokenizer, embedding and head; each new row is the mean of the existing rows.

    Returns:
        The ids of the new tokens.
    """
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        raise ConfigError(
            f"{', '.join(map(repr, there))}: already in the vocabulary", where="tokens",
            hint=f"Leave them out; to train their rows: lora.trainable_tokens={[known[token] for token in there]}",
        )  # fmt: skip
    before = len(tokenizer)
    added = [AddedToken(token, lstrip=False, rstrip=False, normalized=False) for token in tokens]
    cast(Any, tokenizer).add_tokens(added)
    ids = [int(cast(Any, tokenizer).convert_tokens_to_ids(token)) for token in tokens]
    rows = len(cast(Any, model.get_input_embeddings()).weight)
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in _tables(model):
            weight[ids] = weight[: min(before, rows)].float().mean(0).to(weight.dtype)
    return ids


def _tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return embedding and head, and the head's bias, each once."""
    head: Any = model.get_output_embeddings()
    embedding = cast(Any, model.get_input_embeddings()).weight
    found = [embedding, *([head.weight, getattr(head, "bias", None)] if head is not None else [])]
    return list({id(weight): weight for weight in found if weight is not None}.values())


def _with_rows(config: Config, ids: Sequence[int], model: PreTrainedModel) -> Config:
    """Return the config of an adapter that trains the new rows of embedding and head too, unless it trains them in
    full.

    Raises:
        ConfigError: in full training, `train` leaves them out.
    """
    tokens, saved = config.lora.trainable_tokens, config.lora.modules_to_save
    tables = table_names(model)
    left = [names for names in tables if not ends(names, saved)]
    if config.method == "full":
        _require_trained(config.train, tables)
        return config
    if not left:
        return config
    if isinstance(tokens, dict) or len(left) < len(tables):
        given = tokens if isinstance(tokens, dict) else dict.fromkeys((names[0] for names in left), tokens)
        named = {**given, **{names[0]: list[int]() for names in left if not ends(names, given)}}
        rows: Any = {module: sorted({*own, *ids}) for module, own in named.items()}
    else:
        rows = sorted({*tokens, *ids})
    return config.model_copy(update={"lora": config.lora.model_copy(update={"trainable_tokens": rows})})


def _require_trained(patterns: Sequence[str], tables: Sequence[Sequence[str]]) -> None:
    for names in tables if patterns else ():
        if not any(re.search(pattern, f"{name}.weight") for pattern in patterns for name in names):
            raise ConfigError(
                f"train leaves out {names[0]}, so that the rows of the new tokens would not be trained",
                where="train",
                hint=f"Add {names[0]} to train, or leave tokens out.",
            )


def _take_out(model: PreTrainedModel, config: Config, base: Path, adapter: Path) -> PreTrainedModel:
    """Write the adapter that PEFT takes out of a base's weights, and return the rest of the base."""
    shape = new_adapter_config(config, base, model)
    shape.init_lora_weights = cast(Any, config.lora.init)
    shape.lora_dropout = 0.0  # it has no part in the initial weights, and experts cannot have it
    try:
        made: PeftModel = add_adapter(model, shape)
    except ModelError as error:
        raise unsuitable_init(config.lora.init, error.what, "gaussian") from None
    require_effect(made, config)
    cast(Any, made.peft_config["default"]).init_lora_weights = True  # on the rest of the base it is a plain adapter
    adapter.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach() for name, weight in made.named_parameters() if weight.requires_grad}
    save_adapter(made, weights, adapter)
    try:
        prove_roundtrip(made, adapter, weights)
    except VerificationFailed as error:
        raise unsuitable_init(config.lora.init, error.what, "pissa") from None
    assert causal_lm(made) is model
    return cast(PreTrainedModel, cast(Any, made).unload())
