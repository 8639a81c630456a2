"""Intake: a file is copied, hashed and recorded first, then every row is checked, and it enters whole or not at all.

What was handed over survives a kill: `arrive` is durable before anything slow begins, `settle` finishes it later.
The files of one command stand or fall together, so that a refused one never changes the order of the others.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from onward.atomic import TEMPORARY_PREFIX, fsync_directory, remove_temporaries, replace_json
from onward.data.containers import FileError, check_readable
from onward.data.sources import file_format
from onward.data.tokenize import IntakeReport, RowTokenizer, cache_key, tokenize_file
from onward.digest import CHUNK
from onward.errors import FileRejected, OnwardError, UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger, Row

PRIORITIES = {"high": 1, "normal": 0, "low": -1}
REPORTED = 20
"""Rows that a rejection names at most."""
REASON_LENGTH = 500
"""Characters of a reason: it may quote what the row holds."""
NAME_BYTES, NAME_ENDING = 180, 12
"""Bytes of a long name that are kept, and characters of its end: room for a prefix, a number and `.report.json`."""


@dataclass(frozen=True)
class Refusal:
    """Why a file was not accepted. `problems` are `{"line", "reason", "remedy"}`, at most `REPORTED`."""

    name: str
    problems: list[dict[str, Any]]
    problem_count: int
    unit: str = "line"

    def lines(self) -> list[str]:
        """Return the refusal as lines for a person: file, row, reason, remedy."""
        shown = [self._line(problem) for problem in self.problems]
        hidden = self.problem_count - len(shown)
        return shown + ([f"{self.name}: and {hidden} more"] if hidden > 0 else [])

    def _line(self, problem: dict[str, Any]) -> str:
        row = f", {self.unit} {problem['line']}" if problem["line"] is not None else ""
        remedy = f" ({problem['remedy']})" if problem["remedy"] else ""
        return f"{self.name}{row}: {problem['reason']}{remedy}"


class Intake:
    """Takes files into the stream of one run.

    Args:
        row_tokenizer: makes the tokenizer of rows when the first file needs it; loading one is slow.
        stop: polled while rows are read; raises to end early, and what arrived stays for the next start.
    """

    def __init__(
        self,
        layout: RunLayout,
        ledger: Ledger,
        row_tokenizer: Callable[[], tuple[RowTokenizer, str]],
        *,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.ledger = ledger
        self.stop = stop
        self._row_tokenizer = row_tokenizer
        self._lock = FileLock(layout.intake_lock)

    def take(self, paths: Sequence[Path], *, again: bool = False, priority: str = "normal") -> list[Row]:
        """Take in files in order, after whatever an earlier process left unfinished.

        Files that the stream still owes are not an error: the same command may be given again after a kill.

        Args:
            again: accept content that the stream already has.

        Returns:
            The ledger's rows of the files that were accepted now.

        Raises:
            FileRejected: at least one of `paths` was refused; none of them entered the stream.
        """
        with self._lock:
            for path in paths:
                self._require_readable(path)
            command = uuid.uuid4().hex
            self._arrive(paths, command, again, PRIORITIES[priority])
            try:
                return self._settle(command)
            except OnwardError:  # a refused command takes nothing in; a killed one is finished by the next process
                self._withdraw(command)
                raise

    def finish_left_over(self) -> list[FileRejected]:
        """Finish what an interrupted process took in; returns the refusals that it can no longer report."""
        refused: list[FileRejected] = []
        with self._lock:
            for row in self.ledger.files("arriving"):
                try:
                    self._settle(row["command"])
                except FileRejected as error:
                    refused.append(error)
        return refused

    @staticmethod
    def _require_readable(path: Path) -> None:
        if not path.exists():
            raise UsageError("there is no such file", where=path, hint="Check the path; nothing was added.")
        if path.is_dir():
            raise UsageError("this is a directory, not a file", where=path, hint=f"Name its files: {path}/*.jsonl")

    def _arrive(self, paths: Sequence[Path], command: str, again: bool, priority: int) -> None:
        """Copy files into the archive under names of their own and record them, durably."""
        arrived: list[tuple[Path, dict[str, Any]]] = []
        refusals: list[Refusal] = []
        for path in paths:
            try:
                check_readable(path)
                arrived.append(self._copy(path))
            except FileError as error:
                refusals.append(_refusal(path.name, error))
                self._keep_refused(path, refusals[-1])
        if refusals:
            for temporary, _ in arrived:
                temporary.unlink(missing_ok=True)
            raise _rejected(refusals, len(paths))
        with self.ledger.transaction():
            for _, values in arrived:
                self.ledger.insert_file(
                    command=command, again=int(again), priority=priority, state="arriving", **values
                )
        self._complete_names()

    def _copy(self, path: Path) -> tuple[Path, dict[str, Any]]:
        form = file_format(path)
        name = plain_name(path.name)
        target = unused_name(self.layout.archive, name)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
        before = path.stat()
        try:
            digest = _copy_and_hash(path, temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise FileError(
                f"the file cannot be copied: {os.strerror(error.errno or 0)}", "mend that, then add it"
            ) from None
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            temporary.unlink(missing_ok=True)
            raise FileError("the file changed while it was read", "add it when its writer is done")
        copy = target.relative_to(self.layout.root).as_posix()
        values = {"name": name, "sha256": digest, "bytes": after.st_size, "format": form, "copy": copy}
        return temporary, values

    def _complete_names(self) -> None:
        """Give recorded copies their names and remove copies that were never recorded."""
        for row in self.ledger.files("arriving"):
            copy = self.layout.root / row["copy"]
            temporary = copy.with_name(f"{TEMPORARY_PREFIX}{copy.name}")
            if temporary.exists():
                temporary.replace(copy)
        remove_temporaries(self.layout.archive)
        fsync_directory(self.layout.archive)

    def _settle(self, command: str) -> list[Row]:
        """Accept everything that arrived with a command, or refuse it all; returns the files accepted."""
        self._complete_names()
        remove_temporaries(self.layout.tokens)
        rows = self.ledger.query("SELECT * FROM files WHERE state = 'arriving' AND command = ? ORDER BY id", command)
        fresh, refusals = self._without_duplicates(rows)
        reports: list[tuple[Row, IntakeReport]] = []
        for row in fresh:
            report = self._check(row)
            if isinstance(report, Refusal):
                refusals.append((row, report))
            else:
                reports.append((row, report))
        if refusals:
            self._refuse(rows, refusals)
            self._forget_tokens([row for row, _ in reports])
            raise _rejected([refusal for _, refusal in refusals], len(rows))
        with self.ledger.transaction():
            for row in rows:
                if row not in fresh:
                    self._drop(row, "already in the stream")
            for row, report in reports:
                self._accept(row, report)
        return [self.ledger.file(row["id"]) for row in fresh]

    def _without_duplicates(self, rows: list[Row]) -> tuple[list[Row], list[tuple[Row, Refusal]]]:
        """Sort out content the stream has. Where it still owes some of the same command, that command goes on."""
        held = {row["id"]: self.ledger.holding(row["sha256"]) for row in rows}
        goes_on = any(other and other["state"] != "done" for other in held.values())
        fresh: list[Row] = []
        refusals: list[tuple[Row, Refusal]] = []
        for row in rows:
            twin = held[row["id"]] or next((other for other in fresh if other["sha256"] == row["sha256"]), None)
            if twin is None or row["again"]:
                fresh.append(row)
            elif twin in fresh or not goes_on:
                refusals.append((row, _duplicate(row, twin)))
        return fresh, refusals

    def _check(self, row: Row) -> IntakeReport | Refusal:
        row_tokenizer, _ = self._row_tokenizer()
        target = self._tokens(row)
        if target.exists():
            shutil.rmtree(target)
        report = tokenize_file(self.layout.root / row["copy"], target, row["sha256"], row_tokenizer, stop=self.stop)
        if report.ok:
            return report
        problems = [_problem(problem.line, problem.reason, problem.remedy) for problem in report.problems]
        return Refusal(row["name"], problems, report.problem_count, report.unit)

    def _tokens(self, row: Row) -> Path:
        row_tokenizer, tokenizer_digest = self._row_tokenizer()
        key = cache_key(row["sha256"], tokenizer_digest, row_tokenizer.max_length, row_tokenizer.over_length)
        return self.layout.tokens / key

    def _forget_tokens(self, rows: list[Row]) -> None:
        """Remove the tokens of files that did not enter the stream, unless a file of the stream has that content."""
        for row in rows:
            if self.ledger.holding(row["sha256"]) is None:
                shutil.rmtree(self._tokens(row), ignore_errors=True)

    def _accept(self, row: Row, report: IntakeReport) -> None:
        self.ledger.move_file(
            row["id"], "queued", rows=report.rows, tokens=report.tokens, target_tokens=report.target_tokens,
            truncated=report.truncated, dropped=report.dropped,
        )  # fmt: skip
        notes = [f"{count} {word}" for count, word in ((report.truncated, "cut"), (report.dropped, "dropped")) if count]
        detail = f" ({', '.join(notes)} for length)" if notes else ""
        self.ledger.add_event("info", f"{row['name']} accepted: {report.rows} rows{detail}")

    def _refuse(self, rows: list[Row], refusals: list[tuple[Row, Refusal]]) -> None:
        """Move the refused files to `rejected/` with their reports, and let go of the others of the command."""
        reasons = {row["id"]: refusal for row, refusal in refusals}
        for row in rows:
            refusal = reasons.get(row["id"])
            copy = self.layout.root / row["copy"]
            if refusal and copy.exists():
                self._keep_refused(copy, refusal, move=True)
            self._drop(
                row, "; ".join(refusal.lines()[:3]) if refusal else "another file of the same command was refused"
            )
            if refusal:
                self.ledger.add_event("warning", f"{row['name']} rejected: {refusal.lines()[0]}")

    def _withdraw(self, command: str) -> None:
        for row in self.ledger.files("arriving"):
            if row["command"] == command:
                self._drop(row, "the command was refused")

    def _drop(self, row: Row, note: str) -> None:
        self.ledger.move_file(row["id"], "rejected", note=note)
        (self.layout.root / row["copy"]).unlink(missing_ok=True)

    def _keep_refused(self, path: Path, refusal: Refusal, *, move: bool = False) -> None:
        self.layout.rejected.mkdir(exist_ok=True)
        target = self.layout.rejected / refusal.name
        if target.exists() and path.is_file() and not filecmp.cmp(path, target, shallow=False):
            target = unused_name(self.layout.rejected, refusal.name)
        if move:
            path.replace(target)
        elif path.is_file() and os.access(path, os.R_OK):
            shutil.copyfile(path, target)
        report = {"file": refusal.name, "problem_count": refusal.problem_count, "unit": refusal.unit}
        report |= {"rejected": self.ledger.clock(), "problems": refusal.problems}
        replace_json(target.with_name(f"{target.name}.report.json"), report)


def plain_name(name: str) -> str:
    """Return a file's name without what a terminal, a report or a longer name beside it would stumble over."""
    plain = "".join(character if character.isprintable() else "_" for character in name)
    if plain.startswith(TEMPORARY_PREFIX):
        plain = f"_{plain[1:]}"
    head, ending = plain[:-NAME_ENDING], plain[-NAME_ENDING:]
    while len(head.encode()) > NAME_BYTES:
        head = head[:-1]
    return head + ending


