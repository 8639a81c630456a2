"""Intake: files that arrived are checked row by row, and each enters the stream whole or not at all.

What was handed over survives a kill: a file arrives durably before anything slow begins, and is settled later. The
files of one command are accepted or refused together, so that a refused one never changes the order of the others; each
file of the inbox is on its own.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from onward.atomic import remove_temporaries
from onward.config.text import read_config
from onward.data.files.faults import FileError
from onward.data.report import IntakeReport
from onward.data.tokenized import TokenizedWriter
from onward.errors import FileRejected, OnwardError
from onward.layout import RunLayout, entries
from onward.service.intake.arrivals import TOGETHER, Arrivals, Values
from onward.service.intake.budget import Budget, BudgetSpent, Spending
from onward.service.intake.file_check import FileCheck, Withdrawn
from onward.service.intake.folders import require_file
from onward.service.intake.hub import Hub
from onward.service.intake.inbox import PRIORITIES
from onward.service.intake.lock import IntakeLock
from onward.service.intake.reading import look
from onward.service.intake.refusals import Refusal, keep_refused, rejection
from onward.service.intake.rules import RowRules, RulesOfRun
from onward.service.intake.settling import Settling
from onward.store.ledger import Ledger
from onward.store.rows import FileRow, IntentRow


class Intake:
    """Takes files into the stream of one run.

    Args:
        stop: called while files are read; raises to end early; what arrived then waits for the next start.
        rules: the rules that rows must obey; by default those of the run's config and base model.
        begun: called with a file once its attempt is counted, before it is opened.
    """

    def __init__(
        self,
        layout: RunLayout,
        ledger: Ledger,
        *,
        stop: Callable[[], None] = lambda: None,
        rules: Callable[[], RowRules] | None = None,
        begun: Callable[[FileRow], None] = lambda _: None,
    ) -> None:
        self.layout = layout
        self.ledger = ledger
        self.stop = stop
        self._lock = IntakeLock(layout)
        self._hub = Hub()
        self._arrivals = Arrivals(layout, ledger)
        self._check = FileCheck(
            layout, ledger, rules or RulesOfRun(layout, ledger, lambda: read_config(layout.config)), begun
        )
        self._settling = Settling(layout, ledger, self._check)
        self._is_clean = False

    # commands

    def take(
        self, paths: Sequence[Path], *, again: bool = False, priority: str = "normal", intent: int | None = None
    ) -> list[FileRow]:
        """Take in files in order.

        Files that are still waiting are not an error: the same command may be repeated after a kill.

        Args:
            again: accept content that the stream already has.
            intent: the command as the ledger recorded it; it ends when the files are recorded or refused.

        Returns:
            The ledger's rows of the files that were accepted now.

        Raises:
            FileRejected: at least one of `paths` was refused; none of them entered the stream.
        """
        paths = self._fetched(paths, intent)
        with self._owned():
            command = self._arrive(paths, again, PRIORITIES[priority], intent)
            try:
                return self._settle_at_last(command)
            except OnwardError:  # a refused command takes nothing in; the next process finishes a killed one
                self._settling.withdraw(command)
                raise

    def finish_left_over(self, intent: int | None) -> list[FileRejected]:
        """Finish what an interrupted process took in or was about to; return the refusals that it cannot report.

        Args:
            intent: the intent of the caller's own command, which is left alone.
        """
        refused = self.take_intents(intent)
        with self._owned():
            while row := self.ledger.next_arriving():
                try:
                    self._settle_at_last(row.command)
                except FileRejected as error:
                    refused.append(error)
        return refused

    def take_intents(self, intent: int | None = None) -> list[FileRejected]:
        """Let the files of commands arrive that ended before they had read them; return what was refused.

        Only the process that owns the run may do this, because then no other command can be running.
        """
        refused: list[FileRejected] = []
        left = [one for one in self.ledger.intents() if intent is None or one.id < intent]
        for one in left:
            try:
                self._arrive_left(one)
            except FileRejected as error:
                refused.append(error)
        return refused

    def withdraw(self, row: FileRow, reason: str) -> str:
        """Take a file that arrived but was not accepted yet out of the stream, even while a process checks it.

        It is moved to `rejected/`; a process that is reading it notices shortly and drops it.

        Returns:
            What was done, in words.

        Raises:
            OnwardError: the file is no longer arriving.
        """
        refusal = Refusal.of_training(row.name, reason, "to train it after all, add it again")
        if row.is_announced:  # first, since after a kill or on a full disk it would be seen in the inbox again
            self._settling.put_aside(row, refusal)
        with self.ledger.transaction():
            if self.ledger.file(row.id).state != "arriving":
                raise OnwardError(f"{row.name} is no longer arriving", where=f"file id {row.id}")
            self.ledger.move_file(row.id, "skipped", note=reason)
        if (read := self.ledger.file(row.id)).copy:
            self._settling.put_aside(read, refusal)
        self.ledger.add_event("warning", f"skipped {row.name}: {reason}")
        return f"skipped {row.name}"

    # the inbox

    def announce(self, found: Sequence[tuple[Path, int]]) -> int:
        """Give settled files of the inbox, with their priorities, places in the queue; return how many are new."""
        return self._arrivals.announce(found, uuid.uuid4().hex)

    def bring_in(
        self, budget: Budget | None = None, leaves: Callable[[FileRow], bool] = lambda _: False
    ) -> list[FileRow]:
        """Read announced files and move them into the archive, within the budget.

        Nothing happens while another process takes files in.

        Args:
            leaves: returns whether a file is left to a process of its own.
        """
        rows = [row for row in self.ledger.announced() if not leaves(row)][:TOGETHER]
        if not rows:
            return []
        with self._owned(wait=False) as mine:
            return self._arrivals.bring_in(rows, Spending(self.stop, budget)) if mine else []

    def check_ahead(
        self, *, seconds: float, budget: Budget | None, leaves: Callable[[FileRow], bool]
    ) -> FileRow | None:
        """Check arrived files in the order of the queue; return a file that has to be left to a process of its own.

        Checking continues while a file that would be trained before the head of the queue is unchecked. Nothing happens
        while another process takes files in.

        Args:
            seconds: the time after which no further file is begun, once the head of the queue is known.
            budget: the most that may be done, whatever is unchecked.
            leaves: returns whether a file is left to a process of its own.
        """
        ends = time.monotonic() + seconds
        spending = Spending(self.stop, budget)
        with self._owned(wait=False) as mine:
            while mine and (row := self.ledger.next_arriving()):
                if leaves(row):
                    return row
                if time.monotonic() > ends and (budget is not None or not self.outranks_queue()):
                    return None
                try:
                    spending.spend_bytes(row.bytes)
                    self._settle(row.command, spending)
                except BudgetSpent:
                    return row
                except MemoryError:  # this process may have little left; another one may have enough
                    if budget is None:
                        raise
                    return row
                except FileRejected:  # reported in `rejected/` and as an event
                    continue
        return None

    def check_next(self) -> bool:
        """Read and check the first of the files that arrived, however long it takes; return False if there is none.

        The intake lock is held for this file only.
        """
        with self._owned():
            row = self.ledger.next_arriving()
            if row is None:
                return False
            with contextlib.suppress(FileRejected):
                self._settle(row.command, Spending(self.stop))
            return True

    def outranks_queue(self) -> bool:
        """Whether the next file to be checked comes before those that are queued, by priority and arrival."""
        row, head = self.ledger.next_arriving(), self.ledger.next_owed()
        if row is None or head is None:
            return row is not None
        is_free = head.state == "queued" and head.position is None
        return is_free and (-row.priority, row.id) < (-head.priority, head.id)

    # both

    @contextlib.contextmanager
    def _owned(self, *, wait: bool = True) -> Generator[bool]:
        """Hold the intake lock, and the first time finish what a killed process left; yield False if others hold it."""
        with self._lock.held(self.stop, wait=wait) as mine:
            if mine:
                self.layout.make_own()
            if mine and not self._is_clean:
                self._arrivals.clean()
                remove_temporaries(entries(self.layout.tokens), TokenizedWriter.left)
                self._is_clean = True
            yield mine

    def _fetched(self, paths: Sequence[Path], intent: int | None) -> list[Path]:
        """Return the paths of files, with data sets of the Hub downloaded; the intake lock is not held meanwhile."""
        try:
            return self._hub.files(paths, self.stop)
        except OnwardError:
            if intent is not None:
                self.ledger.end_intent(intent)  # the user is told
            raise

    def _arrive(self, paths: Sequence[Path], again: bool, priority: int, intent: int | None) -> str:
        """Copy files into the archive under names of their own and durably record them; return their command."""
        command = uuid.uuid4().hex
        try:
            for path in paths:
                require_file(path)
            arrived = self._copy(paths)
        except (OnwardError, OSError):
            if intent is not None:
                self.ledger.end_intent(intent)  # the user is told
            raise
        common = {"command": command, "again": int(again), "priority": priority}
        self._arrivals.record([{**values, **common} for values in arrived], intent)
        return command

    def _copy(self, paths: Sequence[Path]) -> list[Values]:
        """Copy all files or none."""
        arrived: list[tuple[Path, Values]] = []
        refusals: list[Refusal] = []
        try:
            for path in paths:
                try:
                    arrived.append(self._arrivals.copy(path, Spending(self.stop)))
                except FileError as error:
                    refusals.append(Refusal.of_file(path.name, error))
                    keep_refused(self.layout, path, refusals[-1], self.ledger.clock())
            if refusals:
                raise rejection(refusals, len(paths))
        except BaseException:
            for temporary, _ in arrived:
                temporary.unlink(missing_ok=True)
            raise
        return [values for _, values in arrived]

    def _arrive_left(self, intent: IntentRow) -> None:
        paths = [Path(name) for name in json.loads(intent.paths)]
        try:
            paths = self._fetched(paths, intent.id)
            with self._owned():
                self._arrive(paths, bool(intent.again), intent.priority, intent.id)
        except FileRejected as error:
            self.ledger.add_event("warning", f"from an earlier command: {error.what}", kind="rejected")
            raise
        except OnwardError as error:
            self.ledger.add_event("warning", f"from an earlier command: {error.what} [{error.where}]", kind="rejected")
            raise FileRejected(error.what, where=error.where, hint=error.hint) from None

    def _settle(self, command: str, spending: Spending) -> list[FileRow]:
        """Accept everything that arrived with a command, or refuse it all; return the accepted files."""
        rows = self._arrived(command, spending)
        fresh, refusals = self._settling.without_duplicates(rows)
        reports: list[tuple[FileRow, IntakeReport]] = []
        for row, outcome in self._checked(fresh, spending):
            if isinstance(outcome, Refusal):
                refusals.append((row, outcome))
            else:
                reports.append((row, outcome))
        if refusals:
            self._settling.refuse(rows, refusals)
            for row, _ in reports:
                self._check.forget_tokens(row)
            raise rejection([refusal for _, refusal in refusals], len(rows))
        return self._settling.accept(rows, reports)

    def _arrived(self, command: str, spending: Spending) -> list[FileRow]:
        """Return the files of a command, all of them in the archive by now."""
        rows = self.ledger.arriving(command)
        announced = [row for row in rows if row.is_announced]
        if announced:
            self._arrivals.bring_in(announced, spending)
        elif any(look(self.layout.kept(row.copy)) is None for row in rows):
            self._arrivals.complete(rows)
        rows = self.ledger.arriving(command)
        if any(row.is_announced for row in rows):
            raise BudgetSpent
        return rows

    def _checked(self, rows: Sequence[FileRow], spending: Spending) -> Iterator[tuple[FileRow, IntakeReport | Refusal]]:
        """Check the rows of files; one that is withdrawn meanwhile is left out."""
        for row in rows:
            try:
                outcome = self._check.check(row, spending)
            except Withdrawn:
                continue
            if len(rows) > 1:  # that it was checked must be remembered if another file of the command ends the process
                self.ledger.count_attempt(row.id, -1)
            yield row, outcome

    def _settle_at_last(self, command: str) -> list[FileRow]:
        """Settle a command in this process, whatever memory it takes; attempts bound how often that is tried."""
        while True:
            try:
                return self._settle(command, Spending(self.stop))
            except MemoryError:
                continue
