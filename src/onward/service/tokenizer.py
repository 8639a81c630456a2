"""The tokenizer of a run as its `cache/` stores it, so that neither intake nor a start loads it with transformers."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from onward.atomic import remove_tree, replace_file
from onward.config import Config
from onward.data.own_template import read_template
from onward.data.tokenizer import TokenizerState, load_tokenizer_state, save_tokenizer_state, tokenizer_files_digest
from onward.errors import ModelError
from onward.layout import RunLayout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedTokenizer:
    """What transformers loaded of a model folder.

    Args:
        state: what turns rows into tokens.
        files: the files that it writes into a checkpoint, by name.
    """

    state: TokenizerState
    files: Mapping[str, bytes]


def tokenizer_of_run(layout: RunLayout, config: Config, folder: Path) -> TokenizerState:
    """Return the tokenizer of a model folder with the chat template that the run's config names, if it names one.

    Raises:
        ConfigError: there is no such template, or it is not one.
        ModelError: there is no tokenizer, or it cannot be used.
    """
    return _stored_state(layout, folder).with_template(read_template(config.chat_template, layout.root))


def tokenizer_files_of_run(layout: RunLayout, folder: Path) -> Mapping[str, bytes]:
    """Return the files of a model folder's tokenizer as transformers writes them into a checkpoint, by name.

    Raises:
        ModelError: there is no tokenizer, or it cannot be used.
    """
    return _read_files(_files_place(layout, folder)) or _load_and_store(layout, folder).files


def _stored_state(layout: RunLayout, folder: Path) -> TokenizerState:
    return load_tokenizer_state(_state_place(layout, folder)) or _load_and_store(layout, folder).state


def _load_and_store(layout: RunLayout, folder: Path) -> LoadedTokenizer:
    loaded = load_with_files(folder)
    store_tokenizer(layout, folder, loaded)
    return loaded


def load_tokenizer_of(folder: Path) -> TokenizerState:
    """Load the tokenizer of a model folder with transformers, which takes seconds to import.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    return _state_of(_load(folder), folder)


def load_with_files(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model folder with transformers, and have it write its files.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    from onward.training.huggingface import tokenizer_files

    tokenizer = _load(folder)
    return LoadedTokenizer(_state_of(tokenizer, folder), tokenizer_files(tokenizer))


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from onward.training.model.load import load_tokenizer

    return load_tokenizer(folder)


def _state_of(tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenizerState:
    try:
        return TokenizerState.of(tokenizer)
    except ModelError as error:
        raise ModelError(error.what, where=error.where or folder, hint=error.hint) from None


def store_tokenizer(layout: RunLayout, folder: Path, loaded: LoadedTokenizer) -> None:
    """Store the tokenizer of a model folder in `cache/`, in the place of any that was there."""
    state, files = _state_place(layout, folder), _files_place(layout, folder)
    remove_tree(state.parent)
    remove_tree(files.parent)
    with contextlib.suppress(OSError):  # on a full disk it is loaded from its folder each time
        save_tokenizer_state(state, loaded.state)
        files.parent.mkdir()
        replace_file(files, _packed(loaded.files))


def _state_place(layout: RunLayout, folder: Path) -> Path:
    return layout.cache / "tokenizer" / tokenizer_files_digest(folder)


def _files_place(layout: RunLayout, folder: Path) -> Path:
    return layout.cache / "tokenizer_files" / tokenizer_files_digest(folder)


def _packed(files: Mapping[str, bytes]) -> bytes:
    """Return files as a line with a checksum, and an archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    body = stream.getvalue()
    return _checksum(body) + b"\n" + body


def _read_files(path: Path) -> dict[str, bytes] | None:
    """Return the files that were stored as `path`; None if there are none, or if it is damaged."""
    try:
        line, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if line != _checksum(body):
        return None
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _checksum(body: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(body).encode()
