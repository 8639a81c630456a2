"""Checks one file: every row is read once, and a file that keeps ending the process is refused.

Only here is it decided whether a failure is the file's fault.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from onward.atomic import remove_tree
from onward.data.files.faults import SourceChanged, is_of_machine
from onward.data.report import IntakeReport
from onward.data.tokenize import tokenize_file
from onward.errors import NoSpace, Unreadable
from onward.layout import RunLayout
from onward.service.intake.budget import BudgetSpent, Spending, at_intervals
from onward.service.intake.refusals import Refusal
from onward.service.intake.rules import RowRules
from onward.service.wishes import Stopped
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

ATTEMPTS = 3
"""How often checking a file may end the process before the file is refused."""


class Withdrawn(Exception):
    """The file was taken out of the stream while it was checked."""


class FileCheck:
    """Checks the rows of archived files, and keeps their tokens.

    Args:
        rules: returns the tokenizer and the limits; called when the first file needs them.
        begun: called with the file once its attempt is counted, before it is opened.
    """

    def __init__(
        self,
        layout: RunLayout,
        ledger: Ledger,
        rules: Callable[[], RowRules],
        begun: Callable[[FileRow], None],
    ) -> None:
        self.layout = layout
        self.ledger = ledger
        self._rules = rules
        self._begun = begun

    def check(self, row: FileRow, spending: Spending) -> IntakeReport | Refusal:
        """Check every row of a file; the attempt is durably counted before the file is opened.

        The count stays if the process dies or memory runs out, and is taken back if the file is not to blame.

        Raises:
            Stopped, BudgetSpent, Withdrawn: the check was ended early.
            NoSpace: the disk has no room for the tokens.
            OSError, sqlite3.Error: the machine fails.
            MemoryError: there is too little memory; this counts as an attempt.
        """
        rules = self._rules()  # before the attempt: a failure here is not the file's fault
        original = self.layout.kept(row.copy)
        deaths = self.ledger.attempts_at(row)
        if deaths >= ATTEMPTS:
            self.ledger.share_attempts(row, deaths)
            return Refusal.of_deaths(row, deaths)
        self.ledger.count_attempt(row.id)
        try:
            self._begun(row)
            report = self._read(row, rules, original, spending)
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

    def _read(self, row: FileRow, rules: RowRules, original: Path, spending: Spending) -> IntakeReport:
        target = self._tokens(row, rules)
        remove_tree(target)
        look = at_intervals(lambda: self._require_arriving(row), lambda: self._require_room(row, rules))

        def stop() -> None:
            spending.spend_row()
            look()

        look()
        return tokenize_file(original, target, row.sha256, rules.tokenizer, stop=stop, reading=rules.reading)

    def _tokens(self, row: FileRow, rules: RowRules) -> Path:
        return self.layout.tokens / rules.key(row.sha256)

    def _require_arriving(self, row: FileRow) -> None:
        if self.ledger.file(row.id).state != "arriving":
            raise Withdrawn

    def _require_room(self, row: FileRow, rules: RowRules) -> None:
        """Leave the last free bytes of the disk to training: the tokens written so far are removed again."""
        free = shutil.disk_usage(self.layout.tokens).free
        if free < rules.room:
            raise NoSpace(
                f"the disk has no room for the tokens of {row.name}: {free / 1e6:.0f} MB are left",
                where=self.layout.tokens,
                hint="Make room; a daemon tries again by itself, at growing intervals.",
            )


def _is_of_file(error: BaseException, original: Path) -> bool:
    """Whether checking failed because of the file's content, not because of the machine or because it was ended early.

    If another file, of the cache or of a library, cannot be read, that says nothing about the one being checked.
    """
    if isinstance(error, Stopped | BudgetSpent | Withdrawn | NoSpace | Unreadable | sqlite3.Error):
        return False
    if is_of_machine(error) or (isinstance(error, OSError) and error.filename not in (None, str(original), original)):
        return False
    return isinstance(error, Exception)
