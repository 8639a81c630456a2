"""Which characters of a rendered chat the model has to produce: every assistant turn with its end token, proven.

Templates with `{% generation %}` markers say so themselves. In the others a turn is the text between the generation
prompt and the end token, if that is all the template writes there; if not, the turn starts where the rendered
beginning of the chat plus the generation prompt ends (prefix differences). If that fails too, the contents are replaced
by unique words to see where the template puts them. What cannot be proven is refused, where transformers only warns
and trains on an empty mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias

from onward.data.records import Chat, Message, RowError
from onward.data.rendering import GENERATION_END, GENERATION_START, Renderer
from onward.data.tokenizer import TokenizerState

Span: TypeAlias = tuple[int, int]

THINK_END = "</think>"
PROBE = "onwardProbeNumber{}End"  # letters and digits only: no template trims or escapes them
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
STRIPPERS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
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
            are added, and an end token closes the row; it stands for one more character after the text.
    """

    text: str
    spans: list[Span]
    closed: bool


@dataclass(frozen=True)
class _EndTokens:
    """What the template writes after an answer in the middle of a chat, and after the last one; "" for nothing."""

    inner: str
    last: str


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        state: the tokenizer, with its chat template and special tokens.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def __init__(self, state: TokenizerState) -> None:
        source, special_tokens = state.chat_template, state.special_tokens
        self._renderer = Renderer(source, state.special_tokens_map) if source else None
        self._marked = bool(GENERATION_BLOCK.search(source))
        if self._renderer is None:
            return
        self._end = _end_tokens(self._renderer, special_tokens)
        self._has_prompt, self._prompt = _generation_prompt(self._renderer, special_tokens)
        endings = (self._end.inner, self._end.last, GENERATION_START, GENERATION_END)
        self._control = tuple(dict.fromkeys(ending for ending in endings if ending))

    def render(self, chat: Chat) -> tuple[str, list[Span]]:
        """Return the text of a chat and the character ranges [start, end) that the model has to produce.

        There is one range per assistant turn (with markers: per marked block), in order, without overlap.

        Raises:
            RowError: the template refuses the chat, or the ranges cannot be proven.
        """
        if self._renderer is None:
            raise NO_TEMPLATE
        for message in chat.messages:
            for value in message.values():
                self._refuse_control_tokens(value)
        text = self._renderer.render(chat.messages, chat.tools)
        if self._marked:
            text, spans = _split_marks(text)
            spans = [self._with_end_token(text, span) for span in spans]
            _prove_marked(chat, text, spans)
            return text, spans
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return text, self._plain_turns(chat, turns, text) or list(self._turns(self._renderer, chat, turns, text))

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

    def _with_end_token(self, text: str, span: Span) -> Span:
        """Let a marked block end right after the end token, whether the template's mark includes it or more."""
        start, end = span
        token = self._end.last or self._end.inner
        if not token:
            return span
        if text[start:end].rstrip().endswith(token):
            return start, start + len(text[start:end].rstrip())
        return (start, end + len(token)) if text.startswith(token, end) else span

    def _plain_turns(self, chat: Chat, turns: list[int], text: str) -> list[Span] | None:
        """Return the turns of a chat in which the template writes the generation prompt, an answer and the end token.

        No other rendering is needed: no message contains the prompt or the end token, so the template wrote them. None
        if the chat is not rendered like that.
        """
        prompt, last = self._prompt, len(chat.messages) - 1
        if not prompt or text.count(prompt) != len(turns) or any(prompt in m["content"] for m in chat.messages):
            return None
        spans: list[Span] = []
        at = 0
        for turn in turns:
            content, token = chat.messages[turn]["content"], self._end.last if turn == last else self._end.inner
            at = text.find(prompt, at) + len(prompt)
            if not content or not token or not text.startswith(content + token, at):
                return None
            spans.append((at, at + len(content) + len(token)))
        return spans

    def _turns(self, renderer: Renderer, chat: Chat, turns: list[int], text: str) -> Iterator[Span]:
        prompt_ends = [self._prompt_end(renderer, chat, turn, text) for turn in turns]
        located = None if self._end.inner and None not in prompt_ends else _locate(renderer, chat, turns, text)
        starts = [
            end if end is not None else located[place][0] if located else -1 for place, end in enumerate(prompt_ends)
        ]
        for place, (turn, start) in enumerate(zip(turns, starts, strict=True)):
            limit = starts[place + 1] if place + 1 < len(starts) else len(text)
            if not 0 <= start < limit:
                raise _unprovable()
            is_last = turn + 1 == len(chat.messages)
            token = self._end.last if is_last else self._end.inner
            if not is_last and not _is_plain(chat.messages[turn], text, start, token):
                limit = _turn_limit(renderer, chat, turn, text, limit)
            end = _end_of_turn(text, start, limit, token, located[place] if located else None)
            _prove(chat.messages[turn], text[start : end - len(token)])
            yield start, end

    def _prompt_end(self, renderer: Renderer, chat: Chat, turn: int, text: str) -> int | None:
        """Return where the generation prompt of a turn ends; None if the rendered prefix does not tell."""
        if not self._has_prompt:
            return None
        try:
            prefix = renderer.render(chat.messages[:turn], chat.tools, prompt=True)
        except RowError:
            return None
        return len(prefix) if text.startswith(prefix) else None


def _is_plain(message: Message, text: str, start: int, token: str) -> bool:
    """Return whether the template writes only the answer and the end token, so that the turn must end there."""
    content = message["content"]
    return bool(token and content) and text.startswith(content + token, start)


