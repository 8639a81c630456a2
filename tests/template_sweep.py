"""Every chat template that the installed TRL ships, with rows of every kind: our targets alongside TRL's mask.

python tests/template_sweep.py           write docs/templates.md
python tests/template_sweep.py NAME...   print what becomes of each row with these templates

TRL trains on what a template's `{% generation %}` markers enclose; most templates have a twin with markers, named
`_training`. Where both write the same text, character ranges are compared. No tokenizer of a model is needed: special
tokens are recognized by their form.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import tiny
from trait_templates import template_text, trl_folder

from onward.data.row_types import Chat, RowError
from onward.data.rows import records
from onward.data.rows.template import ChatTemplate

Span: TypeAlias = tuple[int, int]

PAGE = Path(__file__).parents[1] / "docs" / "templates.md"
SPECIAL = re.compile(r"<\|[^<>|{}\s]+\|>|<\uff5c[^<>{}]+\uff5c>|<\|?[a-z]+_of_[a-z_]+\|?>|<\|turn>|<turn\|>|</?s>")
"""What looks like a special token in the source of a template."""
DATE = re.compile(r"\d{4}-\d\d-\d\d|\d\d [A-Z][a-z]{2} \d{4}")
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
SHOWN = 3
"""Differing pieces of text that a line of the table names at most."""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Return a call of a tool."""
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, *keys: str) -> dict[str, Any]:
    """Return what a tool says of itself."""
    properties = {key: {"type": "string", "description": key} for key in keys}
    parameters = {"type": "object", "properties": properties, "required": list(keys)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **more}


ASKED = said("user", "Quince?")
TOOLS = [tool("weigh", "fruit"), tool("peel", "knife")]
RESULT = said("tool", "Ninety", name="weigh", tool_call_id="call00001")
CALLS: dict[str, list[dict[str, Any]]] = {
    "a call": [ASKED, said("assistant", "", tool_calls=[call("weigh", fruit="medlar")]), RESULT],
    "a call with text": [ASKED, said("assistant", "Wait.", tool_calls=[call("weigh", fruit="medlar")]), RESULT],
    "two calls": [
        ASKED,
        said("assistant", "", tool_calls=[call("weigh", fruit="medlar"), call("peel", knife="blunt")]),
        RESULT,
        said("tool", "Done", name="peel", tool_call_id="call00001"),
    ],
    "a call with a thought": [
        ASKED,
        said("assistant", "", tool_calls=[call("weigh", fruit="medlar")], reasoning_content="Heavy?"),
        RESULT,
    ],
}
TURNS = [ASKED, said("assistant", "Quite."), said("user", "Sloe?"), said("assistant", "Slowly.")]
ROWS: dict[str, dict[str, Any]] = {
    "one answer": {"messages": TURNS[:2]},
    "two answers": {"messages": TURNS},
    "a system message": {"messages": [said("system", "Tart."), *TURNS]},
    "a developer message": {"messages": [said("developer", "Tart."), *TURNS[:2]]},
    "white space": {"messages": [ASKED, said("assistant", " Quite.\n")]},
    "a thought": {"messages": [ASKED, said("assistant", "Quite.", reasoning_content="Ripe?")]},
    "two thoughts": {
        "messages": [
            ASKED,
            said("assistant", "Quite.", reasoning_content="Ripe?"),
            said("user", "Sloe?"),
            said("assistant", "Slowly.", reasoning_content="Late?"),
        ]
    },
    "a thought in the content": {"messages": [ASKED, said("assistant", "<think>\nRipe?\n</think>\n\nQuite.")]},
    **{name: {"messages": [*start, said("assistant", "Enough.")], "tools": TOOLS} for name, start in CALLS.items()},
}
"""Rows by kind. Each word in them stands once."""


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Args:
        refused: why we refuse it; "" if we do not.
        lost: what the row's answers say that is not in our targets, or what others say that is.
        compared: whether TRL marks the same text.
        ours: pieces of text that only our targets cover.
        theirs: pieces of text that only TRL's mask covers.
    """

    refused: str = ""
    lost: tuple[str, ...] = ()
    compared: bool = False
    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether the targets are TRL's, but for white space."""
        return self.compared and not any(piece.strip() for piece in self.ours + self.theirs)


