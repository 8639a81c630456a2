"""The scripts of the repository that no test runs: what they import from Onward is there."""

from __future__ import annotations

import ast
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("bench", "demo", "docs") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_script_imports_is_there(path: Path) -> None:
    """Also what it imports within a function, minutes after it was started."""
    missing: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "onward":
            module = import_module(node.module)
            names = [name.name for name in node.names]
            missing += [name for name in names if not hasattr(module, name) and not _has_module(module, name)]
    assert [] == missing


def _has_module(package: ModuleType, name: str) -> bool:
    return hasattr(package, "__path__") and util.find_spec(f"{package.__name__}.{name}") is not None
