"""The tokenizer of a run as its `cache/` stores it, so that neither intake nor a start loads it with transformers."""

from __future__ import annotations

import contextlib
from pathlib import Path

from onward.atomic import remove_tree
from onward.config import Config
from onward.data.own_template import read_template
from onward.data.tokenizer import TokenizerState, load_tokenizer_state, save_tokenizer_state, tokenizer_files_digest
from onward.errors import ModelError
from onward.layout import RunLayout


def tokenizer_of_run(layout: RunLayout, config: Config, folder: Path) -> TokenizerState:
    """Return the tokenizer of a model folder with the chat template that the run's config names, if it names one.

    Raises:
        ConfigError: there is no such template, or it is not one.
        ModelError: there is no tokenizer, or it cannot be used.
    """
    return stored_tokenizer(layout, folder).with_template(read_template(config.chat_template, layout.root))


def stored_tokenizer(layout: RunLayout, folder: Path) -> TokenizerState:
    """Return the tokenizer of a model folder as it is stored in `cache/`; where it is not, it is loaded and stored.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    state = load_tokenizer_state(_place(layout, folder))
    if state is None:
        state = load_tokenizer_of(folder)
        store_tokenizer(layout, folder, state)
    return state


def load_tokenizer_of(folder: Path) -> TokenizerState:
    """Load the tokenizer of a model folder with transformers, which takes seconds to import.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    from onward.training.model.load import load_tokenizer

    try:
        return TokenizerState.of(load_tokenizer(folder))
    except ModelError as error:
        raise ModelError(error.what, where=error.where or folder, hint=error.hint) from None


def store_tokenizer(layout: RunLayout, folder: Path, state: TokenizerState) -> None:
    """Store the tokenizer of a model folder in `cache/`, in the place of any that was there."""
    path = _place(layout, folder)
    remove_tree(path.parent)
    with contextlib.suppress(OSError):  # on a full disk it is loaded from its folder each time
        save_tokenizer_state(path, state)


def _place(layout: RunLayout, folder: Path) -> Path:
    return layout.cache / "tokenizer" / tokenizer_files_digest(folder)
