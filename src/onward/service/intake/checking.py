"""Intake: what arrived is checked row by row, and every file enters the stream whole or not at all.

What was handed over survives a kill: a file arrives, durably, before anything slow begins, and is settled later.
The files of one command stand or fall together, so that a refused one never changes the order of the others; each
file of the inbox stands for itself.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from onward.atomic import remove_temporaries
from onward.data.containers import FileError
from onward.data.tokenize import IntakeReport, RowTokenizer, SourceChanged, cache_key, tokenize_file
from onward.errors import FileRejected, OnwardError, UsageError
from onward.layout import RunLayout
from onward.service.intake.arrivals import Arrivals, Values
from onward.service.intake.inbox import PRIORITIES
from onward.service.intake.refusals import Refusal, keep_refused, rejection
from onward.store.ledger import Ledger
from onward.store.rows import FileRow


class Intake:
    """Takes files into the stream of one run.

    Args:
        row_tokenizer: makes the tokenizer of rows when the first file needs it; loading one is slow.
        stop: polled while files are read; raises to end early, and what arrived stays for the next start.
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
        self._arrivals = Arrivals(layout, ledger, stop)
        self._is_clean = False

    def take(self, paths: Sequence[Path], *, again: bool = False, priority: str = "normal") -> list[FileRow]:
        """Take in files in order, after whatever an earlier process left unfinished.

        Files that the stream still owes are not an error: the same command may be given again after a kill.

        Args:
            again: accept content that the stream already has.

        Returns:
            The ledger's rows of the files that were accepted now.

        Raises:
            FileRejected: at least one of `paths` was refused; none of them entered the stream.
        """
        with self._owned():
            for path in paths:
                self._require_readable(path)
            command = uuid.uuid4().hex
            self._arrive(paths, command, again, PRIORITIES[priority])
            try:
                return self._settle(command)
            except OnwardError:  # a refused command takes nothing in; a killed one is finished by the next process
                self._withdraw(command)
                raise

    def take_inbox(self, found: Sequence[tuple[Path, int]]) -> int:
        """Take settled files of the inbox, given with their priority; returns how many arrived.

        Their rows are checked by `check_ahead`. While another process takes files in, nothing happens.
        """
        with self._owned(patience=0) as mine:
            return len(self._arrivals.move_in(found, uuid.uuid4().hex)) if mine else 0

    def check_ahead(self, *, seconds: float, largest: float = float("inf")) -> bool:
        """Check arrived files in the order of the queue; returns whether some are left to check.

        Checking goes on while a file that would be trained before the head of the queue is unchecked.

        Args:
            seconds: time after which no further file is begun, once the head of the queue is known.
            largest: bytes of a file above which checking waits.
        """
        ends = time.monotonic() + seconds
        with self._owned(patience=0) as mine:
            while mine and (row := self.ledger.next_arriving()):
                if row.bytes > largest or (time.monotonic() > ends and not self.outranks_queue()):
                    return True
                with contextlib.suppress(FileRejected):  # reported by `_refuse`
                    self._settle(row.command)
            return not mine

    def outranks_queue(self) -> bool:
        """Whether the next file to be checked would be trained before those that are queued."""
        row, head = self.ledger.next_arriving(), self.ledger.next_owed()
        if row is None or head is None:
            return row is not None
        return head.state == "queued" and head.position is None and row.priority > head.priority

    def finish_left_over(self) -> list[FileRejected]:
        """Finish what an interrupted process took in; returns the refusals that it can no longer report."""
        refused: list[FileRejected] = []
        with self._owned():
            while row := self.ledger.next_arriving():
                try:
                    self._settle(row.command)
                except FileRejected as error:
                    refused.append(error)
        return refused

    @contextlib.contextmanager
    def _owned(self, patience: float = -1) -> Generator[bool]:
        """Hold the intake lock, and once finish what a killed process left; False where others hold it."""
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            yield False
            return
        try:
            if not self._is_clean:
                self._arrivals.clean()
                remove_temporaries(self.layout.tokens)
                self._is_clean = True
            yield True
        finally:
            self._lock.release()

    @staticmethod
    def _require_readable(path: Path) -> None:
        if not path.exists():
            raise UsageError("there is no such file", where=path, hint="Check the path; nothing was added.")
        if path.is_dir():
            raise UsageError("this is a directory, not a file", where=path, hint=f"Name its files: {path}/*.jsonl")

    def _arrive(self, paths: Sequence[Path], command: str, again: bool, priority: int) -> None:
        """Copy files into the archive under names of their own and record them, durably."""
        arrived: list[tuple[Path, Values]] = []
        refusals: list[Refusal] = []
        for path in paths:
            try:
                arrived.append(self._arrivals.copy(path))
            except FileError as error:
                refusals.append(Refusal.of_file(path.name, error))
                keep_refused(self.layout, path, refusals[-1], self.ledger.clock())
        if refusals:
            for temporary, _ in arrived:
                temporary.unlink(missing_ok=True)
            raise rejection(refusals, len(paths))
        common = {"command": command, "again": int(again), "priority": priority}
        self._arrivals.record([{**values, **common} for _, values in arrived])

    def _settle(self, command: str) -> list[FileRow]:
        """Accept everything that arrived with a command, or refuse it all; returns the files accepted."""
        rows = self._arriving(command)
        if any(not (self.layout.root / row.copy).exists() for row in rows):
            self._arrivals.complete(rows)
            rows = self._arriving(command)
        fresh, refusals = self._without_duplicates(rows)
        reports: list[tuple[FileRow, IntakeReport]] = []
        for row in fresh:
            report = self._check(row)
            if isinstance(report, Refusal):
                refusals.append((row, report))
            else:
                reports.append((row, report))
        if refusals:
            self._refuse(rows, refusals)
            self._forget_tokens([row for row, _ in reports])
            raise rejection([refusal for _, refusal in refusals], len(rows))
        with self.ledger.transaction():
            for row in rows:
                if row not in fresh:
                    self._drop(row, "already in the stream")
            for row, report in reports:
                self._accept(row, report)
        return [self.ledger.file(row.id) for row in fresh]

    def _arriving(self, command: str) -> list[FileRow]:
        return self.ledger.arriving(command)

    def _without_duplicates(self, rows: list[FileRow]) -> tuple[list[FileRow], list[tuple[FileRow, Refusal]]]:
        """Sort out content the stream has. Where it still owes some of the same command, that command goes on."""
        held = {row.id: self.ledger.holding(row.sha256) for row in rows}
        goes_on = any(other and other.state != "done" for other in held.values())
        fresh: list[FileRow] = []
        refusals: list[tuple[FileRow, Refusal]] = []
        for row in rows:
            twin = held[row.id] or next((other for other in fresh if other.sha256 == row.sha256), None)
            if twin is None or row.again:
                fresh.append(row)
            elif twin in fresh or not goes_on or row.inbox:
                refusals.append((row, Refusal.of_duplicate(row, twin)))
        return fresh, refusals

    def _check(self, row: FileRow) -> IntakeReport | Refusal:
        row_tokenizer, _ = self._row_tokenizer()
        target = self._tokens(row)
        if target.exists():
            shutil.rmtree(target)
        report = tokenize_file(self.layout.root / row.copy, target, row.sha256, row_tokenizer, stop=self.stop)
        return report if report.ok else Refusal.of_rows(row.name, report)

    def _tokens(self, row: FileRow) -> Path:
        row_tokenizer, tokenizer_digest = self._row_tokenizer()
        key = cache_key(row.sha256, tokenizer_digest, row_tokenizer.max_length, row_tokenizer.over_length)
        return self.layout.tokens / key

    def _forget_tokens(self, rows: list[FileRow]) -> None:
        """Remove the tokens of files that did not enter the stream, unless a file of the stream has that content."""
        for row in rows:
            if self.ledger.holding(row.sha256) is None:
                shutil.rmtree(self._tokens(row), ignore_errors=True)

    def _accept(self, row: FileRow, report: IntakeReport) -> None:
        self.ledger.move_file(
            row.id, "queued", rows=report.rows, tokens=report.tokens, target_tokens=report.target_tokens,
            truncated=report.truncated, dropped=report.dropped,
        )  # fmt: skip
        notes = [f"{count} {word}" for count, word in ((report.truncated, "cut"), (report.dropped, "dropped")) if count]
        detail = f" ({', '.join(notes)} for length)" if notes else ""
        self.ledger.add_event("info", f"{row.name} accepted: {report.rows} rows{detail}")

    def _refuse(self, rows: list[FileRow], refusals: list[tuple[FileRow, Refusal]]) -> None:
        """Move the refused files to `rejected/` with their reports, and let go of the others of the command."""
        reasons = {row.id: refusal for row, refusal in refusals}
        for row in rows:
            refusal = reasons.get(row.id)
            copy = self.layout.root / row.copy
            if refusal and copy.exists():
                keep_refused(self.layout, copy, refusal, self.ledger.clock(), move=True)
            note = "; ".join(refusal.lines()[:3]) if refusal else "another file of the same command was refused"
            with self.ledger.transaction():
                self._drop(row, note)
                if refusal:
                    self.ledger.add_event("warning", f"{row.name} rejected: {refusal.lines()[0]}", kind="rejected")

    def _withdraw(self, command: str) -> None:
        for row in self.ledger.files("arriving"):
            if row.command == command:
                self._drop(row, "the command was refused")

    def _drop(self, row: FileRow, note: str) -> None:
        self.ledger.move_file(row.id, "rejected", note=note)
        (self.layout.root / row.copy).unlink(missing_ok=True)
