"""Answers in the form of OpenAI's interface: whole, or piece by piece."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from onward.text import storable
from onward.views.chat.engine import Outcome

DONE = "data: [DONE]\n\n"
FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


def event(values: dict[str, Any]) -> str:
    """Return one event of a stream."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def failure(message: str, *, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """Return an error in the form that clients expect; a request's own words in it may be no characters at all."""
    param = None if param is None else storable(param)
    return {"error": {"message": storable(message), "type": kind, "param": param, "code": None}}


@dataclass(frozen=True)
class Shape:
    """The form of one answer.

    Args:
        is_chat: whether it belongs to a chat; otherwise to a continued text.
        model: the name under which the model is listed.
    """

    is_chat: bool
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the answer."""
        said: dict[str, Any] = {"text": outcome.text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": outcome.text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": FINISH[outcome.finish]}
        return {**self._head(outcome.step, ""), "choices": [choice], "usage": _usage(outcome)}

    def first(self) -> str:
        """Return the event that begins a stream; "" if none does."""
        return event(self._chunk({"role": "assistant", "content": ""}, None)) if self.is_chat else ""

    def piece(self, text: str) -> str:
        """Return the event of a piece of text."""
        return event(self._chunk({"content": text} if self.is_chat else text, None))

    def last(self, outcome: Outcome, *, with_usage: bool) -> str:
        """Return the events that end a stream."""
        end = event(self._chunk({} if self.is_chat else "", FINISH[outcome.finish], outcome.step))
        usage = {**self._head(outcome.step, ".chunk"), "choices": [], "usage": _usage(outcome)}
        return f"{end}{event(usage) if with_usage else ''}{DONE}"

    def _chunk(self, said: Any, finish: str | None, step: int | None = None) -> dict[str, Any]:
        own = {"delta": said} if self.is_chat else {"text": said}
        choice = {"index": 0, **own, "logprobs": None, "finish_reason": finish}
        return {**self._head(step, ".chunk"), "choices": [choice]}

    def _head(self, step: int | None, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.is_chat else "text_completion"
        state = None if step is None else f"step-{step}"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": state,
        }  # fmt: skip


def _usage(outcome: Outcome) -> dict[str, int]:
    total = outcome.prompt_tokens + outcome.tokens
    return {"prompt_tokens": outcome.prompt_tokens, "completion_tokens": outcome.tokens, "total_tokens": total}
