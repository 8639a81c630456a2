"""Finds out from a chat template's syntax tree whether what messages say decides what else it writes.

Most templates only write contents, or look for pieces of text in them. One that looks at more (say, the length of a
question) may render the beginning of a chat differently from the whole, whatever it does with other contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jinja2 import nodes

CONTENTS = frozenset(("content", "text", "value"))
"""Keys under which a message, or a part of one, holds its text."""
HARMLESS_TESTS = frozenset(("boolean", "defined", "iterable", "mapping", "none", "sequence", "string", "undefined"))
"""Tests that either every text passes or none does."""
HARMLESS_FILTERS = frozenset(("d", "default", "safe", "string", "trim"))
STRIPS = frozenset(("lstrip", "rstrip", "strip"))
SEARCHES = frozenset(
    ("count", "endswith", "find", "index", "partition", "rfind", "rpartition", "rsplit", "split", "startswith")
)
"""Methods of a text whose outcome depends on whether a piece of text is in it."""
CHOICES = frozenset(("groupby", "reject", "rejectattr", "select", "selectattr", "sort", "unique"))
"""Filters that choose messages."""


@dataclass
class Control:
    """What a template bases decisions on.

    Args:
        words: words that contents are compared with.
        by_more: whether anything other than a piece of text in a content decides.
    """

    words: set[str] = field(default_factory=set[str])
    by_more: bool = False


def control_of(tree: nodes.Node) -> Control:
    """Return what a template bases decisions on."""
    judge = _Judge(_Contents(tree))
    for test in _tests(tree):
        judge.look_at(test)
    for chosen in tree.find_all(nodes.Filter):
        if chosen.name in CHOICES and CONTENTS.intersection(_strings(chosen.args)):
            judge.found.by_more = True
    return judge.found


def _tests(tree: nodes.Node) -> Iterator[nodes.Node]:
    for found in tree.find_all((nodes.If, nodes.CondExpr)):
        yield found.test
    for loop in tree.find_all(nodes.For):
        if loop.test is not None:
            yield loop.test


def _strings(found: Iterable[nodes.Node]) -> Iterator[str]:
    return (node.value for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str))


class _Contents:
    """Tells which expressions are made of contents: directly, or through names that contents were assigned to."""

    def __init__(self, tree: nodes.Node) -> None:
        self._names: set[str] = set()
        before = -1
        while before != len(self._names):
            before = len(self._names)
            self._spread(tree)

    def _spread(self, tree: nodes.Node) -> None:
        for assign in tree.find_all(nodes.Assign):
            self._give(assign.target, assign.node)
        for block in tree.find_all(nodes.AssignBlock):
            if any(self.made_of(part) for part in block.body):
                self._give(block.target, None)
        for loop in tree.find_all(nodes.For):
            self._give(loop.target, loop.iter)
        calls = [call.node for call in tree.find_all(nodes.Call) if self._hands_over(call)]
        handed = {called.name for called in calls if isinstance(called, nodes.Name)}
        for macro in tree.find_all(nodes.Macro):
            if macro.name in handed:
                self._names |= {argument.name for argument in macro.args}

    def _hands_over(self, call: nodes.Call) -> bool:
        given = [*call.args, *(keyword.value for keyword in call.kwargs)]
        return isinstance(call.node, nodes.Name) and call.node.name != "namespace" and any(map(self.made_of, given))

    def _give(self, target: nodes.Node, value: nodes.Node | None) -> None:
        if value is not None and not self.made_of(value):
            return
        if isinstance(target, nodes.NSRef):
            self._names.add(f"{target.name}.{target.attr}")
        self._names |= {name.name for name in [target, *target.find_all(nodes.Name)] if isinstance(name, nodes.Name)}

    def made_of(self, node: nodes.Node) -> bool:
        """Whether a content is part of an expression."""
        kinds = (nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Keyword)
        return any(self._is_one(part) for part in [node, *node.find_all(kinds)])

    def _is_one(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._names
        if isinstance(node, nodes.Getattr):
            owner = node.node.name if isinstance(node.node, nodes.Name) else ""
            return node.attr in CONTENTS or f"{owner}.{node.attr}" in self._names
        named = node.arg if isinstance(node, nodes.Getitem) else node.value if isinstance(node, nodes.Keyword) else None
        return named is not None and bool(CONTENTS.intersection(_strings([named])))  # map(attribute="content")


class _Judge:
    """Looks at the tests of a template."""

    def __init__(self, contents: _Contents) -> None:
        self._contents = contents
        self.found = Control()

    def look_at(self, node: nodes.Node) -> None:
        """Find out which properties of contents an expression depends on."""
        if not self._contents.made_of(node) or self._is_plain(node):
            return
        if isinstance(node, nodes.Not):
            self.look_at(node.node)
        elif isinstance(node, nodes.And | nodes.Or):
            self.look_at(node.left)
            self.look_at(node.right)
        elif isinstance(node, nodes.Compare):
            self._compare(node)
        elif not (isinstance(node, nodes.Test) and node.name in HARMLESS_TESTS):
            self.found.by_more = True

    def _compare(self, node: nodes.Compare) -> None:
        for operand in [node.expr, *(each.expr for each in node.ops)]:
            fixed = [operand, *operand.items] if isinstance(operand, nodes.List | nodes.Tuple) else [operand]
            if self._contents.made_of(operand):
                self.found.by_more |= not (self._is_plain(operand) or _is_length_by_nothing(operand, node))
            elif not all(isinstance(part, nodes.Const | nodes.List | nodes.Tuple) for part in fixed):
                self.found.by_more = True
            self.found.words.update(_strings(fixed))

    def _is_plain(self, node: nodes.Node) -> bool:
        """Whether an expression is a content, or the text before or after a piece of text in it."""
        if isinstance(node, nodes.Name | nodes.Getattr):
            return True
        if isinstance(node, nodes.Getitem):
            return bool(list(_strings([node.arg]))) or self._searches(node.node)
        if isinstance(node, nodes.Filter):
            return node.name in HARMLESS_FILTERS and node.node is not None and self._is_plain(node.node)
        return self._searches(node)

    def _searches(self, node: nodes.Node) -> bool:
        if not isinstance(node, nodes.Call) or not isinstance(node.node, nodes.Getattr):
            return False
        given = node.args
        known = node.node.attr in STRIPS or (node.node.attr in SEARCHES and given)
        return bool(known) and len(list(_strings(given))) == len(given) and self._is_plain(node.node.node)


def _is_length_by_nothing(operand: nodes.Expr, compare: nodes.Compare) -> bool:
    """Whether a length is compared with 0."""
    others = [part for part in [compare.expr, *(each.expr for each in compare.ops)] if part is not operand]
    is_length = isinstance(operand, nodes.Filter) and operand.name in ("length", "count")
    return is_length and all(isinstance(part, nodes.Const) and part.value == 0 for part in others)
