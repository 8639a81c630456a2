"""What takes files in needs no GPU and no model: it runs alongside a process that has all the memory of the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import make_run, snapshot

from onward import cli

CODE = """
import atexit, json, sys
from onward.cli import main

def say():
    loaded = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
    opened = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
    print(json.dumps({"loaded": loaded, "opened": opened}))

atexit.register(say)
sys.argv = ["onward", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("command", ["add", "check"])
def test_taking_files_in_opens_no_device(model: Path, tmp_path: Path, command: str) -> None:
    """`add` and the checker import no library that could open a GPU or load a model."""
    run = make_run(tmp_path / "run", model)
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    words = ["add", str(file)] if command == "add" else ["check"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words, "--run", str(run)],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    assert {"loaded": [], "opened": False} == json.loads(done.stdout.splitlines()[-1])
    assert snapshot(run)
