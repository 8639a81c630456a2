"""Refused files: kept in `rejected/`, each with a report that says which row, why and what to do."""

from __future__ import annotations

import filecmp
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.atomic import replace_json
from onward.data.containers import FileError
from onward.data.tokenize import IntakeReport
from onward.errors import FileRejected
from onward.layout import RunLayout
from onward.service.intake.names import plain_name, unused_name
from onward.store.rows import FileRow

REPORTED = 20
"""Rows that a rejection names at most."""
REASON_LENGTH = 500
"""Characters of a reason: it may quote what the row holds."""


@dataclass(frozen=True)
class Refusal:
    """Why a file was not accepted. `problems` are `{"line", "reason", "remedy"}`, at most `REPORTED`."""

    name: str
    problems: list[dict[str, Any]]
    problem_count: int
    unit: str = "line"

    @classmethod
    def of_file(cls, name: str, error: FileError) -> Refusal:
        """The refusal of a file that cannot be read as what it claims to be."""
        return cls(plain_name(name), [_problem(error.line, error.reason, error.remedy)], 1)

    @classmethod
    def of_rows(cls, name: str, report: IntakeReport) -> Refusal:
        """The refusal of a file with bad rows."""
        problems = [_problem(problem.line, problem.reason, problem.remedy) for problem in report.problems]
        return cls(name, problems, report.problem_count, report.unit)

    @classmethod
    def of_duplicate(cls, row: FileRow, twin: FileRow) -> Refusal:
        """The refusal of content that the stream has already."""
        place = f"file {twin.position} of the stream" if twin.position else "a file of the stream or this command"
        reason = f"its content is that of {place} ({twin.name}, {twin.state})"
        return cls(row.name, [_problem(None, reason, "to train it once more: onward add --again")], 1)

    @classmethod
    def of_training(cls, name: str, reason: str, remedy: str) -> Refusal:
        """The refusal of a file that was accepted and could not be trained."""
        return cls(name, [_problem(None, reason, remedy)], 1)

    def lines(self) -> list[str]:
        """Return the refusal as lines for a person: file, row, reason, remedy."""
        shown = [self._line(problem) for problem in self.problems]
        hidden = self.problem_count - len(shown)
        return shown + ([f"{self.name}: and {hidden} more"] if hidden > 0 else [])

    def _line(self, problem: dict[str, Any]) -> str:
        row = f", {self.unit} {problem['line']}" if problem["line"] is not None else ""
        remedy = f" ({problem['remedy']})" if problem["remedy"] else ""
        return f"{self.name}{row}: {problem['reason']}{remedy}"


def keep_refused(layout: RunLayout, path: Path, refusal: Refusal, now: float, *, move: bool = False) -> None:
    """Put a refused file into `rejected/` with its report, the report first.

    Args:
        now: the time of the refusal, seconds since the epoch.
        move: the file goes there; else a copy of it, where it can be read.
    """
    layout.rejected.mkdir(exist_ok=True)
    target = layout.rejected / refusal.name
    if os.path.lexists(target) and (not path.is_file() or not filecmp.cmp(path, target, shallow=False)):
        target = unused_name(layout.rejected, refusal.name)
    report = {"file": refusal.name, "problem_count": refusal.problem_count, "unit": refusal.unit}
    report |= {"rejected": now, "problems": refusal.problems}
    replace_json(target.with_name(f"{target.name}.report.json"), report)
    if move:
        shutil.move(path, target)
    elif path.is_file() and os.access(path, os.R_OK) and not target.exists():
        shutil.copyfile(path, target)


def rejection(refusals: list[Refusal], given: int) -> FileRejected:
    """Return the error for a command of `given` files of which some were refused."""
    lines = [line for refusal in refusals for line in refusal.lines()]
    what = f"{len(refusals)} of {given} files rejected, none added:\n" + "\n".join(f"  {line}" for line in lines)
    return FileRejected(
        what, where=refusals[0].name, hint="Reports are in rejected/. Mend the rows and add the file again."
    )


def _problem(line: int | None, reason: str, remedy: str) -> dict[str, Any]:
    """A problem as one line of plain text each: what a row holds must not steer a terminal or break a report."""
    return {"line": line, "reason": _one_line(reason), "remedy": _one_line(remedy)}


def _one_line(text: str) -> str:
    shown = text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
