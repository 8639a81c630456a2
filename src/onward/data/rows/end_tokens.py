"""The tokens at which inference stops: what a chat template writes after an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from onward.data.row_types import Message, RowError
from onward.data.templates.rendering import GENERATION_END, GENERATION_START, Renderer

PROBE = "onwardProbeNumber{}End"  # letters and digits only: no template trims or escapes them
QUESTION: Message = {"role": "user", "content": "Question"}


@dataclass(frozen=True)
class EndTokens:
    """What the template writes after an answer in the middle of a chat, and after the last one; "" for nothing."""

    inner: str
    last: str

    def of(self, *, is_last: bool) -> str:
        """Return the tokens after the last answer of a chat, or after another one."""
        return self.last if is_last else self.inner


def end_tokens(renderer: Renderer, special_tokens: Sequence[str]) -> EndTokens:
    """Find the tokens that end a turn: the special tokens that follow an answer in the middle and at the end alike.

    A template may write more after the last answer (Phi writes `<|end|>`, then its end of text); that counts only if
    there is nothing else. If the two differ (gpt-oss: `<|end|>`, `<|return|>`), the one in the middle counts only if it
    ends other messages too: it might be the beginning of the next one.
    """
    probes: list[Message] = [{"role": "assistant", "content": PROBE.format(place)} for place in range(2)]
    for messages in ([QUESTION, probes[0], QUESTION, probes[1]], [QUESTION, probes[1]]):
        try:
            text = without_marks(renderer.render(messages))
        except RowError:
            continue
        runs = [tokens_after(text, probe["content"], special_tokens) for probe in probes if probe in messages]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(runs[0], runs[-1], strict=False))
        shared = "".join(token for token, _ in alike)
        if shared:
            return EndTokens(inner=shared, last=shared)
        inner, last = "".join(runs[0][:1]), "".join(runs[-1][:1])
        return EndTokens(inner if _ends_messages(renderer, inner) else "", last)
    return EndTokens("", "")


def tokens_after(text: str, word: str, special_tokens: Sequence[str]) -> list[str]:
    """Return the special tokens that directly follow `word`; white space before the first of them is skipped."""
    return split_tokens(text.partition(word)[2].lstrip(), special_tokens)


def split_tokens(rest: str, special_tokens: Sequence[str]) -> list[str]:
    """Return the special tokens with which a text begins, one after another."""
    tokens: list[str] = []
    while token := next((token for token in special_tokens if rest.startswith(token)), None):
        tokens.append(token)
        rest = rest[len(token) :]
    return tokens


def without_marks(text: str) -> str:
    """Return a rendered text without the marks of `{% generation %}` blocks."""
    return text.replace(GENERATION_START, "").replace(GENERATION_END, "")


def _ends_messages(renderer: Renderer, token: str) -> bool:
    """Return whether a token follows the user's message at the very end of a text."""
    word = PROBE.format(2)
    try:
        text = renderer.render([{"role": "user", "content": word}])
    except RowError:
        return False
    return bool(token) and text.partition(word)[2].lstrip().startswith(token)
