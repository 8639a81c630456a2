"""Ollama's Modelfile: the chat template in Ollama's language, found by probing the run's template, and proven.

The chat template is probed for what it writes around the content of each role. If a chat is nothing but those pieces
one after another, Ollama's template can express it; that is proven on chats of several shapes, or else refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from onward.data.row_types import Chat, Message, RowError
from onward.data.rows.template import ChatTemplate
from onward.data.tokenizer import TokenizerState
from onward.errors import UsageError

_WORDS = tuple(f"onwardContent{number}Ends" for number in range(6))


@dataclass(frozen=True)
class Written:
    """What a template writes: around the content of each role, before the next answer, and without a system message.

    `first` is what begins every text.
    """

    around: dict[str, tuple[str, str]]
    asking: str
    default_system: str
    first: str = ""

    @property
    def pieces(self) -> list[str]:
        """Every piece of text that it writes by itself."""
        return [*(piece for pair in self.around.values() for piece in pair), self.asking, self.first]


def modelfile(state: TokenizerState, gguf: str) -> str:
    """Return the Modelfile for a GGUF file next to it.

    Args:
        state: the run's tokenizer.
        gguf: the name of the file.

    Raises:
        UsageError: the run's chat template is more than pieces around contents.
    """
    lines = [f"FROM ./{gguf}"]
    template = ChatTemplate(state)
    if state.chat_template:
        begin = state.special_tokens_map.get("bos_token", "")
        added: list[int] = state.tokenizer.encode("a", add_special_tokens=True).ids
        written = read_template(template, begin, is_added=added[:1] == [state.bos_id])
        lines.append(f"TEMPLATE {_quoted(in_go(written))}")
        if written.default_system:
            lines.append(f"SYSTEM {_quoted(written.default_system)}")
    else:
        lines.append(f"TEMPLATE {_quoted('{{ .Prompt }}')}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in template.stops]
    return "\n".join(lines) + "\n"


def read_template(template: ChatTemplate, begin: str, *, is_added: bool) -> Written:
    """Return what a template writes, proven on chats of several shapes.

    Args:
        begin: the token that begins texts; "" for none.
        is_added: whether the tokenizer, and so llama.cpp, puts it there by itself.
    """
    ways = [(begin, "")] if is_added else [("", ""), (begin, begin)]
    for removed, written_first in ways:
        written = _proven(template, removed, written_first)
        if written is not None:
            return written
    raise UsageError(
        "the run's chat template does more than write text around messages, which cannot be proven for Ollama's",
        where="--format",
        hint="--format gguf keeps the template itself, which llama.cpp's server follows.",
    )


def _proven(template: ChatTemplate, removed: str, first: str) -> Written | None:
    def asked(roles: str) -> str:
        names = {"s": "system", "u": "user", "a": "assistant"}
        messages: list[Message] = [{"role": names[r], "content": w} for r, w in zip(roles, _WORDS, strict=False)]
        return template.prompt(Chat(messages)).removeprefix(removed)

    try:
        written = replace(_pieces(asked), first=first)
        shapes = ["u", "uau", "uauau"]
        shapes += [f"s{shape}" for shape in shapes] if "system" in written.around else []
        proven = all(first + asked(shape) == _expand(written, shape) for shape in shapes)
    except (RowError, ValueError):
        return None
    return written if proven and not any("{{" in piece for piece in written.pieces) else None


def in_go(written: Written) -> str:
    """Return the template in Ollama's language (Go's)."""
    branches = "".join(
        f'{{{{ {"if" if place == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for place, (role, (before, after)) in enumerate(written.around.items())
    )
    return f"{written.first}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{written.asking}"


def _pieces(asked: Callable[[str], str]) -> Written:
    one, three = asked("u"), asked("uau")
    system = _with_system(asked)
    lead, _, tail = one.partition(_WORDS[0])
    before_answer, _, rest = three.removeprefix(lead + _WORDS[0]).partition(_WORDS[1])
    between, _, _ = rest.partition(_WORDS[2])
    user_before, default = lead, ""
    around: dict[str, tuple[str, str]] = {}
    if system is not None:
        system_before, _, after = system.partition(_WORDS[0])
        middle, _, _ = after.partition(_WORDS[1])
        user_before = _common_end(middle, _common_end(lead, between))
        around["system"] = (system_before, middle.removesuffix(user_before))
        given = lead.removesuffix(user_before)
        if given:
            default = given.removeprefix(around["system"][0]).removesuffix(around["system"][1])
    answer_after = between.removesuffix(user_before)
    user_after = _common_beginning(tail, before_answer)
    # the border between question and next answer cannot be seen: the asking part gets what only it shares
    asking, answer_before = tail[len(user_after) :], before_answer[len(user_after) :]
    around["user"] = (user_before, user_after)
    around["assistant"] = (answer_before, answer_after)
    return Written(around, asking, default)


def _with_system(asked: Callable[[str], str]) -> str | None:
    """Return a prompt that begins with a system message; None if the template takes none."""
    try:
        text = asked("su")
    except RowError:
        return None
    return text if _WORDS[0] in text else None


def _expand(written: Written, roles: str) -> str:
    """Return a chat as Ollama renders it."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    parts = [written.first]
    if not roles.startswith("s") and written.default_system:
        before, after = written.around["system"]
        parts.append(before + written.default_system + after)
    for role, word in zip(roles, _WORDS, strict=False):
        before, after = written.around[names[role]]
        parts.append(before + word + after)
    return "".join(parts) + written.asking


def _common_beginning(first: str, second: str) -> str:
    length = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return first[: min(len(first), len(second)) if length is None else length]


def _common_end(first: str, second: str) -> str:
    return _common_beginning(first[::-1], second[::-1])[::-1]


def _quoted(text: str) -> str:
    """Return a text quoted as a value of a Modelfile.

    Raises:
        UsageError: it contains the quotes that would end it.
    """
    if '"""' in text:
        raise UsageError('a text with """ in it cannot be in a Modelfile', where="--format")
    return f'"""{text}"""'