def names() -> list[str]:
    """Return the templates that TRL ships."""
    return sorted(path.stem for path in trl_folder().glob("*.jinja"))


def is_marked(name: str) -> bool:
    """Whether a template marks what is produced."""
    return "generation" in re.findall(r"\{%-?\s*(\w+)", template_text(name))


def marked_twin(name: str) -> str | None:
    """Return the template whose markers say what TRL trains with this one; None if there is none."""
    twin = f"{name}_training"
    return name if is_marked(name) else twin if (trl_folder() / f"{twin}.jinja").is_file() else None


@cache
def ours_of(name: str) -> ChatTemplate:
    """Return a template as Onward reads it, with the special tokens that it seems to have."""
    source = template_text(name)
    extra = [token for token in dict.fromkeys(SPECIAL.findall(source)) if token not in NAMED.values()]
    return ChatTemplate(tiny.byte_state(source, extra=extra, **NAMED))


def trl_mask(name: str, chat: Chat) -> tuple[str, list[Span]]:
    """Return the text of a chat with the ranges that transformers masks for TRL.

    Raises:
        Exception: the template refuses the chat.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {"tools": chat.tools, **NAMED}
    (text,), (spans,) = render_jinja_template(
        [chat.messages], chat_template=template_text(name), return_assistant_tokens_mask=True, **given
    )
    return text, list(spans)


def try_row(name: str, row: dict[str, Any]) -> Outcome:
    """Return what becomes of a row with a template."""
    try:
        chat = records.parse_record(row)
    except RowError as error:
        return Outcome(refused=error.reason)
    assert isinstance(chat, Chat)
    try:
        text, spans = ours_of(name).render(chat)
    except RowError as error:
        return Outcome(refused=error.reason)
    lost = tuple(misplaced(row, text, spans))
    twin = marked_twin(name)
    try:
        marked, theirs = trl_mask(twin, chat) if twin else ("", [])
    except Exception:  # a template may raise anything
        return Outcome(lost=lost)
    if DATE.sub("", marked) != DATE.sub("", text):
        return Outcome(lost=lost)
    return Outcome("", lost, True, tuple(pieces(text, spans, theirs)), tuple(pieces(text, theirs, spans)))


def misplaced(row: dict[str, Any], text: str, spans: Sequence[Span]) -> Iterable[str]:
    """Yield each word of the answers that our targets miss, and each word of the others that they hold."""
    trained = "\0".join(text[start:end] for start, end in spans)
    for message in row["messages"]:
        is_answer = message["role"] == "assistant"
        for word in words(message):
            if (word in trained) is not is_answer:
                yield word


def words(message: dict[str, Any]) -> list[str]:
    """Return what a message says: content, thought, names and arguments of calls."""
    calls = [one["function"] for one in message.get("tool_calls", [])]
    values = [message["content"] or "", message.get("reasoning_content", "")]
    values += [value for one in calls for value in (one["name"], *one["arguments"].values())]
    return [word for value in values for word in re.findall(r"\w+[.?]?", re.sub(r"</?think>", "", value))]


def pieces(text: str, spans: Sequence[Span], others: Sequence[Span]) -> Iterable[str]:
    """Yield the pieces of a text that the first ranges cover and the others do not."""
    covered = {place for start, end in spans for place in range(start, end)}
    covered -= {place for start, end in others for place in range(start, end)}
    piece = ""
    for place in sorted(covered):
        piece += text[place]
        if place + 1 not in covered:
            yield piece
            piece = ""


def cells_of(name: str) -> list[str]:
    """Return what the table says of a template: counts and pieces, and last `KINDS: REASON; ...` of what is refused."""
    outcomes = {kind: try_row(name, row) for kind, row in ROWS.items()}
    refused: dict[str, list[str]] = {}
    for kind, found in outcomes.items():
        if found.refused:
            refused.setdefault(re.sub(r"message \d+", "a message", found.refused), []).append(kind)
    compared = sum(found.compared for found in outcomes.values())
    equal = sum(found.is_equal for found in outcomes.values())
    return [
        f"{len(outcomes) - sum(map(len, refused.values()))} of {len(outcomes)}",
        f"{equal} of {compared}" if compared else "",
        shown(piece for found in outcomes.values() for piece in found.theirs),
        shown(piece for found in outcomes.values() for piece in found.ours),
        "; ".join(f"{', '.join(kinds)}: {cell(reason)}" for reason, kinds in refused.items()),
    ]


def shown(found: Iterable[str]) -> str:
    """Return pieces of text as a cell of the table."""
    distinct = list(dict.fromkeys(found))
    more = ", ..." if len(distinct) > SHOWN else ""
    return ", ".join(f"`{cell(repr(piece)[1:-1])}`" for piece in distinct[:SHOWN]) + more


def cell(text: str) -> str:
    """Return a text that ends no cell of a table."""
    return text.replace("\n", " ").replace("|", "\\|")


INTRODUCTION = """\
# Chat templates

