"""A run opened by a process: its heavy parts when first needed, what goes on beside the work, how it ended."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from onward.config import read_config
from onward.errors import FileRejected, OnwardError, UsageError
from onward.events import Observe
from onward.layout import RunLayout
from onward.service.outside.reporting import Reporter
from onward.service.owner.background import Background, Job
from onward.service.owner.control import POLL_SECONDS, Control
from onward.service.owner.heartbeat import SECONDS as BEAT_SECONDS
from onward.service.owner.heartbeat import Heartbeat
from onward.service.stop import Stopped, StopRequest
from onward.startup import large_imports
from onward.store.ledger import Ledger
from onward.training.base import BaseDigest, find_here

if TYPE_CHECKING:
    from onward.service.intake.checking import Intake
    from onward.service.owner.daemon import Daemon
    from onward.service.session import Session


class OpenedRun:
    """A run in a process that works on it; tokenizer, base model's hash and torch load when first needed."""

    def __init__(self, layout: RunLayout, ledger: Ledger, report: Callable[[str], None]) -> None:
        self.layout = layout
        self.ledger = ledger
        self.report = report
        self._session: Session | None = None
        self._begun: BaseDigest | None = None

    @property
    def session(self) -> Session:
        """The session, opened now if it is not."""
        return self.open(again=False)

    def open(self, again: bool) -> Session:
        """Open the run; with `again` also if it is open: config or model may have been mended."""
        if again or self._session is None:
            with large_imports():
                self._hash_base()
                from onward.service.session import open_session

            begun, self._begun = self._begun, None
            self._session = open_session(self.layout, self.ledger, report=self.report, begun=begun)
        return self._session

    def _hash_base(self) -> None:
        """Begin to hash the base model beside the large imports; later there is nothing to hide behind."""
        if "torch" in sys.modules or self._begun is not None:
            return
        folder = find_here(read_config(self.layout.config).model)
        if folder is not None:
            self._begun = BaseDigest(folder)

    def intake(self, stop: Callable[[], None] = lambda: None) -> Intake:
        """Make what checks files; `stop` is called at every row and may raise `Stopped`."""
        from onward.service.intake.checking import Intake

        return Intake(self.layout, self.ledger, stop=stop)

    def _start_checker(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "onward", "check", "--run", str(self.layout.root)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @contextlib.contextmanager
    def operate(self, stop: StopRequest, observe: Observe, *, watch: bool = False) -> Generator[Daemon]:
        """Make the daemon with all that goes on beside it: requests, heartbeat, log and notifications."""
        config = read_config(self.layout.config)
        control, heartbeat = Control(self.layout, stop), Heartbeat(self.layout.ledger)
        reporter = Reporter(self.layout, config.notify)
        vital: list[Job] = [(POLL_SECONDS, control.poll), (BEAT_SECONDS, heartbeat.beat)]
        with Background([(1.0, reporter.report)]), Background(vital):  # they listen while the heavy parts load
            with stop.interruptible():
                with large_imports():
                    self._hash_base()
                    from onward.service.intake.inbox import Inbox
                    from onward.service.owner.daemon import Daemon

                if watch:
                    with contextlib.suppress(sqlite3.OperationalError):  # a full disk is waited for
                        _ = self.session  # what is wrong with config or model is said at once
            inbox = Inbox(self.layout.inbox, config.settle_seconds) if watch else None
            daemon = Daemon(
                self.ledger, config, self.open, self.intake(control.check), control, heartbeat,
                root=self.layout.root, inbox=inbox, patient=watch, observe=observe, start_checker=self._start_checker,
            )  # fmt: skip
            if not watch:
                daemon.begin()
            yield daemon
        control.close()
        reporter.close()


@contextlib.contextmanager
def account(ledger: Ledger) -> Generator[None]:
    """Leave in the ledger how the process ended."""
    try:
        yield
    except Stopped:
        _note(ledger, state="stopped")
    except (FileRejected, UsageError) as error:  # the command was refused; the run is as it was
        _note(ledger, ("warning", error.what), state="stopped" if ledger.next_owed() else "idle")
        raise
    except OnwardError as error:
        _note(ledger, ("error", error.what), state="failed", problem=error.what)
        raise
    except BaseException:
        _note(ledger, state="stopped")
        raise
    else:
        _note(ledger, state="stopped" if ledger.next_owed() else "idle")


def _note(ledger: Ledger, event: tuple[str, str] | None = None, **facts: Any) -> None:
    with contextlib.suppress(sqlite3.OperationalError), ledger.transaction():  # the disk may be full
        ledger.put(**facts)
        if event is not None:
            ledger.add_event(*event)
