"""The process that checks files while another one trains: one file after another, each under the intake lock."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable

from onward.data.files.faults import described
from onward.errors import OnwardError
from onward.layout import RunLayout
from onward.service.intake.checking import Intake
from onward.service.wishes import Stopped
from onward.store.ledger import Ledger

FACT = "checker"
"""The ledger's fact in which this process leaves why it ended early."""


def check_arrived(layout: RunLayout, ledger: Ledger, stop: Callable[[], None]) -> None:
    """Read and check files until none is left, a stop is asked for, or the process that started this one is gone.

    Raises:
        OnwardError, OSError, sqlite3.Error, MemoryError: checking cannot continue now; the ledger says why.
    """
    parent = os.getppid()

    def stop_or_orphaned() -> None:
        stop()
        if os.getppid() != parent:
            raise Stopped("the process that needed it is gone")

    intake = Intake(layout, ledger, stop=stop_or_orphaned)
    if ledger.get(FACT) is not None:
        ledger.put(**{FACT: None})
    try:
        while intake.check_next():
            stop_or_orphaned()
    except Stopped:
        return
    except Exception as error:
        with contextlib.suppress(sqlite3.Error):  # the disk may be full
            ledger.put(**{FACT: error.what if isinstance(error, OnwardError) else described(error)})
        raise
