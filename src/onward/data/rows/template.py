"""Finds and proves which characters of a rendered chat the model has to produce: every answer with its end token.

Templates with `{% generation %}` markers say so themselves. In the others, an answer is the text between the end of the
prompt that inference would have and the token at which inference stops. Everything the messages say must be in the
text, once and in place. What cannot be proven is refused; transformers only warns, and trains on an empty mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix
from typing import Any

from onward.data.row_types import Chat, Message, RowError
from onward.data.rows.end_tokens import PROBE, QUESTION, end_tokens, split_tokens, without_marks
from onward.data.rows.forms import Forms
from onward.data.rows.plain import PlainChats
from onward.data.rows.proof import REMEDY, lay_out, require_asked
from onward.data.rows.records import DOCUMENTS
from onward.data.rows.turns import THINK_START, Habits, Span, Target, Turns
from onward.data.templates.rendering import GENERATION_END, GENERATION_START, Renderer
from onward.data.tokenizer import TokenizerState

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPLIT = RowError(
    "the tokenizer splits special tokens (split_special_tokens): the model would not learn the token at which it stops",
    'set "split_special_tokens": false in the tokenizer_config.json of the model',
)
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
    """A tokenizer's chat template; chats with tools have one of their own where the tokenizer has one for them.

    Args:
        state: the tokenizer, with its chat templates and special tokens.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def __init__(self, state: TokenizerState) -> None:
        self._renderer = _renderer(state) if state.chat_template else None
        self._splits = state.splits_special_tokens
        tools = state.tool_template
        self._of_tools = ChatTemplate(state.with_template(tools)) if tools else None
        if self._renderer is None:
            return
        self._marked = bool(GENERATION_BLOCK.search(state.chat_template))
        self._reads = self._renderer.reads()
        self._forms = Forms(self._renderer, self._reads)
        self._habits = _habits(self._renderer, state)
        self._start = state.special_tokens_map.get("bos_token", "")
        ends = self._habits.ends
        written = [token for end in (ends.inner, ends.last) for token in split_tokens(end, self._habits.special_tokens)]
        self._control = tuple(dict.fromkeys((*written, GENERATION_START, GENERATION_END)))
        end = state.special_tokens_map.get("eos_token", "")
        self._stop = "" if end in self._control else end
        self._plain = PlainChats(self._proven)

    def render(self, chat: Chat, stop: Callable[[], None] = lambda: None) -> tuple[str, list[Span]]:
        """Return the text of a chat and the character ranges [start, end) that the model has to produce.

        There is one range per assistant turn in the loss (with markers, per marked block), in order, without overlap.

        Args:
            stop: called between renderings, of which a chat may need one per turn; may raise.

        Raises:
            RowError: the template refuses the chat, or it cannot be proven that exactly what the chat says is trained.
        """
        if self._renderer is None:
            raise NO_TEMPLATE
        if self._splits:
            raise SPLIT
        if (other := self._other(chat)) is not None:
            return other.render(chat, stop)
        chat = self._forms.followed(chat)
        messages = self._forms.messages(chat)
        texts = _plain_texts(chat, messages)
        said = "\0".join(texts or ())
        self._refuse_control_tokens(chat.messages if texts is None else said)
        if self._stop and (texts is None or self._stop in said):
            self._refuse_stops(chat)
        marked = self._renderer.render(messages, chat.tools, chat.arguments)
        text = without_marks(marked) if self._marked else marked
        if self._start and text.startswith(2 * self._start):
            raise RowError(f"the chat template writes the start token {self._start!r} twice", REMEDY)
        if texts is not None and not self._reads.weighs and not any(mark in said for mark in self._reads.marks):
            spans = self._plain.targets(chat, texts, text, stop)
            if spans is not None:
                return text, spans
        return text, [(target.start, target.end) for target in self._targets(chat, messages, marked, stop)]

    def prompt(self, chat: Chat) -> str:
        """Return the text that asks the model for the next answer in a chat, exactly as before the answers in training.

        Raises:
            RowError: there is no template, it refuses the chat or leaves out its tools, a text or a call, or a message
                contains a control token.
        """
        if self._renderer is None:
            raise NO_TEMPLATE
        if (other := self._other(chat)) is not None:
            return other.prompt(chat)
        self._refuse_control_tokens(chat.messages)
        messages = self._forms.messages(chat)
        render = partial(_rendered, self._renderer, chat, prompt=True)
        asking = render(messages)
        self._require_tools(chat, messages, asking)
        require_asked(messages, asking, render)
        return asking + self._habits.header

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens at which an answer ends; empty if the template writes none."""
        if self._renderer is None:
            return ()
        ends = (self._habits.ends.inner, self._habits.ends.last)
        tokens = [token for end in ends for token in split_tokens(end, self._habits.special_tokens)[:1]]
        return tuple(dict.fromkeys([*tokens, *(self._of_tools.stops if self._of_tools is not None else ())]))

    def ignored(self, chat: Chat) -> tuple[str, ...]:
        """Return the keys of a row and of its messages that nothing reads."""
        if self._renderer is None:
            return chat.ignored
        if (other := self._other(chat)) is not None:
            return other.ignored(chat)
        chat = self._forms.followed(chat)
        return (*chat.ignored, *self._forms.ignored(chat))

    def _other(self, chat: Chat) -> ChatTemplate | None:
        """Return the template for chats with tools, if the chat is one and the tokenizer has one; None for this one."""
        return self._of_tools if chat.tools else None

    def _proven(self, chat: Chat, stop: Callable[[], None] = lambda: None) -> tuple[str, list[Target]]:
        assert self._renderer is not None
        messages = self._forms.messages(chat)
        marked = self._renderer.render(messages, chat.tools, chat.arguments)
        return without_marks(marked), self._targets(chat, messages, marked, stop)

    def _targets(self, chat: Chat, messages: Sequence[Message], marked: str, stop: Callable[[], None]) -> list[Target]:
        """Return the proven targets of a chat from its messages in the template's form and their marked text."""
        assert self._renderer is not None
        text, spans = _split_marks(marked)
        render = partial(_rendered, self._renderer, chat, stop=stop)
        layout = lay_out(messages, text, render, self._reads.marks)
        self._require_tools(chat, messages, text)
        _require_documents(chat, text)
        turns = Turns(layout, messages, render, self._habits)
        return turns.marked(chat.turns, spans) if self._marked else turns.found(chat.turns)

    def _require_tools(self, chat: Chat, messages: Sequence[Message], text: str) -> None:
        """Refuse tools that the template does not write. Each gets a unique name, since a message may hold its own."""
        assert self._renderer is not None
        if not (tools := chat.tools or []):
            return
        wanted = [PROBE.format(place) for place in range(len(tools))]
        renamed = [_renamed(tool, word) for tool, word in zip(tools, wanted, strict=True)]
        try:
            text = _rendered(self._renderer, replace(chat, tools=renamed), messages)
        except RowError:  # the template knows tools by their names
            wanted = [name for tool in tools if isinstance(name := _named(tool).get("name"), str)]
        if not (self._forms.writes_tools and all(word in text for word in wanted)):
            raise RowError("the chat template does not write the tools of the row", REMEDY)

    def _refuse_control_tokens(self, value: Any) -> None:
        for text in _texts(value):
            for token in self._control:
                if token in text:
                    raise RowError(
                        f"a message contains the control token {token!r}", "remove it: the template adds it by itself"
                    )

    def _refuse_stops(self, chat: Chat) -> None:
        """Refuse an answer with the tokenizer's end token in it, where the template ends answers with another one."""
        for place in chat.turns:
            if any(self._stop in text for text in _texts(chat.messages[place])):
                what = f"contains the end token {self._stop!r}, at which inference stops"
                raise RowError(
                    f"the answer of message {place + 1} {what}", "remove it: the model would learn to stop there"
                )


