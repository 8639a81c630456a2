"""What a base model can take, read from its files without loading it: token ids and positions.

Needs no torch: shapes are in the headers of safetensors files, the rest is in `config.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from onward.config import Config
from onward.data.tokenizer import TokenizerState
from onward.errors import ConfigError, ModelError, Unreadable

INDEX = "model.safetensors.index.json"
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|tokens_embed)\.weight$")
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings?|positions_embed|pos_embed)\.weight$")
"""Tables of learned absolute positions: GPT-2, GPT-Neo and GPTBigCode; OPT and BioGPT; BERT's family; the first GPT."""
_OTHER_INPUT = re.compile(r"vision|visual|image|audio|speech|(?:^|\.)encoder\.")
"""Parts of a model whose embeddings are not those of text."""
_POSITION_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_PADDED_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "xmod", "data2vec-text", "roberta-prelayernorm"})
"""Model types whose first position comes after the padding token's id, so that the table has unused rows."""
_LARGEST_HEADER = 100_000_000
"""The largest header that the format allows, in bytes."""


@dataclass(frozen=True)
class Capacity:
    """The limits of a base model; None if its files do not tell, or if there is no limit.

    Args:
        folder: the model's folder.
        embedding_rows: token ids must be below this.
        learned_positions: tokens of the longest row, for models with a learned vector per position.
        padding_id: the token id that the model's config names for padding.
    """

    folder: Path
    embedding_rows: int | None = None
    learned_positions: int | None = None
    padding_id: int | None = None


def read_capacity(folder: Path) -> Capacity:
    """Read the limits of the base model in a folder.

    Raises:
        Unreadable: a file cannot be read now.
    """
    config = _read_json(folder / "config.json")
    tables = {name: rows for name, rows in _tables(folder) if not _OTHER_INPUT.search(name)}
    embeddings = [rows for name, rows in tables.items() if _EMBEDDING.search(name)]
    rows = min(embeddings, default=_number(config, "vocab_size"))
    positions = [rows for name, rows in tables.items() if _POSITIONS.search(name)]
    longest = _usable(min(positions), config) if positions else None
    return Capacity(folder, rows, longest, _number(config, "pad_token_id"))


def require_fits(capacity: Capacity, *, largest_token_id: int | None = None, max_length: int | None = None) -> None:
    """Refuse rows on which a model could only fail with an index error.

    Args:
        largest_token_id: the largest id to be trained; None leaves token ids unchecked.
        max_length: the config's `max_length`; None leaves positions unchecked.

    Raises:
        ModelError: a token id is beyond the embedding.
        ConfigError: rows may be longer than the positions that the model has learned.
    """
    rows, positions = capacity.embedding_rows, capacity.learned_positions
    if rows is not None and largest_token_id is not None and largest_token_id >= rows:
        raise ModelError(
            f"the tokenizer gives token id {largest_token_id}, the model's embedding has {rows} rows (0 to {rows - 1})",
            where=capacity.folder,
            hint="Use the tokenizer that belongs to the model, or add the rows with transformers "
            "(model.resize_token_embeddings(len(tokenizer)), save_pretrained) and make a run of that folder.",
        )
    if positions is not None and max_length is not None and max_length > positions:
        raise ConfigError(
            f"max_length is {max_length}, the model has learned {positions} positions",
            where="max_length",
            hint=f"Set max_length to at most {positions}: --set max_length={positions}, or in the config.",
        )


def require_positions(capacity: Capacity, config: Config) -> None:
    """Refuse a config whose rows, or whose anchor texts in the loss, may be longer than a model's positions.

    Raises:
        ConfigError: they may.
    """
    require_fits(capacity, max_length=config.max_length)
    if config.anchor.weight and config.anchor.rows and (what := anchor_excess(capacity, config)):
        positions = capacity.learned_positions
        hint = f"Set anchor.tokens to at most {positions}: --set anchor.tokens={positions}, or in the config."
        raise ConfigError(what, where="anchor.tokens", hint=hint)


def anchor_excess(capacity: Capacity, config: Config) -> str:
    """Return in words that anchor texts are longer than the positions that a model has learned; empty if they fit."""
    tokens, positions = config.anchor.tokens, capacity.learned_positions
    if positions is None or tokens <= positions:
        return ""
    return f"anchor.tokens is {tokens}, the model has learned {positions} positions"


def require_embedded(capacity: Capacity, tokenizer: TokenizerState) -> None:
    """Refuse a tokenizer whose template or end of text needs tokens that the model's embedding lacks.

    Raises:
        ModelError: a token that every chat has, that begins or ends a text, or that pads rows, is beyond the embedding.
    """
    rows, padding = capacity.embedding_rows, capacity.padding_id
    if rows is not None and padding is not None and padding >= rows:
        raise ModelError(
            f"it names token id {padding} for padding, the model's embedding has {rows} rows (0 to {rows - 1})",
            where=capacity.folder / "config.json",
            hint=f'Set "pad_token_id" there to one that it has, such as the end token\'s: {tokenizer.eos_id}',
        )
    named = [tokenizer.bos_id, tokenizer.eos_id]
    written = [token for token in tokenizer.special_tokens if token in tokenizer.chat_template]
    ids = [tokenizer.tokenizer.token_to_id(token) for token in written]
    require_fits(capacity, largest_token_id=max((number for number in [*named, *ids] if number is not None), default=0))


def _usable(rows: int, config: Mapping[str, Any]) -> int:
    """Return how many rows of a table of positions a text can use: some models skip the first ones."""
    if config.get("model_type") in _PADDED_POSITIONS:
        return rows - (_number(config, "pad_token_id") or 0) - 1
    stated = [value for key in _POSITION_KEYS if (value := _number(config, key))]
    return min([rows, *stated])


def _tables(folder: Path) -> Iterable[tuple[str, int]]:
    """Yield name and rows of every two-dimensional tensor."""
    for path in _weight_files(folder):
        for name, entry in _read_json(path, _header).items():
            shape = cast(dict[str, Any], entry).get("shape") if isinstance(entry, dict) else None
            if isinstance(shape, list) and len(cast(list[Any], shape)) == 2:
                yield name, int(cast(list[int], shape)[0])


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that contain a relevant table: those that the index names, or all."""
    names = cast(Mapping[str, Any], _read_json(folder / INDEX).get("weight_map", {}))
    indexed = {folder / str(file) for name, file in names.items() if _EMBEDDING.search(name) or _POSITIONS.search(name)}
    return sorted(indexed) if names else sorted(folder.glob("*.safetensors"))


def _header(stream: BinaryIO) -> bytes:
    """Return the header of a safetensors file."""
    size = int.from_bytes(stream.read(8), "little")
    return stream.read(size) if size <= _LARGEST_HEADER else b""


def _read_json(path: Path, part: Callable[[BinaryIO], bytes] = lambda stream: stream.read()) -> Mapping[str, Any]:
    """Return the JSON object that a file, or a part of it, holds; empty if there is none."""
    try:
        with path.open("rb") as stream:
            return _as_mapping(part(stream))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise Unreadable.of(error, path) from None


def _as_mapping(data: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], values) if isinstance(values, dict) else {}


def _number(config: Mapping[str, Any], key: str) -> int | None:
    """Return a number from a config, from its text part if the model has several parts."""
    text = config.get("text_config")
    value = config.get(key, cast(Mapping[str, Any], text).get(key) if isinstance(text, dict) else None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