<!-- Made by `python tests/template_sweep.py` from the installed TRL. Change the code, not this page. -->

For each row, Onward proves on the run's own template which characters of a chat are targets (trained). This page
compares these proofs with TRL's masks: every template that TRL {version} ships, with {count} kinds of rows: {kinds}.

TRL trains on what a template's `{{% generation %}}` markers enclose. Models' own templates have none, so TRL replaces
them with its own variants (`_training`); where both write the same text, our targets are compared with the variant's
markers.

To use another template for a run, set `chat_template` in its config: to a file, or to one of those below whose name
ends in `_training`, from an installed TRL (`pip install 'onward[templates]'`). The run and its checkpoints keep a copy,
because prompts at inference must be rendered as in training. transformers, TRL and vLLM accept the markers; for
programs that do not, use the model's own template instead, if it renders your prompts the same.

## What the columns say

- **accepted**: kinds of rows in which every message is proven. The others are refused; the last column says why.
- **equal**: accepted kinds with the same targets as TRL's except for white space, of those where TRL marks the same
  text.
- **only TRL**: text that TRL's mask covers and our targets do not. White space and tokens after the end token are not
  targets: inference stops at the end token, so the model never has to produce them. Neither is the header of the answer
  (including `<think>`, if the template writes it there): at inference it is part of the prompt.
- **only ours**: text that our targets cover and TRL's mask does not. An end token outside the markers is a target: a
  model that does not learn it does not stop.
- **refused**: kinds of rows with the number of the reason; the reasons are listed below the table.

| template | accepted | equal | only TRL | only ours | refused |
|---|---|---|---|---|---|
"""


def page() -> str:
    """Return the page: a line per template, reasons by number, and the reasons."""
    text = INTRODUCTION.format(version=version("trl"), count=len(ROWS), kinds=", ".join(ROWS))
    reasons: dict[str, int] = {}
    for name in names():
        *cells, refused = cells_of(name)
        numbered: list[str] = []
        for part in filter(None, refused.split("; ")):
            kinds, reason = part.split(": ", 1)
            numbered.append(f"{kinds} ({reasons.setdefault(reason, len(reasons) + 1)})")
        text += f"| {' | '.join([f'`{name}`', *cells, ', '.join(numbered)])} |\n"
    return text + "\n## Why rows are refused\n\n" + "".join(f"{number}. {why}\n" for why, number in reasons.items())


def written() -> dict[str, list[str]]:
    """Return the cells that the page has on each template, the numbers of reasons replaced by the reasons."""
    text = PAGE.read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, re.M))
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^\| `.+ \|$", text, re.M):
        name, *cells, refused = re.split(r"(?<!\\) \| ", line[2:-2])
        parts = re.findall(r"(?:, )?(.+?) \((\d+)\)", refused)
        found[name.strip("`")] = [*cells, "; ".join(f"{kinds}: {reasons[number]}" for kinds, number in parts)]
    return found


def main(chosen: Sequence[str]) -> None:
    """Write the page, or print the outcomes of some templates."""
    for name in chosen:
        for kind, row in ROWS.items():
            found = try_row(name, row)
            print(f"{name:32}{kind:26}{found}")
    if not chosen:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
