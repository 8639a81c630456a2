"""Checking one file: every row is read once, and a file that keeps ending the process is given up.

This is the one place that decides whether a failure is the file's.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from onward.atomic import remove_tree
from onward.data.files.faults import is_of_machine
from onward.data.tokenize import IntakeReport, SourceChanged, tokenize_file
from onward.errors import NoSpace, Unreadable
from onward.layout import RunLayout
from onward.service.intake.guard import BudgetSpent, Guard, at_intervals
from onward.service.intake.refusals import Refusal
from onward.service.intake.rules import RowRules
from onward.service.wishes import Stopped
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

ATTEMPTS = 3
"""Times that checking a file may end the process before the file is refused."""


class Withdrawn(Exception):
    """Somebody took the file out of the stream while it was checked."""


class FileCheck:
    """Checks the rows of files that lie in the archive, and keeps their tokens.

    Args:
        rules: gives the tokenizer and the limits, when the first file needs them.
        begun: called with the file once its attempt is counted, before it is opened.
    """

    def __init__(
        self,
        layout: RunLayout,
        ledger: Ledger,
        rules: Callable[[], RowRules],
        begun: Callable[[FileRow], None] = lambda _: None,
    ) -> None:
        self.layout = layout
        self.ledger = ledger
        self._rules = rules
        self._begun = begun

    def check(self, row: FileRow, guard: Guard) -> IntakeReport | Refusal:
        """Check every row of a file; that it begins is counted, durably, before the file is opened.

        The count stands if the process dies or memory runs out, and is taken back when the file is not to blame.

        Raises:
            Stopped, BudgetSpent, Withdrawn: the check was ended early.
            NoSpace: the disk has no room for the tokens.
            OSError, sqlite3.Error: the machine fails.
            MemoryError: there is too little memory; this counts as an attempt.
        """
        rules = self._rules()  # before the attempt: what fails here is not the file's
        original = self.layout.kept(row.copy)
        deaths = self.ledger.attempts_at(row)
        if deaths >= ATTEMPTS:
            self.ledger.share_attempts(row, deaths)
            return Refusal.of_deaths(row, deaths)
        self.ledger.count_attempt(row.id)
        try:
            self._begun(row)
            report = self._read(row, rules, original, guard)
        except SourceChanged:
            return Refusal.of_change(row)
        except MemoryError:
            raise
        except BaseException as error:
            if not _is_of_file(error, original):
                self.ledger.count_attempt(row.id, -1)
                raise
            return Refusal.of_error(row, error)
        return report if report.ok else Refusal.of_rows(row.name, report)

    def forget_tokens(self, row: FileRow) -> None:
        """Remove the tokens of a file that did not enter the stream, unless the stream has that content."""
        if row.sha256 and self.ledger.holding(row.sha256) is None:
            remove_tree(self._tokens(row, self._rules()))

    def _read(self, row: FileRow, rules: RowRules, original: Path, guard: Guard) -> IntakeReport:
        target = self._tokens(row, rules)
        remove_tree(target)
        look = at_intervals(lambda: self._require_arriving(row), lambda: self._require_room(row, rules))

        def stop() -> None:
            guard()
            look()

        look()
        return tokenize_file(original, target, row.sha256, rules.tokenizer, stop=stop, reading=rules.reading)

    def _tokens(self, row: FileRow, rules: RowRules) -> Path:
        return self.layout.tokens / rules.key(row.sha256)

    def _require_arriving(self, row: FileRow) -> None:
        if self.ledger.file(row.id).state != "arriving":
            raise Withdrawn

    def _require_room(self, row: FileRow, rules: RowRules) -> None:
        """Leave the disk's last bytes to training: what was written of the tokens is removed again."""
        free = shutil.disk_usage(self.layout.tokens).free
        if free < rules.room:
            raise NoSpace(
                f"the disk has no room for the tokens of {row.name}: {free / 1e6:.0f} MB are left",
                where=self.layout.tokens,
                hint="Make room; a daemon tries again by itself, with growing pauses.",
            )


def _is_of_file(error: BaseException, original: Path) -> bool:
    """Whether checking failed for what the file holds: neither for the machine, nor because it was ended early.

    That another file, of the cache or of a library, may not be read says nothing of the one that is checked.
    """
    if isinstance(error, Stopped | BudgetSpent | Withdrawn | NoSpace | Unreadable | sqlite3.Error):
        return False
    if is_of_machine(error) or (isinstance(error, OSError) and error.filename not in (None, str(original), original)):
        return False
    return isinstance(error, Exception)
