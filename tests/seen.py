"""What a script saw that needs a process of its own, with other packages or another device: it prints JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def seen_by(
    script: str, *words: object, beside: Sequence[Path] = (), variables: Mapping[str, str] | None = None
) -> tuple[Any, str]:
    """Run a script of this folder to its end; return the JSON of its last line, and what it said on standard error.

    Args:
        beside: folders that it can import from, after Onward's own and this one.
        variables: environment variables that it gets, too.
    """
    paths = os.pathsep.join(map(str, [TESTS.parent / "src", TESTS, *beside]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(variables or {})}
    command = [sys.executable, "-W", "ignore", str(TESTS / script), *map(str, words)]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert 0 == outcome.returncode, outcome.stderr
    return json.loads(outcome.stdout.splitlines()[-1]), outcome.stderr
