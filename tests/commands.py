"""The command line as a user sees it: exit status and output, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import new_run

from onward import cli
from onward.config.text import parse_settings
from onward.layout import RunLayout
from onward.status import read_history, read_status

SMALL = ("max_length=256", "lora.rank=2", "batch_size=4", "warmup_steps=2", "log_steps=1", "evaluation.share=0")
"""Settings that make a run of the tiny model quick."""
UNTOUCHED = ("current_model", "boundaries", "archive", "inbox", "cache", "onward.yaml")
"""What a refusal leaves alone: all of a run but the ledger (compared by content), locks and `rejected/`."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Typed(io.TextIOWrapper):
    """What somebody types on a terminal or sends through a pipe; lone surrogates are bytes that are not UTF-8."""

    def __init__(self, typed: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(typed.encode(errors="surrogateescape")), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def onward(*arguments: object, typed: str | None = None, terminal: bool = True) -> Outcome:
    """Run the command line in this process; an exception that escapes fails the test.

    Args:
        typed: what is typed on a terminal; None if there is no terminal.
        terminal: false if it comes through a pipe.
    """
    out, err = io.StringIO(), io.StringIO()
    argv, stdin = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["onward", *map(str, arguments)], io.StringIO() if typed is None else Typed(typed, terminal)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        return Outcome(int(ended.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv, sys.stdin = argv, stdin
    raise AssertionError("the command line returned without an exit status")


def onward_process(*arguments: object, cwd: Path | None = None, **environment: str) -> Outcome:
    """Run the command line in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if name != "ONWARD_RUN"}
    variables |= {"PYTHONPATH": str(Path(cli.__file__).parents[2]), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "onward", *map(str, arguments)],
        cwd=cwd, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def make_run(directory: Path, model: Path, *settings: str) -> Path:
    """Make a run of the tiny model; return its directory."""
    return new_run(directory, model, **parse_settings([*SMALL, *settings])).layout.root


def snapshot(run: Path) -> dict[str, Any]:
    """Return all that a refused command must leave as it was: every file by hash, and what the ledger says."""
    paths = [
        path for name in UNTOUCHED for path in ((run / name).rglob("*") if (run / name).is_dir() else [run / name])
    ]
    files = {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }
    layout = RunLayout(run)
    status = read_status(layout)
    return {
        "files": files,
        "history": read_history(layout),
        "status": {key: status[key] for key in ("global_step", "queue", "file", "checkpoint")},
    }


def assert_refused(outcome: Outcome, status: int, *words: str) -> None:
    """The exit status is `status`, stderr holds every word, stdout nothing, and no traceback shows."""
    assert "Traceback" not in outcome.err
    assert status == outcome.status, outcome.err
    assert "" == outcome.out
    assert [] == [word for word in words if word not in outcome.err], outcome.err
