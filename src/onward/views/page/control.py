"""What a page may ask for: the same requests as on the command line, made in the same way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from onward.errors import OnwardError, RunLocked, UsageError, VerificationFailed
from onward.layout import RunLayout
from onward.text import duration, quoted, storable

PATIENCE = 30.0
"""Seconds that a browser waits for the owner's answer; the request stays open after that."""
LONG = 3600.0
"""Seconds that a command in a process of its own may take."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "pause": ("release",), "resume": (), "stop": ("after_file",), "skip": ("file", "reason")
}  # fmt: skip
"""What may be asked of an owner, and what each request may say."""
ROLLBACK = ("to", "requeue")
"""What a way back may say."""
_ERRORS = {2: UsageError, 4: RunLocked, 5: VerificationFailed}


def ask(layout: RunLayout, kind: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Make a request of the owner and wait for the answer.

    Args:
        kind: pause, resume, stop or skip.
        wanted: the command's options: `release`; `after_file`; `file` and `reason`.

    Raises:
        UsageError: an option makes no sense.
        OnwardError: as on the command line.
    """
    from onward.run import Run  # at the first request: it loads what only actions need

    run = Run(layout.root)
    if kind == "pause":
        return {"answer": run.pause(release=_flag(wanted, "release"), patience=PATIENCE)}
    if kind == "resume":
        return {"answer": run.resume(patience=PATIENCE)}
    if kind == "stop":
        return {"answer": run.stop(after_file=_flag(wanted, "after_file"), patience=PATIENCE)}
    assert kind == "skip", kind
    return {"answer": run.skip(_text(wanted, "file"), reason=_text(wanted, "reason"), patience=PATIENCE)}


def rollback(layout: RunLayout, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Go back to a restore point, by the command line in a process of its own: it loads large libraries.

    Raises:
        UsageError: no file or step is named.
        OnwardError: the command failed.
    """
    to = _text(wanted, "to")
    if not to:
        raise UsageError(
            "the request does not say where to go back to", where="to", hint='For example {"to": "step:120"}.'
        )
    again = ["--requeue"] if _flag(wanted, "requeue") else []
    return _command(layout, "rollback", f"--to={to}", "--yes", *again)


def verify(layout: RunLayout, seconds: float = LONG) -> dict[str, Any]:
    """Check the run's proof, by the command line in a process of its own.

    Args:
        seconds: how long that may take.

    Raises:
        RunLocked: a process trains; a proof needs a state that does not change.
        OnwardError: it takes longer.
    """
    return _command(layout, "verify", seconds=seconds)


def _command(layout: RunLayout, *words: str, seconds: float = LONG) -> dict[str, Any]:
    line = [sys.executable, "-P", "-m", "onward", *words, "--json", "--run", str(layout.root.absolute())]
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        what = f"the command was ended after {duration(seconds)}"
        hint = f"In a terminal it may take longer: onward {words[0]} --run {quoted(layout.root)}"
        raise OnwardError(what, hint=hint) from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        said = f"\n{done.stderr.strip()}".rpartition("\nonward: ")[2]  # a library may have said something before
        what, _, hint = said.strip().partition("\n")
        kind = _ERRORS.get(done.returncode, OnwardError)
        raise kind(what or f"the command ended with status {done.returncode}", hint=hint.strip() or None) from None


def _flag(wanted: Mapping[str, Any], name: str) -> bool:
    value = wanted.get(name, False)
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false", where=name)
    return value


def _text(wanted: Mapping[str, Any], name: str) -> str | None:
    value = wanted.get(name)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{name} must be a string", where=name)
    if value is not None and ("\0" in value or value != storable(value)):  # no command line and no ledger holds them
        raise UsageError(f"{name} contains something that is not a character", where=name)
    return value
