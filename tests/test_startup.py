"""The start of a process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
from onward.startup import large_imports
{before}
with large_imports():
    inside = gc.isenabled()
    import torch
print(inside, gc.isenabled(), gc.get_freeze_count() > 10_000)
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
