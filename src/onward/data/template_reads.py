"""What a chat template reads, by its syntax tree: which names, which keys, and which pieces of text it looks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
from jinja2 import meta, nodes

WORD = re.compile(r"\w\w+", re.ASCII)
TEXT_METHODS = ("count", "endswith", "find", "index", "partition", "rfind", "rpartition", "rsplit", "split", "startswith")
SAYING = ("raise_exception", "strftime_now")
DECIDING = (nodes.Assign, nodes.Call, nodes.Compare, nodes.Filter, nodes.Test)


@dataclass(frozen=True)
class Reads:
    """What a template reads.

    Args:
        names: variables that it takes from its caller.
        keys: every string and attribute by which it can look into a message.
        marks: pieces of text whose presence in a message may change how the template renders, the longest first.
    """

    names: frozenset[str]
    keys: frozenset[str]
    marks: tuple[str, ...]

    @classmethod
    def of(cls, source: str, environment: jinja2.Environment) -> Reads:
        """Return what a template reads; `source` is valid for the environment."""
        tree = environment.parse(source)
        keys = {node.attr for node in tree.find_all(nodes.Getattr)} | set(_strings(tree))
        marks = set(_marks(tree)) - {""}
        return cls(
            frozenset(meta.find_undeclared_variables(tree)),
            frozenset(keys),
            tuple(sorted(marks, key=lambda text: (-len(text), text))),
        )


def _marks(tree: nodes.Node) -> Iterator[str]:
    """Yield the strings that can decide what is rendered.

    Strings that are only written cannot. Words are names of roles and keys, unless a method of strings takes them.
    """
    for node in tree.find_all(DECIDING):
        callee = node.node if isinstance(node, nodes.Call) else None
        if isinstance(callee, nodes.Name) and callee.name in SAYING:
            continue
        if isinstance(callee, nodes.Getattr):
            if callee.attr in TEXT_METHODS:
                yield from _strings(node)
            if callee.attr.endswith("strip"):
                continue  # what it takes off, is seen to be missing
        yield from (text for text in _strings(node) if text.strip() and not WORD.fullmatch(text))


def _strings(tree: nodes.Node) -> Iterator[str]:
    for node in [tree, *tree.find_all(nodes.Const)]:
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value
