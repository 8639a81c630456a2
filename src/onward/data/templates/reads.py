"""What a chat template reads, from its syntax tree: which names, which keys, and which pieces of text it looks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jinja2
from jinja2 import meta, nodes

from onward.data.templates.control import SEARCHES, control_of

WORD = re.compile(r"\w\w+", re.ASCII)
SAYING = ("raise_exception", "strftime_now")


@dataclass(frozen=True)
class Reads:
    """What a template reads.

    Args:
        names: variables that it takes from its caller.
        keys: every string and attribute that it may use as a key of a message.
        marks: pieces of text whose presence in a message may change how the template renders, the longest first.
        weighs: whether rendering may depend on contents in other ways.
    """

    names: frozenset[str]
    keys: frozenset[str]
    marks: tuple[str, ...]
    weighs: bool

    @classmethod
    def of(cls, source: str, environment: jinja2.Environment) -> Reads:
        """Return what a template reads; `source` must be valid in the environment."""
        tree = environment.parse(source)
        keys = {node.attr for node in tree.find_all(nodes.Getattr)} | set(_strings(tree))
        control = control_of(tree)
        marks = (set(_marks(tree)) | control.words) - {""}
        return cls(
            frozenset(meta.find_undeclared_variables(tree)),
            frozenset(keys),
            tuple(sorted(marks, key=lambda text: (-len(text), text))),
            control.by_more,
        )


def _marks(tree: nodes.Node) -> Iterator[str]:
    """Yield the strings that can decide what is rendered.

    Strings that are only written cannot. Words are names of roles and keys, unless a string method takes them; what
    `strip` removes is noticed as missing.
    """
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in SEARCHES:
            yield from _direct(call.args)
        elif isinstance(call.node, nodes.Name) and call.node.name not in SAYING:
            yield from _unlike_words(_direct(call.args))
    for compare in tree.find_all((nodes.Compare, nodes.Test)):
        yield from _unlike_words(_strings(compare))
    for assign in tree.find_all(nodes.Assign):
        yield from _unlike_words(_direct([assign.node]))


def _unlike_words(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text.strip() and not WORD.fullmatch(text))


def _strings(tree: nodes.Node) -> Iterator[str]:
    return _direct(tree.find_all(nodes.Const))


def _direct(found: Iterable[nodes.Node]) -> Iterator[str]:
    return (node.value for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str))
