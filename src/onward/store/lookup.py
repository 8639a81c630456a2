"""Finding a file or a step by what a person types: a name, a position, a hash prefix, a step."""

from __future__ import annotations

from collections.abc import Sequence

from onward.errors import UsageError
from onward.store.ledger import Ledger
from onward.store.rows import FileRow


def find_file(ledger: Ledger, name: str, *states: str) -> FileRow:
    """Return the one file that a name, a position or a hash prefix means.

    Raises:
        UsageError: none, or several.
    """
    rows = ledger.files(*states)
    matches = [row for row in rows if name in (row.name, str(row.position))]
    if not matches and len(name) >= 4:
        matches = [row for row in rows if row.sha256.startswith(name.lower())]
    if len(matches) == 1:
        return matches[0]
    if matches:
        places = ", ".join(str(row.position or row.sha256[:12]) for row in matches)
        raise UsageError(f"{name!r} names several files: {places}", where="FILE", hint="Give position or hash.")
    for row in [row for row in ledger.files("done") if row.name == name][:1]:
        hint = f"onward rebuild --without {row.position} makes the run as if it had never seen it."
        raise UsageError(f"{name!r} is done, file {row.position} of the stream", where="FILE", hint=hint)
    files = ", ".join(f"{row.position or 'queued'} {row.name}" for row in rows[:20]) or "none"
    raise UsageError(f"{name!r} is no file of this kind here", where="FILE", hint=f"There are: {files}.")


def find_step(ledger: Ledger, to: str, steps: Sequence[int]) -> int:
    """Return the step of the boundary that `to` names.

    Args:
        steps: those that have a restore point.

    Raises:
        UsageError: it names no file and no boundary of this run.
    """
    done = ledger.files("done")
    matches = [row for row in done if to in (row.name, str(row.position))]
    if not matches and len(to) >= 4:
        matches = [row for row in done if row.sha256.startswith(to.lower())]
    if len(matches) > 1:
        places = ", ".join(str(row.position) for row in matches)
        raise UsageError(f"{to!r} names several files, at positions {places}", where="--to", hint="Give the position.")
    if matches:
        return matches[0].first_step + (matches[0].planned_steps or 0)
    number = to.removeprefix("step-")
    if number.isdigit() and int(number) in steps:
        return int(number)
    files = ", ".join(f"{row.position} {row.name}" for row in done) or "none"
    raise UsageError(
        f"{to!r} is no finished file and no boundary's step",
        where="--to",
        hint=f"Finished files: {files}. Restore points at steps: {', '.join(map(str, sorted(steps)))}.",
    )