def _require_documents(chat: Chat, text: str) -> None:
    """Refuse a chat if the template leaves out one of its documents: none of its strings is in the text."""
    documents = chat.arguments.get(DOCUMENTS)
    for document in documents if isinstance(documents, list) else ():
        values = document.values() if isinstance(document, dict) else [document]
        strings = [value.strip() for value in values if isinstance(value, str) and value.strip()]
        if strings and not any(value in text for value in strings):
            raise RowError("the chat template does not write the documents of the row", REMEDY)


def _named(tool: Any) -> dict[str, Any]:
    """Return the part of a tool's schema that has its name."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else tool


def _renamed(tool: Any, name: str) -> Any:
    """Return a tool of another name; one without a name as it is, called otherwise by its description."""
    named = _named(tool)
    renamed = {**named, "name": name}
    return renamed if named is tool else {**tool, "function": renamed}


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a value, at any depth; the keys of objects are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _plain_texts(chat: Chat, messages: Sequence[Message]) -> list[str] | None:
    """Return what the messages say, if a chat is nothing but roles and texts."""
    is_plain = not chat.tools and not chat.arguments and max(map(len, messages)) == 2
    return [message["content"] for message in messages] if is_plain else None


def _rendered(
    renderer: Renderer, chat: Chat, messages: Sequence[Message], *, prompt: bool = False,
    stop: Callable[[], None] = lambda: None,
) -> str:  # fmt: skip
    stop()
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
    """Return what the template writes before an answer, with or without a thought first.

    White space alone is no header: inference does not give it, so that the answer begins with it.
    """
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
    header = commonprefix(before).partition(THINK_START)[0]  # noqa: RUF071 (texts, not paths)
    return header if header.strip() else ""
