"""The start of a process."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from onward.startup import scan_once

SCRIPT = """
import gc, sys
from onward.startup import large_imports
{before}
with large_imports():
    inside = gc.isenabled()
    import torch
print(inside, gc.isenabled(), gc.get_freeze_count() > 10_000)
"""


EXPORTS = """
import contextlib, hashlib, sys
from onward.startup import large_imports
with {context}:
    import transformers.models
names = [
    repr((sorted(module._class_to_module.items()), sorted(module._modules), sorted(
        (name, sorted(backends)) for name, backends in module._object_missing_backend.items())))
    for module in (transformers, transformers.models)
]
from transformers.utils import import_utils
print(len(names[0]) > 100_000, hashlib.sha256(repr(names).encode()).hexdigest())
print(import_utils.create_import_structure_from_path.cache_info().hits > 500)
"""


def run(before: str = "") -> str:
    """Run the script in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", SCRIPT.format(before=before)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_large_imports_rest_the_collector_and_put_their_objects_out_of_its_way() -> None:
    """Within, the collector is off; afterwards it is on again and passes over what was imported."""
    assert "False True True" == run()


def test_a_process_that_has_torch_is_left_as_it_is() -> None:
    """Where torch is imported already, large garbage may wait: nothing is kept from the collector."""
    assert "True True False" == run("import torch")


def test_a_collector_that_the_user_switched_off_stays_off() -> None:
    """The user's setting wins."""
    assert "False False False" == run("gc.disable()")


def test_scanned_once_transformers_exports_what_it_exports() -> None:
    """Names, modules and missing backends are those of a plain import; the second look is answered by the first."""

    def exports(context: str) -> list[str]:
        command = [sys.executable, "-c", EXPORTS.format(context=context)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    plain, quick = exports("contextlib.nullcontext()"), exports("large_imports()")
    assert "True" == plain[0]
    assert plain[:2] == quick[:2]
    assert "True" == quick[2]


def test_another_scanner_is_left_as_it_is() -> None:
    """Where a release of transformers has other functions, nothing is changed."""
    other = SimpleNamespace(create_import_structure_from_path=len, fetch__all__=len)
    scan_once(other)
    assert other == SimpleNamespace(create_import_structure_from_path=len, fetch__all__=len)
    empty = SimpleNamespace()
    scan_once(empty)
    assert empty == SimpleNamespace()
