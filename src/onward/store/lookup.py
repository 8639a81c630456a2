"""Finds a file or a step by what the user types: a name, a position, a hash prefix, a step.

`file:X` says that X is a file's position, name or hash prefix, and `step:N` that N is a step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onward.errors import UsageError
from onward.store.files import HELD
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.text import quoted

FILE, STEP = "file:", "step:"
ALL_STATES = ("arriving", "queued", "training", "done", "undone", "skipped", "quarantined", "rejected")
DIGITS = 20
"""More than any step has; Python refuses to read thousands of them."""
_HASH = re.compile(r"[0-9a-f]{4,64}")
_STEP = re.compile(r"step[:-](\d+)")


def typed(name: str) -> str:
    """Return a file's name as one word of a command; one that begins with a dash would be taken for an option."""
    return quoted(f"{FILE}{name}" if name.startswith("-") else name)


def find_file(ledger: Ledger, name: str, *states: str) -> FileRow:
    """Return the file in these states with a name, a position or a hash prefix.

    Of several with one content that have no place in the stream it is the last: nothing tells them apart. If others of
    that content have a place, which names them, the hash means those without.

    Raises:
        UsageError: there is none, or there are several.
    """
    rows = ledger.files(*states)
    matches = _matches(rows, name)
    if len(matches) == 1 or _are_alike(matches):
        return matches[-1]
    if _are_named_by_hash(matches, name) and _are_alike(without := _without_place(matches)):
        return without[-1]
    if matches:
        raise _several(name, matches, where="FILE")
    others = [state for state in ALL_STATES if state not in states]
    known = _matches(ledger.files(*others), name)
    if known:
        come = ("arriving", *HELD)
        # a file may have been queued again, or have been refused as a duplicate of the one in the stream
        row = max(known, key=lambda each: (each.state in come, each.state not in ("undone", "rejected"), each.id))
        hint = f"Files that can be given here: {_listed(rows)}."
        if row.state == "done":
            hint = f"onward rebuild --without {FILE}{row.position} makes the run as if it had never seen it."
        place = f", file {row.position} of the stream" if row.position and row.state in HELD else ""
        raise UsageError(f"{name!r} is {row.state}{place}", where="FILE", hint=hint)
    expected = _expected(ledger, name, rows)
    if expected is not None:
        what = f"file {name.removeprefix(FILE)} waits and may still get another place"
        raise UsageError(what, where="FILE", hint=f"Give its name: {expected}")
    raise UsageError(
        f"this run has no file {name!r}", where="FILE", hint=f"Files that can be given here: {_listed(rows)}."
    )


def find_step(ledger: Ledger, to: str, steps: Sequence[int], option: str = "--to") -> int:
    """Return the step of the boundary that `to` names.

    Args:
        steps: the steps that can be meant, such as those with a restore point.
        option: the option that it was typed after.

    Raises:
        UsageError: it names neither a finished file nor a boundary of this run, or several of them.
    """
    done = ledger.files("done")
    matches = [] if to.startswith(STEP) else _matches(done, to)
    if len(matches) > 1:
        raise _several(to, matches, where=option)
    step = _step_meant(to, steps)
    if matches:
        row = matches[0]
        if step is None or step == row.last_step:
            return row.last_step
        ends = f"which ends at step {row.last_step}"
        raise UsageError(
            f"{to!r} is file {row.position} ({row.name}), {ends}, and it is also step {step}",
            where=option,
            hint=f"Say which one: {option} {FILE}{row.position} or {option} {STEP}{step}",
        )
    if step is not None:
        return step
    kept = ", ".join(map(str, sorted(steps))) or "none"
    raise UsageError(
        f"{to!r} is neither a finished file nor the step of a boundary",
        where=option,
        hint=f"Finished files: {_listed(done)}. Restore points at steps: {kept}.",
    )


def states_named(ledger: Ledger, text: str, steps: Sequence[int]) -> list[str]:
    """Return what a text means to `find_step`, each in the form that says which; nothing if it names no state.

    Args:
        steps: as for `find_step`.
    """
    step = _step_meant(text, steps)
    files = [] if text.startswith(STEP) else _matches(ledger.files("done"), text)
    return [*(f"{FILE}{row.position}" for row in files), *([] if step is None else [f"{STEP}{step}"])]


def _expected(ledger: Ledger, text: str, rows: Sequence[FileRow]) -> str | None:
    """Return what names, among some rows, the waiting file that `history` shows at a position; None for any other."""
    places = {str(row.expected): row.id for row in ledger.history()}
    found = next((row for row in rows if row.id == places.get(text.removeprefix(FILE))), None)
    if found is None:
        return None
    is_only = sum(row.name == found.name for row in rows) == 1
    return typed(found.name) if is_only else _example([found])


def _matches(rows: Sequence[FileRow], text: str) -> list[FileRow]:
    """Return the files that a text means: by name or position, or else by hash prefix."""
    exact = [row for row in rows if row.name == text]
    plain = text.removeprefix(FILE)
    exact = exact or [row for row in rows if plain == row.name or (row.position and plain == str(row.position))]
    if exact or not _HASH.fullmatch(plain.lower()):
        return exact
    return [row for row in rows if row.sha256.startswith(plain.lower())]


def _step_meant(text: str, steps: Sequence[int]) -> int | None:
    """Return the one of some steps that a text means: a number, also after `step:` or `step-`; None if it is none."""
    marked = _STEP.fullmatch(text)
    number = marked.group(1) if marked else text
    return int(number) if number.isdecimal() and len(number) < DIGITS and int(number) in steps else None


def _several(text: str, rows: Sequence[FileRow], where: str) -> UsageError:
    listed = ", ".join(f"{_place(row)} {row.name}" for row in rows)
    hint = f"Say which one, as {_example(rows)}."
    if not all(row.position or row.sha256 for row in rows):
        hint = "Nothing tells them apart until they have been read; onward history shows when they are queued."
    return UsageError(f"{text!r} could mean several files: {listed}", where=where, hint=hint)


def _are_alike(rows: Sequence[FileRow]) -> bool:
    contents = {row.sha256 for row in rows}
    return len(contents) == 1 and "" not in contents and not any(row.position for row in rows)


def _are_named_by_hash(rows: Sequence[FileRow], text: str) -> bool:
    plain = text.removeprefix(FILE).lower()
    return len({row.sha256 for row in rows}) == 1 and bool(plain) and all(row.sha256.startswith(plain) for row in rows)


def _without_place(rows: Sequence[FileRow]) -> list[FileRow]:
    return [row for row in rows if not row.position]


def _example(rows: Sequence[FileRow]) -> str:
    placed, others = max(rows, key=lambda row: row.position or 0), _without_place(rows)
    if placed.position and _are_alike(others) and others[0].sha256 == placed.sha256:
        return f"{FILE}{placed.position}, or {FILE}{placed.sha256[:12]} for the last without a place"
    return f"{FILE}{placed.position or rows[-1].sha256[:12]}"


def _place(row: FileRow) -> str:
    return str(row.position or row.sha256[:12] or row.state)


def _listed(rows: Sequence[FileRow], limit: int = 20) -> str:
    shown = ", ".join(f"{row.position or row.state} {row.name}" for row in rows[:limit]) or "none"
    return f"{shown} and {len(rows) - limit} more" if len(rows) > limit else shown
