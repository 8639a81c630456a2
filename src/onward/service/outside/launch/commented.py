"""YAML with comments above keys; PyYAML writes the values, so that every text is read back as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from onward.text import printable

WIDTH = 1 << 16
"""The line length at which PyYAML breaks lines, large enough to keep paths and commands whole."""


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as block scalars."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def render(document: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Return a document as YAML with comments.

    Args:
        comments: the comment above a key, by the key's path: `spec.template`, `containers.0.resources`.
    """
    text = yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
    above: dict[int, list[str]] = {}
    for path, line, column in _keys(yaml.compose(text, Loader=yaml.SafeLoader), ""):
        if path in comments:
            above[line] = [f"{' ' * column}# {words}" for words in comments[path].split("\n")]
    lines = text.splitlines()
    return "".join(f"{line}\n" for number, own in enumerate(lines) for line in (*above.get(number, ()), own))


def head(*lines: str) -> str:
    """Return the comment that a file begins with."""
    return "".join(f"# {printable(line)}".rstrip() + "\n" for line in lines)


def _keys(node: yaml.Node | None, path: str) -> Iterator[tuple[str, int, int]]:
    """Yield every key's path, line and column; entries of a list are counted from 0."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = f"{path}.{key.value}" if path else str(key.value)
            yield place, key.start_mark.line, key.start_mark.column
            yield from _keys(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _keys(value, f"{path}.{number}")