def unused_name(folder: Path, name: str) -> Path:
    """Return a path in `folder` that no file has yet: `name`, or `name` with a number before its endings."""
    stem, dot, endings = name.partition(".")
    number = 1
    path = folder / name
    while path.exists() or path.with_name(f"{TEMPORARY_PREFIX}{path.name}").exists():
        number += 1
        path = folder / f"{stem}-{number}{dot}{endings}"
    return path


def _copy_and_hash(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _refusal(name: str, error: FileError) -> Refusal:
    return Refusal(plain_name(name), [_problem(error.line, error.reason, error.remedy)], 1)


def _problem(line: int | None, reason: str, remedy: str) -> dict[str, Any]:
    """A problem as one line of plain text each: what a row holds must not steer a terminal or break a report."""
    return {"line": line, "reason": _one_line(reason), "remedy": _one_line(remedy)}


def _one_line(text: str) -> str:
    shown = text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _duplicate(row: Row, twin: Row) -> Refusal:
    place = f"file {twin['position']} of the stream" if twin["position"] else "a file of the stream or this command"
    reason = f"its content is that of {place} ({twin['name']}, {twin['state']})"
    return Refusal(row["name"], [_problem(None, reason, "to train it once more: --again")], 1)


def _rejected(refusals: list[Refusal], given: int) -> FileRejected:
    lines = [line for refusal in refusals for line in refusal.lines()]
    what = f"{len(refusals)} of {given} files rejected, none added:\n" + "\n".join(f"  {line}" for line in lines)
    return FileRejected(
        what, where=refusals[0].name, hint="Reports are in rejected/. Mend the rows and add the file again."
    )
