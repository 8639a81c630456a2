"""Refused files: kept in `rejected/`, each with a report that says which row, why and what to do."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.atomic import TEMPORARY_PREFIX, replace_json
from onward.data.files.faults import FileError, described
from onward.data.report import IntakeReport
from onward.errors import FileRejected
from onward.layout import RunLayout
from onward.service.intake.budget import Spending
from onward.service.intake.names import plain_name, rejected_name, report_of, unused_name
from onward.service.intake.reading import Changed, is_regular, look, move_durably, read_whole
from onward.store.rows import FileRow
from onward.text import printable

REASON_LENGTH = 500
"""The most characters of a reason, which may quote the row."""


@dataclass(frozen=True)
class Refusal:
    """Why a file was not accepted. `problems` is a list of `{"line", "reason", "remedy"}`, at most `PROBLEMS_SHOWN`.

    `way_out` is what may be done instead of fixing the rows; "" if there is nothing.
    """

    name: str
    problems: list[dict[str, Any]]
    problem_count: int
    unit: str = "line"
    way_out: str = ""

    @classmethod
    def of_file(cls, name: str, error: FileError) -> Refusal:
        """Return the refusal of a file that cannot be read as what it claims to be."""
        return cls(plain_name(name), [_problem(error.line, error.reason, error.remedy)], 1)

    @classmethod
    def of_rows(cls, name: str, report: IntakeReport) -> Refusal:
        """Return the refusal of a file with bad rows."""
        problems = [_problem(problem.line, problem.reason, problem.remedy) for problem in report.problems]
        return cls(name, problems, report.problem_count, report.unit, report.way_out)

    @classmethod
    def of_duplicate(cls, row: FileRow, twin: FileRow) -> Refusal:
        """Return the refusal of content that the stream already has."""
        place = f"file {twin.position} of the stream" if twin.position else "a file of the stream or this command"
        reason = f"its content is that of {place} ({twin.name}, {twin.state})"
        return cls(row.name, [_problem(None, reason, "to train it once more: onward add --again FILE")], 1)

    @classmethod
    def of_change(cls, row: FileRow) -> Refusal:
        """Return the refusal of a file that no longer has the recorded hash."""
        reason = "it changed after it was taken: its writer still had it open"
        return cls(row.name, [_problem(None, reason, "add it again when its writer is done")], 1)

    @classmethod
    def of_deaths(cls, row: FileRow, deaths: int) -> Refusal:
        """Return the refusal of a file at which processes died."""
        reason = f"checking it killed the process {deaths} times, through lack of memory or a fault in a library"
        return cls(row.name, [_problem(None, reason, "split the file, or export its rows again")], 1)

    @classmethod
    def of_error(cls, row: FileRow, error: BaseException) -> Refusal:
        """Return the refusal of a file that made checking fail in an unforeseen way."""
        return cls(row.name, [_problem(None, f"it cannot be used ({described(error)})", "export its rows again")], 1)

    @classmethod
    def of_training(cls, name: str, reason: str, remedy: str) -> Refusal:
        """Return the refusal of a file that was accepted but could not be trained."""
        return cls(name, [_problem(None, reason, remedy)], 1)

    @classmethod
    def of_guard(cls, name: str, found: Sequence[dict[str, Any]], way_out: str) -> Refusal:
        """Return the refusal of a file that exceeded the guard's limits: what was found, and the rows to look at."""
        problems = [_problem(each["line"], each["reason"], each["remedy"]) for each in found]
        return cls(name, problems, len(problems), way_out=way_out)

    def lines(self) -> list[str]:
        """Return the refusal as lines of text: file, row, reason, remedy."""
        shown = [self._line(problem) for problem in self.problems]
        hidden = self.problem_count - len(shown)
        return shown + ([f"{self.name}: and {hidden} more"] if hidden > 0 else [])

    def _line(self, problem: dict[str, Any]) -> str:
        row = f", {self.unit} {problem['line']}" if problem["line"] is not None else ""
        remedy = f" ({problem['remedy']})" if problem["remedy"] else ""
        return f"{self.name}{row}: {problem['reason']}{remedy}"


def keep_refused(layout: RunLayout, path: Path, refusal: Refusal, now: float, *, move: bool = False) -> Path:
    """Put a refused file into `rejected/` with its report, the report first; return the report's path.

    Args:
        now: the time of the refusal, seconds since the epoch.
        move: move the file there; otherwise copy it, if it can be read.
    """
    layout.rejected.mkdir(exist_ok=True)
    target = layout.rejected / rejected_name(refusal.name)
    if not _may_take(target, path, links=not move):
        target = unused_name(layout.rejected, target.name, with_report=True)
    report = {"file": refusal.name, "problem_count": refusal.problem_count, "unit": refusal.unit}
    report |= {"rejected": now, "problems": refusal.problems}
    report |= {"way_out": refusal.way_out} if refusal.way_out else {}
    is_new = look(report_of(target)) is None
    replace_json(report_of(target), report)
    if not move and look(target) is None:
        _keep_copy(path, target)
    elif move and look(path) is not None:
        try:
            move_durably(path, target)
        except Changed:  # it is still being written: it stays where it is
            pass
        except OSError:
            if is_new:  # a report says that the file is next to it
                report_of(target).unlink(missing_ok=True)
            raise
    return report_of(target)


def _may_take(target: Path, path: Path, *, links: bool) -> bool:
    """Whether a refused file and its report may take these names: they are free, or taken by the same file.

    Anything else is left alone, also under the names that both have while they are written.
    """
    report = report_of(target)
    if not all(is_free(each.with_name(f"{TEMPORARY_PREFIX}{each.name}")) for each in (target, report)):
        return False
    if look(report) is not None and not (is_regular(report) and _is_report(report)):
        return False
    if look(target) is None:
        return True
    is_file = path.is_file() if links else is_regular(path)
    return is_file and is_regular(target) and filecmp.cmp(path, target, shallow=False)


def is_free(unfinished: Path) -> bool:
    """Whether a name for what is being written may be used; a file is what an interrupted write left."""
    return look(unfinished) is None or is_regular(unfinished)


def _is_report(path: Path) -> bool:
    """Whether a file is a report that Onward wrote, and not a user's file with such a name."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"file", "problems", "rejected"} <= values.keys()


def _keep_copy(path: Path, target: Path) -> None:
    """Copy a file that the user still has; if that fails, the report says enough."""
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        with temporary.open("wb") as writer:
            read_whole(path, Spending(), writer=writer, links=True)
        temporary.replace(target)
    except (OSError, Changed, FileError):
        temporary.unlink(missing_ok=True)


def rejection(refusals: list[Refusal], given: int) -> FileRejected:
    """Return the error for a command with `given` files, some of which were refused."""
    lines = [line for refusal in refusals for line in refusal.lines()]
    what = f"{len(refusals)} of {given} files rejected, none added:\n" + "\n".join(f"  {line}" for line in lines)
    ways = {refusal.way_out for refusal in refusals}
    way = f" {ways.pop()}" if len(ways) == 1 and "" not in ways else ""
    hint = f"Reports are in rejected/. Fix the rows and add the file again{',' if way else ''}{way}."
    return FileRejected(what, where=refusals[0].name, hint=hint)


def _problem(line: int | None, reason: str, remedy: str) -> dict[str, Any]:
    """Return a problem as plain one-line texts, so that a row can neither control a terminal nor break a report."""
    return {"line": line, "reason": _one_line(reason), "remedy": _one_line(remedy)}


def _one_line(text: str) -> str:
    return printable(text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]}...")
