"""Chat templates as pure functions: the text of a row depends on the row and the template and nothing else.

The environment is that of `transformers.utils.chat_template_utils` (a test holds the two equal), with three changes:
`strftime_now` always answers the same day, so that a row always renders the same; what Jinja draws at random is refused
for the same reason; and `{% generation %}` blocks leave marks in the text instead of indices in the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from onward.data.row_types import Message, RowError
from onward.data.templates.reads import Reads
from onward.errors import ModelError

TODAY = datetime(2024, 7, 26)  # the day that Llama 3.2's own template falls back to
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"  # Unicode noncharacters, which real text never has
LOOP_ATTRIBUTES = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Renderer:
    """One compiled template.

    Args:
        template: the Jinja source.
        variables: what the template sees besides the messages: the special tokens by name.
        parts: whether the content of a message is passed as a list with one part, as vision models expect.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def __init__(self, template: str, variables: dict[str, Any], *, parts: bool = False) -> None:
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid Jinja: {error}",
                hint="repair the tokenizer's chat_template.jinja",
            ) from error
        self._template.globals = dict(self._template.globals)  # not a ChainMap, which is a third slower
        self._variables = variables
        self._source = template
        self._parts = parts

    def reads(self) -> Reads:
        """Return what the template reads."""
        return Reads.of(self._source, self._template.environment)

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        arguments: dict[str, Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """Return the text of `messages`; with `prompt`, also the header that asks the model for the next answer.

        Args:
            arguments: what else the template sees, by name; a row's `chat_template_kwargs`.

        Raises:
            RowError: the template refuses the messages.
        """
        if self._parts:
            messages = [_in_parts(message) for message in messages]
        try:
            if arguments:
                variables = {"documents": None} | self._variables | arguments
                return self._template.render(variables, messages=messages, tools=tools, add_generation_prompt=prompt)
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._variables
            )
        except _Random:
            raise RowError(
                "the chat template draws at random, and a row has to render to the same text each time",
                "use one without the filter random and the function lipsum: the config key chat_template: FILE",
            ) from None
        except TEMPLATE_FAILURES as error:
            raise RowError(
                f"the chat template refuses the row: {error or type(error).__name__}",
                "use the roles and the order that this model's template expects",
            ) from error


class _Random(jinja2.TemplateError):
    """What a template asked for is drawn at random."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks around what the model produces."""

    tags = {"generation"}  # noqa: RUF012 (the attribute is jinja2's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a shortcut to the public attributes of `loop`, which templates read for every message."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute in LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _in_parts(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["random"] = _refuse_random
    names = cast(dict[str, Any], environment.globals)  # jinja2 declares only its own defaults
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = TODAY.strftime
    names["lipsum"] = _refuse_random
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _refuse_random(*_values: Any, **_options: Any) -> None:
    raise _Random
