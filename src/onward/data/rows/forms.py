"""Messages in the form that a chat template reads: templates differ in how they take tool calls and reasoning."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from typing import Any

from onward.data.row_types import Chat, Message, RowError, check_strings
from onward.data.rows.end_tokens import QUESTION
from onward.data.rows.messages import REASONING_KEYS
from onward.data.rows.records import DOCUMENTS
from onward.data.templates.reads import Reads
from onward.data.templates.rendering import Renderer

ALWAYS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS))
UNNAMED = ALWAYS - {"name"}
"""Keys that are not reported as ignored if a template does not read them: they are proven, or only give an order."""

NAME, KEY, VALUE = "onwardTool", "onwardKey", "onwardValue"
CALL_ID = "abcdefghi"  # nine letters and digits, as Mistral's templates require


class Forms:
    """The form in which a template takes messages.

    Args:
        renderer: the template.
        reads: what it reads.
    """

    def __init__(self, renderer: Renderer, reads: Reads) -> None:
        self._renderer = renderer
        self._reads = reads

    def followed(self, chat: Chat) -> Chat:
        """Return a chat of which the key `documents` of its row is an argument or ignored, as the template reads it.

        Raises:
            RowError: the template reads documents, and they hold what JSON does not know.
        """
        if DOCUMENTS not in chat.ignored or DOCUMENTS not in chat.arguments:
            return chat
        if DOCUMENTS in self._reads.names:
            check_strings(chat.arguments[DOCUMENTS], DOCUMENTS)
            return replace(chat, ignored=tuple(key for key in chat.ignored if key != DOCUMENTS))
        return replace(chat, arguments={key: value for key, value in chat.arguments.items() if key != DOCUMENTS})

    def messages(self, chat: Chat) -> list[Message]:
        """Return the messages as the template takes them."""
        if max(map(len, chat.messages)) == 2:
            return chat.messages
        return [self._message(message, place) for place, message in enumerate(chat.messages, start=1)]

    def ignored(self, chat: Chat) -> list[str]:
        """Return the keys of messages and arguments of a row that the template does not read."""
        if max(map(len, chat.messages)) == 2 and not chat.arguments:
            return []
        keys = {
            f"messages.{key}": None
            for message in chat.messages
            if len(message) > 2
            for key in message
            if key not in UNNAMED and key not in self._reads.keys
        }
        unread = [name for name in chat.arguments if name not in self._reads.names]
        return [*keys, *(f"chat_template_kwargs.{name}" for name in unread)]

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the schemas of tools."""
        schema = {"name": NAME, "description": "D", "parameters": {"type": "object", "properties": {}}}
        try:
            return NAME in self._renderer.render([QUESTION], [{"type": "function", "function": schema}])
        except RowError:
            return True  # the proof of each row will show it

    def _message(self, message: Message, place: int) -> Message:
        made = {key: value for key, value in message.items() if key in ALWAYS or key in self._reads.keys}
        check_strings({key: value for key, value in made.items() if key not in UNNAMED}, f"message {place}")
        if "reasoning_content" in made and not self._reads.keys.intersection(REASONING_KEYS[:2]):
            made["reasoning"] = made["reasoning_content"]
        if "tool_calls" not in made:
            return made
        blanks = [self._blanks[isinstance(call["function"]["arguments"], str)] for call in made["tool_calls"]]
        made["tool_calls"] = [self._call(call) for call in made["tool_calls"]]
        if not made["content"].strip():
            kinds = [self._blanks[isinstance(call["function"]["arguments"], str)] for call in made["tool_calls"]]
            made["content"] = next((kind[0] for kind in [*kinds, *blanks] if kind), made["content"])
        return made

    def _call(self, call: Message) -> Message:
        arguments = call["function"]["arguments"]
        is_text = isinstance(arguments, str)
        if is_text and not self._blanks[False]:
            return call
        if not is_text and (self._blanks[False] or not self._blanks[True]):
            return call
        other = json.loads(arguments) if is_text else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": other}}

    @cached_property
    def _blanks(self) -> dict[bool, list[str | None]]:
        """The contents with which a call is written if its arguments are an object (False) or JSON text (True).

        If both are written, but differently, the template is not made for JSON text.
        """
        texts = [
            {blank: self._call_text(made, blank) for blank in ("", None)}
            for made in ({KEY: VALUE}, json.dumps({KEY: VALUE}))
        ]
        objects, strings = ([blank for blank, text in found.items() if text] for found in texts)
        alike = [blank for blank in strings if not objects or texts[1][blank] == texts[0][blank]]
        return {False: objects, True: alike}

    def _call_text(self, arguments: Any, blank: str | None) -> str | None:
        """Return the text of a chat with a call; None if the call is not written, or not as JSON would have it."""
        call = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": arguments}}
        asking: Message = {"role": "assistant", "content": blank, "tool_calls": [call]}
        result: Message = {"role": "tool", "content": "Result", "tool_call_id": CALL_ID, "name": NAME}
        answer: Message = {"role": "assistant", "content": "Answer"}
        for messages in ([QUESTION, asking, result, answer], [QUESTION, asking]):
            try:
                text = self._renderer.render(messages)
            except RowError:
                continue
            whole = all(word in text for word in (NAME, KEY, VALUE))
            return text if whole and '\\"' not in text and f"'{KEY}': '{VALUE}'" not in text else None
        return None
