"""Finds and proves which characters of a rendered chat the model has to produce: every answer with its end token.

Templates with `{% generation %}` markers say so themselves. In the others, an answer is the text between the end of the
prompt that inference would have and the token at which inference stops. Everything the messages say must be in the
text, once and in place. What cannot be proven is refused; transformers only warns, and trains on an empty mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any

from onward.data.rendering import GENERATION_END, GENERATION_START, Renderer
from onward.data.row_types import Chat, Message, RowError
from onward.data.rows.end_tokens import PROBE, QUESTION, end_tokens, without_marks
from onward.data.rows.forms import Forms
from onward.data.rows.plain import PlainChats
from onward.data.rows.proof import REMEDY, lay_out
from onward.data.rows.turns import THINK_START, Habits, Span, Target, Turns
from onward.data.tokenizer import TokenizerState

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_TEMPLATE = RowError(
    "the tokenizer has no chat template", "use prompt/completion rows, or a model with a chat template"
)


@dataclass(frozen=True)
class RowText:
    """A row as text, ready for the tokenizer.

    Args:
        text: what is tokenized.
        spans: the character ranges [start, end) that are targets, in order.
        closed: whether the text has its own control tokens (a rendered chat). If not, the tokenizer's special tokens
            are added, and an end token closes the row; it counts as one more character after the text.
        ignored: keys of the row that nothing reads.
        weighed: weights other than 1, each with the spans it applies to.
    """

    text: str
    spans: list[Span]
    closed: bool
    ignored: tuple[str, ...] = ()
    weighed: tuple[tuple[float, list[Span]], ...] = ()


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        state: the tokenizer, with its chat template and special tokens.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def __init__(self, state: TokenizerState) -> None:
        self._renderer = _renderer(state) if state.chat_template else None
        if self._renderer is None:
            return
        self._marked = bool(GENERATION_BLOCK.search(state.chat_template))
        self._reads = self._renderer.reads()
        self._forms = Forms(self._renderer, self._reads)
        self._habits = _habits(self._renderer, state)
        self._start = state.special_tokens_map.get("bos_token", "")
        ends = self._habits.ends
        endings = (ends.inner, ends.last, GENERATION_START, GENERATION_END)
        self._control = tuple(dict.fromkeys(ending for ending in endings if ending))
        self._plain = PlainChats(self._proven)

    def render(self, chat: Chat) -> tuple[str, list[Span]]:
        """Return the text of a chat and the character ranges [start, end) that the model has to produce.

        There is one range per assistant turn in the loss (with markers, per marked block), in order, without overlap.

        Raises:
            RowError: the template refuses the chat, or it cannot be proven that exactly what the chat says is trained.
        """
        if self._renderer is None:
            raise NO_TEMPLATE
        messages = self._forms.messages(chat)
        is_plain = not chat.tools and not chat.arguments and max(map(len, messages)) == 2
        texts: list[str] = [message["content"] for message in messages] if is_plain else []
        said = "\0".join(texts)
        self._refuse_control_tokens(said if is_plain else chat.messages)
        marked = self._renderer.render(messages, chat.tools, chat.arguments)
        text = without_marks(marked) if self._marked else marked
        if self._start and text.startswith(2 * self._start):
            raise RowError(f"the chat template writes the start token {self._start!r} twice", REMEDY)
        if is_plain and not self._reads.weighs and not any(mark in said for mark in self._reads.marks):
            spans = self._plain.targets(chat, texts, text)
            if spans is not None:
                return text, spans
        return text, [(target.start, target.end) for target in self._targets(chat, messages, marked)]

    def prompt(self, chat: Chat) -> str:
        """Return the text that asks the model for the next answer in a chat, exactly as before the answers in training.

        Raises:
            RowError: there is no template, it refuses the chat or leaves its tools out, or a message contains a control
                token.
        """
        if self._renderer is None:
            raise NO_TEMPLATE
        self._refuse_control_tokens(chat.messages)
        asking = without_marks(
            self._renderer.render(self._forms.messages(chat), chat.tools, chat.arguments, prompt=True)
        )
        self._require_tools(chat, asking)
        return asking + self._habits.header

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens at which an answer ends; empty if the template writes none."""
        if self._renderer is None:
            return ()
        ends = (self._habits.ends.inner, self._habits.ends.last)
        firsts = (next((token for token in self._habits.special_tokens if end.startswith(token)), "") for end in ends)
        return tuple(dict.fromkeys(token for token in firsts if token))

    def ignored(self, chat: Chat) -> tuple[str, ...]:
        """Return the keys of a row and of its messages that nothing reads."""
        if self._renderer is None:
            return chat.ignored
        return (*chat.ignored, *self._forms.ignored(chat))

    def _proven(self, chat: Chat) -> tuple[str, list[Target]]:
        assert self._renderer is not None
        messages = self._forms.messages(chat)
        marked = self._renderer.render(messages, chat.tools, chat.arguments)
        return without_marks(marked), self._targets(chat, messages, marked)

    def _targets(self, chat: Chat, messages: Sequence[Message], marked: str) -> list[Target]:
        """Return the proven targets of a chat from its messages in the template's form and their marked text."""
        assert self._renderer is not None
        text, spans = _split_marks(marked)
        render = partial(_rendered, self._renderer, chat)
        layout = lay_out(messages, text, render, self._reads.marks)
        self._require_tools(chat, text)
        turns = Turns(layout, messages, render, self._habits)
        return turns.marked(chat.turns, spans) if self._marked else turns.found(chat.turns)

    def _require_tools(self, chat: Chat, text: str) -> None:
        for tool in chat.tools or ():
            named = tool.get("function", tool)
            name = named.get("name") if isinstance(named, dict) else None
            if not self._forms.writes_tools or (isinstance(name, str) and name not in text):
                raise RowError("the chat template does not write the tools of the row", REMEDY)

    def _refuse_control_tokens(self, value: Any) -> None:
        if isinstance(value, str):
            for token in self._control:
                if token in value:
                    raise RowError(
                        f"a message contains the control token {token!r}", "remove it: the template adds it by itself"
                    )
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                self._refuse_control_tokens(item)


