"""The tokenizer of a run, stored in `cache/` so that neither intake nor a start loads it with transformers."""

from __future__ import annotations

import contextlib
import io
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from onward.atomic import fsync_file, read_checked, remove_tree, replace_checked
from onward.config import Config
from onward.data.templates.own_template import read_template
from onward.data.tokenizer import (
    TEMPLATE_FOLDER,
    TokenizerState,
    load_tokenizer_state,
    save_tokenizer_state,
    tokenizer_files_digest,
)
from onward.errors import ModelError
from onward.layout import RunLayout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from onward.store.ledger import Ledger

EXTRAS = "tokenizer_extras"
"""The key in a run's identity that runs which earlier releases trained do not have."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """What transformers loaded from a model folder.

    Args:
        state: turns rows into tokens.
        files: the files that transformers writes into a checkpoint, by name.
    """

    state: TokenizerState
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class KeptTokenizer:
    """The tokenizer of a model folder, from the run's `cache/`, or loaded with transformers if it is not there yet.

    Args:
        folder: the model's folder; its content is digested once.
    """

    layout: RunLayout
    folder: Path

    def state(self, config: Config, ledger: Ledger) -> TokenizerState:
        """Return the state that turns rows into tokens, with the chat template of the run's config, if it names one.

        A run that an earlier release trained keeps that release's targets.

        Raises:
            ConfigError: there is no such template, or the file is not one.
            ModelError: there is no tokenizer, or it cannot be used.
        """
        own = load_tokenizer_state(_state_place(self.layout, self._digest)) or self._load().state
        state = own.with_template(read_template(config.chat_template, self.layout.root))
        identity: Mapping[str, Any] = (ledger.get("identity") if ledger.newest_checkpoint() else None) or {}
        before = replace(state, trains_closing=False)
        is_earlier = bool(identity) and identity.get(EXTRAS, before.extras) == before.extras
        return before if is_earlier else state

    def files(self) -> Mapping[str, bytes]:
        """Return the files that transformers writes into a checkpoint, by name.

        Raises:
            ModelError: there is no tokenizer, or it cannot be used.
        """
        return _read_files(_files_place(self.layout, self._digest)) or self._load().files

    def keep(self, loaded: LoadedTokenizer) -> None:
        """Store what was loaded from the folder, replacing what was stored before."""
        state, files = _state_place(self.layout, self._digest), _files_place(self.layout, self._digest)
        with contextlib.suppress(OSError):  # the disk is full, or another process keeps it now: it is loaded again
            remove_tree(state.parent)
            remove_tree(files.parent)
            save_tokenizer_state(state, loaded.state)
            files.parent.mkdir()
            replace_checked(files, _packed(loaded.files))

    @cached_property
    def _digest(self) -> str:
        return tokenizer_files_digest(self.folder)

    def _load(self) -> LoadedTokenizer:
        loaded = load_with_files(self.folder)
        self.keep(loaded)
        return loaded


def tokenizer_identity(state: TokenizerState) -> dict[str, str]:
    """Return what a run's identity contains of its tokenizer."""
    return {"tokenizer": state.fingerprint, EXTRAS: state.extras}


def is_tokenizer_of(identity: Mapping[str, Any], state: TokenizerState) -> bool:
    """Whether a tokenizer is the one in an identity; one that an earlier release locked may have no `extras`."""
    return all(identity.get(key, digest) == digest for key, digest in tokenizer_identity(state).items())


def load_tokenizer_of(folder: Path) -> TokenizerState:
    """Load the tokenizer of a model folder with transformers, which takes seconds to import.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    return _state_of(_load(folder), folder)


def load_with_files(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model folder with transformers, and let it write its files.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    from onward.training.checkpoints.huggingface import tokenizer_files

    tokenizer = _load(folder)
    return LoadedTokenizer(_state_of(tokenizer, folder), tokenizer_files(tokenizer))


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the files of a model folder that its tokenizer is loaded from, those of its named chat templates too.

    Args:
        target: an existing folder.

    Raises:
        ModelError: there is no tokenizer.
    """
    from onward.training.model.base import TOKENIZER_FILES

    own = cast(Mapping[str, str], type(_load(folder)).vocab_files_names)  # the names differ from one kind to the next
    templates = [path.relative_to(folder).as_posix() for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")]
    for name in sorted({*TOKENIZER_FILES, *own.values(), *templates}):
        if (folder / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)
            fsync_file(target / name)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from onward.training.model.load import load_tokenizer

    return load_tokenizer(folder)


def _state_of(tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenizerState:
    try:
        return TokenizerState.of(tokenizer)
    except ModelError as error:
        raise ModelError(error.what, where=error.where or folder, hint=error.hint) from None


def _state_place(layout: RunLayout, digest: str) -> Path:
    return layout.cache / "tokenizer" / digest


def _files_place(layout: RunLayout, digest: str) -> Path:
    return layout.cache / "tokenizer_files" / digest


def _packed(files: Mapping[str, bytes]) -> bytes:
    """Return files as an archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _read_files(path: Path) -> dict[str, bytes] | None:
    """Return the files that were stored as `path`; None if there are none, or if the archive is damaged."""
    body = read_checked(path)
    if body is None:
        return None
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