def _turn_limit(renderer: Renderer, chat: Chat, turn: int, text: str, otherwise: int) -> int:
    try:
        prefix = renderer.render(chat.messages[: turn + 1], chat.tools)
    except RowError:
        return otherwise
    return min(len(prefix), otherwise) if text.startswith(prefix) else otherwise


def _end_of_turn(text: str, start: int, limit: int, token: str, located: Span | None) -> int:
    if token:
        at = text.find(token, start, limit)
        if at < 0:
            raise RowError(f"the chat template writes no {token!r} after an answer", "use another chat template")
        return at + len(token)
    if located is None:
        raise _unprovable()
    return located[1]


def _prove(message: Message, produced: str) -> None:
    """Refuse a range that does not end with the answer, or does not contain it where tool calls follow the content.

    Templates of thinking models drop or move the part before `</think>`, so the answer proper is what comes after it.
    """
    answer = message["content"].rpartition(THINK_END)[2].strip()
    if answer in produced if message.get("tool_calls") else produced.rstrip().endswith(answer):
        return
    raise RowError("the chat template changes an answer or leaves a part of it out", "use another chat template")


def _prove_marked(chat: Chat, text: str, spans: list[Span]) -> None:
    blocks = iter(text[start:end] for start, end in spans)
    for message in chat.messages:
        answer = message["content"].rpartition(THINK_END)[2].strip()
        if message["role"] == "assistant" and not any(answer in block for block in blocks):
            raise RowError(
                "the chat template's {% generation %} markers leave out an answer", "use another chat template"
            )


def _split_marks(marked: str) -> tuple[str, list[Span]]:
    """Remove the generation marks from a text; return it with the ranges that they enclosed."""
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


def _locate(renderer: Renderer, chat: Chat, turns: list[int], text: str) -> list[Span]:
    """Return where the template puts the answers, by rendering the chat with unique words in their place.

    Raises:
        RowError: replacing the words by the answers does not give `text`.
    """
    answers = [chat.messages[turn]["content"] for turn in turns]
    tails = [answer.rpartition(THINK_END)[2] for answer in answers]
    for kept in (answers, tails) if answers != tails else (answers,):
        messages = list(chat.messages)
        for place, (turn, answer) in enumerate(zip(turns, kept, strict=True)):
            whole = messages[turn]["content"]
            head = whole[: len(whole) - len(answer)]
            messages[turn] = {**messages[turn], "content": head + PROBE.format(place)}
        try:
            skeleton = renderer.render(messages, chat.tools)
        except RowError:
            continue
        for strip in STRIPPERS:
            spans = _fill(skeleton, [strip(answer) for answer in kept], text)
            if spans is not None:
                return [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    raise _unprovable()


def _fill(skeleton: str, answers: list[str], text: str) -> list[Span] | None:
    """Return where the answers stand if `text` is the skeleton with its words replaced by them, else None."""
    pieces: list[str] = []
    spans: list[Span] = []
    length, rest = 0, skeleton
    for place, answer in enumerate(answers):
        before, word, rest = rest.partition(PROBE.format(place))
        if not word:
            return None
        pieces += [before, answer]
        spans.append((length + len(before), length + len(before) + len(answer)))
        length += len(before) + len(answer)
    return spans if "".join([*pieces, rest]) == text else None


def _unprovable() -> RowError:
    return RowError(
        "the chat template does not render the beginning of a chat the same as the whole",
        "use prompt/completion rows, or a template with {% generation %} markers",
    )


def _end_tokens(renderer: Renderer, special_tokens: Sequence[str]) -> _EndTokens:
    """Find the tokens that end a turn: the special tokens that follow an answer in the middle and at the end alike.

    A template may write more after the last answer (Phi writes `<|end|>`, then its end of text); that counts only if
    there is nothing else.
    """
    question = {"role": "user", "content": "Question"}
    probes = [{"role": "assistant", "content": PROBE.format(place)} for place in range(2)]
    for messages in ([question, probes[0], question, probes[1]], [question, probes[1]]):
        try:
            text = renderer.render(messages)
        except RowError:
            continue
        text = text.replace(GENERATION_START, "").replace(GENERATION_END, "")
        runs = [_tokens_after(text, probe["content"], special_tokens) for probe in probes if probe in messages]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(runs[0], runs[-1], strict=False))
        shared = "".join(token for token, _ in alike)
        return _EndTokens(inner=shared, last=shared or "".join(runs[-1][:1]))
    return _EndTokens("", "")


def _tokens_after(text: str, word: str, special_tokens: Sequence[str]) -> list[str]:
    """Return the special tokens that directly follow `word`; white space before the first of them is skipped."""
    rest = text.partition(word)[2].lstrip()
    tokens: list[str] = []
    while token := next((token for token in special_tokens if rest.startswith(token)), None):
        tokens.append(token)
        rest = rest[len(token) :]
    return tokens


def _generation_prompt(renderer: Renderer, special_tokens: Sequence[str]) -> tuple[bool, str]:
    """Return whether the template has a generation prompt, and the prompt if a special token proves its origin, or "".

    A prompt without a special token could just as well be part of a message.
    """
    question: list[Message] = [{"role": "user", "content": "Question"}]
    try:
        without, asking = renderer.render(question), renderer.render(question, prompt=True)
    except RowError:
        return False, ""
    prompt = asking.removeprefix(without) if asking.startswith(without) else ""
    return asking != without, prompt if any(token in prompt for token in special_tokens) else ""