def _rendered(renderer: Renderer, chat: Chat, messages: Sequence[Message], *, prompt: bool = False) -> str:
    return without_marks(renderer.render(list(messages), chat.tools, chat.arguments, prompt=prompt))


def _split_marks(marked: str) -> tuple[str, list[Span]]:
    """Remove the generation marks from a text; return the text with the ranges that they enclosed."""
    parts: list[str] = []
    spans: list[Span] = []
    length = 0
    for piece in marked.split(GENERATION_START):
        inside, mark, outside = piece.partition(GENERATION_END)
        if mark and inside:
            spans.append((length, length + len(inside)))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(parts), spans


def _renderer(state: TokenizerState) -> Renderer:
    """Return the renderer of a template; it passes contents as lists of parts if the template needs that."""
    renderer = Renderer(state.chat_template, state.special_tokens_map)
    in_parts = Renderer(state.chat_template, state.special_tokens_map, parts=True)
    word = PROBE.format(0)
    for candidate in (renderer, in_parts):
        for role in ("user", "assistant"):
            try:
                if word in candidate.render([QUESTION, {"role": role, "content": word}]):
                    return candidate
            except RowError:
                continue
    return renderer


def _habits(renderer: Renderer, state: TokenizerState) -> Habits:
    tokens: Sequence[str] = state.special_tokens
    ends = end_tokens(renderer, tokens)
    if not ends.last:  # a tokenizer may have the token without marking it as special
        added = [token.content for token in state.tokenizer.get_added_tokens_decoder().values()]
        tokens = sorted(added, key=lambda token: (-len(token), token))
        ends = end_tokens(renderer, tokens)
    has_prompt, prompt = _generation_prompt(renderer, state.special_tokens)
    return Habits(ends, tokens, prompt, "" if has_prompt else _header(renderer))


def _generation_prompt(renderer: Renderer, special_tokens: Sequence[str]) -> tuple[bool, str]:
    """Return whether the template has a generation prompt, and the prompt if a special token proves its origin, or "".

    A prompt without a special token could just as well be part of a message.
    """
    question: list[Message] = [QUESTION]
    try:
        without, asking = (without_marks(renderer.render(question, prompt=prompt)) for prompt in (False, True))
    except RowError:
        return False, ""
    prompt = asking.removeprefix(without) if asking.startswith(without) else ""
    return asking != without, prompt if any(token in prompt for token in special_tokens) else ""


def _header(renderer: Renderer) -> str:
    """Return what the template writes before an answer, with or without a thought first."""
    word, thought = PROBE.format(0), PROBE.format(1)
    answer: Message = {"role": "assistant", "content": word}
    thinking: Message = {**answer, "reasoning_content": thought, "thinking": thought, "reasoning": thought}
    try:
        asking = without_marks(renderer.render([QUESTION], prompt=True))
        texts = [without_marks(renderer.render([QUESTION, message])) for message in (answer, thinking)]
    except RowError:
        return ""
    if not all(text.startswith(asking) and word in text for text in texts):
        return ""
    before = [text[len(asking) :].partition(word)[0].partition(thought)[0] for text in texts]
    return commonprefix(before).partition(THINK_START)[0]  # noqa: RUF071 (texts, not paths)
