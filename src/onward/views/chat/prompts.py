"""Prompts for a model: token ids, formatted like the run's rows, and the ids at which an answer stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onward.data.row_types import Chat, Message, RowError, check_text
from onward.data.rows.template import ChatTemplate
from onward.data.tokenizer import TokenizerState, closing_tokens
from onward.errors import UsageError


class Prompts:
    """Prompts for a model.

    Args:
        state: the run's tokenizer with its chat template.
    """

    def __init__(self, state: TokenizerState) -> None:
        self._state = state
        self._template = ChatTemplate(state)
        vocabulary = state.tokenizer.get_vocab(with_added_tokens=True)
        stops = [vocabulary[token] for token in self._template.stops if token in vocabulary]
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys([*stops, *([] if state.eos_id is None else [state.eos_id])])
        )
        """Ids of the tokens at which an answer ends."""

    @property
    def has_template(self) -> bool:
        """Whether the model takes messages; if not, it continues a text."""
        return bool(self._state.chat_template)

    def of_messages(self, messages: Sequence[Message], tools: list[object] | None = None) -> list[int]:
        """Return the token ids that ask for the next answer to messages.

        Args:
            messages: each with `role` and `content`, as in a row.

        Raises:
            UsageError: the run's chat template refuses them, or they contain invalid characters.
        """
        try:
            text = self._template.prompt(Chat(list(messages), tools))
        except RowError as error:
            raise UsageError(f"the messages cannot be sent to the model: {error.reason}", hint=error.remedy) from None
        _require_characters(text)
        return self._state.tokenizer.encode(text, add_special_tokens=False).ids

    def of_text(self, text: str) -> list[int]:
        """Return the token ids of a text that the model should continue, without those that would close it.

        Raises:
            UsageError: it contains invalid characters.
        """
        _require_characters(text)
        encoding: Any = self._state.tokenizer.encode(text, add_special_tokens=True)
        ids: list[int] = encoding.ids[: len(encoding.ids) - closing_tokens(encoding)]
        while ids and ids[-1] == self._state.eos_id:
            ids.pop()
        return ids


def _require_characters(text: str) -> None:
    """Refuse half of a surrogate pair, which comes from bytes that are not UTF-8 or from half an escape in JSON."""
    try:
        check_text(text, "the prompt")
    except RowError as error:
        raise UsageError(error.reason, hint="Type it again: some of its bytes were not UTF-8.") from None
