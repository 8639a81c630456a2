"""How a run turns rows into tokens: its tokenizer, and the rules that rows must obey."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onward.config import Config
from onward.data.files.reading import Reading
from onward.data.row_tokenizer import Fitted, RowTokenizer, cache_key, has_target
from onward.data.row_types import Record, RowError
from onward.data.rows.template import RowText
from onward.data.templates.own_template import KEY, has_templates, training_twin
from onward.data.tokenized import PackedRow, ids_of
from onward.data.tokenizer import TokenizerState
from onward.layout import RunLayout
from onward.service.settings import changed_refusal, locked_refusal
from onward.service.tokenizer import KeptTokenizer, is_tokenizer_of
from onward.store.ledger import Ledger
from onward.text import how_many
from onward.training.model.base import base_of_run
from onward.training.model.capacity import read_capacity, require_positions

TEMPLATES_OF_TRL = "TRL ships training templates for many models, by name: pip install 'onward[templates]'"
CHECKPOINT_ROOM = 1.2
"""The room that checking leaves free on the disk, in sizes of the newest checkpoint: training needs it next."""


class RunTokenizer(RowTokenizer):
    """Turns the rows that a run is given into tokens; refuses rows without a target, and what the model cannot look up.

    Tokens of an accepted file are made again without it: an earlier release may have accepted such rows.

    Args:
        state: the tokenizer.
        config: gives `max_length` and `over_length`.
        embedding_rows: token ids are below this; None if the model's files do not tell.
    """

    def __init__(self, state: TokenizerState, config: Config, embedding_rows: int | None) -> None:
        super().__init__(state, config.max_length, config.over_length)
        is_too_large = embedding_rows is not None and self.largest_id >= embedding_rows
        self._embedding_rows = embedding_rows if is_too_large else None

    def prepare(self, record: Record, stop: Callable[[], None] = lambda: None) -> RowText:
        """Return the text of a row and which of its characters are targets.

        Args:
            stop: called again and again while a long chat is proven; may raise.

        Raises:
            RowError: the chat template refuses the row, or its targets cannot be proven. If another template is the
                remedy, the error says whether the one that TRL ships for this model takes the row.
        """
        try:
            return super().prepare(record, stop)
        except RowError as error:
            if KEY not in error.remedy or not (hint := self._other_template(record, stop)):
                raise
            raise RowError(error.reason, f"{error.remedy}; {hint}") from None

    def _other_template(self, record: Record, stop: Callable[[], None]) -> str:
        if self._twin is None:
            return self._without_twin
        name, tokenizer = self._twin
        try:
            tokenizer.prepare(record, stop)
        except RowError:
            return f"{name}, which TRL ships for training this model, does not either"
        return f"TRL ships a training template for this model: {KEY}: {name}"

    @cached_property
    def _without_twin(self) -> str:
        return "" if has_templates() else TEMPLATES_OF_TRL

    @cached_property
    def _twin(self) -> tuple[str, RowTokenizer] | None:
        twin = training_twin(self.state.chat_template)
        return None if twin is None else (twin[0], RowTokenizer(self.state.with_template(twin[1]), self.max_length))

    def fit(self, packed: PackedRow) -> Fitted:
        """Apply the length policy to one row.

        Raises:
            RowError: the row has no target, is too long and the policy is to refuse it, or the model lacks one of its
                tokens.
        """
        fitted = super().fit(packed)
        if fitted.packed is not None and not has_target(fitted.packed):
            raise RowError(
                f"nothing of the row would be trained: the tokenizer makes {how_many(len(packed), 'token')} of it",
                "remove the row: it is the end token alone, or characters that the tokenizer leaves out",
            )
        if self._embedding_rows is not None and fitted.packed is not None:
            largest = int(ids_of(fitted.packed).max())
            if largest >= self._embedding_rows:
                raise RowError(
                    f"token id {largest}, the model has {self._embedding_rows} embedding rows",
                    "remove the token from the row, or make a run of a model whose embedding has it",
                )
        return fitted


@dataclass(frozen=True)
class RowRules:
    """The rules that rows of a run must obey.

    Args:
        config: the config in force.
        tokenizer: turns rows into tokens.
        room: bytes that checking leaves free on the disk.
    """

    config: Config
    tokenizer: RowTokenizer
    room: int

    @property
    def reading(self) -> Reading:
        """How a file is read, and how many rows may be bad."""
        return Reading.of(self.config)

    def key(self, sha256: str) -> str:
        """Return the name under which the tokens of a file are kept."""
        return cache_key(sha256, self.tokenizer.state.key, self.config)


class RulesOfRun:
    """The rules of one run, rebuilt when its config changes.

    Args:
        config: returns the current config.
    """

    def __init__(self, layout: RunLayout, ledger: Ledger, config: Callable[[], Config]) -> None:
        self._layout = layout
        self._ledger = ledger
        self._read = config
        self._rules: RowRules | None = None

    def __call__(self) -> RowRules:
        """Return the rules.

        Raises:
            ConfigError: the config is refused, or asks for more positions than the model has learned.
            ModelError: the base model or its tokenizer is missing, or is no longer the run's.
        """
        config = self._read()
        if self._rules is None or config != self._rules.config:
            newest = self._ledger.newest_checkpoint()
            needed = int(newest.bytes * CHECKPOINT_ROOM) if newest else 0
            tokenizer = run_tokenizer(self._layout, self._ledger, config)
            self._rules = RowRules(config, tokenizer, needed + (config.disk_margin_mb << 20))
        return self._rules


def run_tokenizer(layout: RunLayout, ledger: Ledger, config: Config) -> RowTokenizer:
    """Return the tokenizer of a run, checked against the one that the run began with.

    Raises:
        ConfigError: `max_length` or `anchor.tokens` is above the positions that the model has learned.
        ModelError: the base model or the tokenizer is missing, or the tokenizer is not the run's.
    """
    base = base_of_run(layout.root, config.model)
    folder = layout.tokenizer(base)
    state = KeptTokenizer(layout, folder).state(config, ledger)
    identity = ledger.get("identity")
    if identity is not None and ledger.newest_checkpoint() and not is_tokenizer_of(identity, state):
        require_template_of(identity, config)
        raise changed_refusal("tokenizer or chat template", folder)
    capacity = read_capacity(base)
    require_positions(capacity, config)
    return RunTokenizer(state, config, capacity.embedding_rows)


def require_template_of(identity: Mapping[str, Any], config: Config) -> None:
    """Refuse a config that names another chat template than the run began with.

    Args:
        identity: what the run has locked; runs of earlier releases had the tokenizer's own template.

    Raises:
        ConfigError: it does.
    """
    changes = config.identity_changes(identity)
    if "chat_template" in changes:
        raise locked_refusal({"chat_template": changes["chat_template"]})
