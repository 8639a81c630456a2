"""The start of a process: large imports without work that is done again and again."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Generator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any

SCANNER = "transformers.utils.import_utils"


@contextlib.contextmanager
def large_imports() -> Generator[None]:
    """Keep the cyclic garbage collector out of the body, and what the body makes out of its later rounds.

    torch, transformers and PEFT make half a million objects that live as long as the process. To go over them again
    and again takes a fifth of the time of their import. transformers also reads its own source files, twice; see
    `scan_once`. Nothing is done where torch is imported already: by then there may be large garbage that waits for
    the collector.
    """
    if "torch" in sys.modules:
        yield
        return
    finder = _ScannerFinder()
    sys.meta_path.insert(0, finder)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if was_enabled:
            gc.freeze()
            gc.enable()


def scan_once(scanner: Any) -> None:
    """Let transformers look through its source files once, and in each at the end only.

    It reads all of them to know which names they export, once for the package and once for its models. What it
    remembers in between are 128 of 550 folders (the default size of `functools.lru_cache`), so that the second look
    finds nothing. A release that does it otherwise is left as it is.
    """
    scan = getattr(getattr(scanner, "create_import_structure_from_path", None), "__wrapped__", None)
    exported = getattr(scanner, "fetch__all__", None)
    if scan is None or exported is None:
        return
    scanner.create_import_structure_from_path = functools.cache(scan)
    scanner.fetch__all__ = lambda text: exported(text[text.rfind("\n__all__") + 1 :])


class _ScannerFinder(MetaPathFinder):
    """Finds the module with transformers' scanner, so that it is changed before it is used."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SCANNER:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is None or found.origin is None or not isinstance(found.loader, SourceFileLoader):
            return found
        return spec_from_file_location(fullname, found.origin, loader=_ScannerLoader(fullname, found.origin))


class _ScannerLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        scan_once(module)
