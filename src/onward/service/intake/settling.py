"""Settles files that were checked: the files of a command are accepted together or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from onward.data.report import IntakeReport
from onward.layout import RunLayout
from onward.service.intake.file_check import FileCheck
from onward.service.intake.reading import look
from onward.service.intake.refusals import Refusal, keep_refused
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.text import how_many


class Settling:
    """Moves files that arrived into the queue or out of it. The caller holds the intake lock."""

    def __init__(self, layout: RunLayout, ledger: Ledger, check: FileCheck) -> None:
        self.layout = layout
        self.ledger = ledger
        self._check = check

    def without_duplicates(self, rows: Sequence[FileRow]) -> tuple[list[FileRow], list[tuple[FileRow, Refusal]]]:
        """Set aside files whose content the stream has.

        A command that is repeated after a kill continues without them: it names them as before.
        """
        held = {row.id: self.ledger.holding(row.sha256) for row in rows}
        goes_on = any(other and other.state != "done" for other in held.values())
        first: dict[str, FileRow] = {}
        fresh: list[FileRow] = []
        refusals: list[tuple[FileRow, Refusal]] = []
        for row in rows:
            in_stream = held[row.id]
            twin = in_stream or first.get(row.sha256)
            if twin is None or row.again:
                fresh.append(row)
                first.setdefault(row.sha256, row)
            elif in_stream is None or not goes_on or row.inbox or twin.name != row.name:
                refusals.append((row, Refusal.of_duplicate(row, twin)))
        return fresh, refusals

    def accept(self, rows: Sequence[FileRow], reports: Sequence[tuple[FileRow, IntakeReport]]) -> list[FileRow]:
        """Queue the files that have a report, in one transaction; the stream already has the content of the others.

        A file that was skipped while it was checked stays out.
        """
        checked = {row.id for row, _ in reports}
        accepted: list[FileRow] = []
        dropped: list[FileRow] = []
        skipped: list[FileRow] = []
        with self.ledger.transaction():
            for row in rows:
                note = "already in the stream"
                if row.id not in checked and self.ledger.change_arriving(row.id, state="rejected", note=note):
                    dropped.append(row)
            for row, report in reports:
                if self._is_arriving(row):
                    self._queue(row, report)
                    accepted.append(row)
                else:
                    skipped.append(row)
        for row in dropped:
            self._remove_copy(row)
        for row in skipped:
            self._check.forget_tokens(row)
        return [self.ledger.file(row.id) for row in accepted]

    def refuse(self, rows: Sequence[FileRow], refusals: Sequence[tuple[FileRow, Refusal]]) -> None:
        """Move the refused files to `rejected/` with their reports, and drop the other files of the command."""
        reasons = {row.id: refusal for row, refusal in refusals}
        for row in rows:
            if not self._is_arriving(row):
                continue
            refusal = reasons.get(row.id)
            copy = self.layout.kept(row.copy)
            if refusal and look(copy) is not None:
                keep_refused(self.layout, copy, refusal, self.ledger.clock(), move=True)
            note = "; ".join(refusal.lines()[:3]) if refusal else "another file of the same command was refused"
            with self.ledger.transaction():
                was_arriving = self.ledger.change_arriving(row.id, state="rejected", note=note)
                if was_arriving and refusal:
                    self.ledger.add_event("warning", f"rejected: {refusal.lines()[0]}", kind="rejected")
            if not refusal:
                self._remove_copy(row)

    def put_aside(self, row: FileRow, refusal: Refusal) -> None:
        """Move a file into `rejected/`, if it is still in the inbox or in the archive."""
        places = [self.layout.kept(row.copy)] if row.copy else []
        places += [self.layout.dropped(row.inbox)] if row.inbox else []
        path = next((place for place in places if look(place) is not None), None)
        if path is not None:
            keep_refused(self.layout, path, refusal, self.ledger.clock(), move=True)

    def withdraw(self, command: str) -> None:
        """Drop all files of a command that failed."""
        for row in self.ledger.arriving(command):
            if self.ledger.change_arriving(row.id, state="rejected", note="the command was refused"):
                self._remove_copy(row)

    def _queue(self, row: FileRow, report: IntakeReport) -> None:
        occurrence = self.ledger.next_occurrence(row.sha256) if row.again else 0
        self.ledger.move_file(
            row.id, "queued", rows=report.rows, tokens=report.tokens, target_tokens=report.target_tokens,
            truncated=report.truncated, dropped=report.dropped, split=report.split, lost_tokens=report.lost_tokens,
            bad_rows=report.bad_rows, attempts=0, occurrence=occurrence, note="; ".join(report.notes) or None,
        )  # fmt: skip
        words = report.lengths.words(None)
        notes = "".join(f"; {note}" for note in report.notes)
        level = "warning" if report.lost_tokens else "info"
        kind = "accepted" if report.notes else None  # notes are for the user; lengths are reported later
        self.ledger.add_event(level, f"{row.name} accepted: {how_many(report.rows, 'row')}{words}{notes}", kind=kind)
        if report.bad_rows:
            for line in Refusal.of_rows(row.name, report).lines():
                self.ledger.add_event("warning", f"left out: {line}", kind="left_out")
            count = how_many(report.bad_rows, "row")
            self.ledger.add_event("warning", f"{row.name}: {count} left out (bad_rows: drop)", kind="left_out")

    def _is_arriving(self, row: FileRow) -> bool:
        return self.ledger.file(row.id).state == "arriving"

    def _remove_copy(self, row: FileRow) -> None:
        """Remove the copy of a file that the user still has; of a file of the inbox there is no other."""
        if row.inbox is None:
            self.layout.kept(row.copy).unlink(missing_ok=True)
