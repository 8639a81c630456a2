"""A run in the process that owns it: heavy parts loaded when first needed, background work, how it ended."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from onward.config import NotifyConfig
from onward.errors import DeviceLost, FileRejected, OnwardError, UsageError
from onward.events import Hub, Note, Observe
from onward.layout import RunLayout
from onward.service.outside.reporting import NewNotes, Reporter
from onward.service.owner.alongside.background import Background, Job
from onward.service.owner.alongside.heartbeat import SECONDS as BEAT_SECONDS
from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.service.owner.alongside.tracking import Tracking
from onward.service.owner.answers import Answers
from onward.service.owner.crashes import Crash, find_crash
from onward.service.owner.owned import Owned
from onward.service.settings import Settings
from onward.service.shown import FAILED, STOPPED, Shown
from onward.service.wishes import Stopped, Wishes
from onward.store.ledger import Ledger
from onward.training.model.base import BaseDigest, find_here
from onward.version import __version__

if TYPE_CHECKING:
    from onward.service.intake.checking import Intake
    from onward.service.owner.daemon import Daemon
    from onward.service.session import Session
    from onward.training.world import World

POLL_SECONDS = 0.2
"""Seconds between two polls of the requests in the ledger."""


class OpenedRun:
    """A run in a process that works on it; the tokenizer, the base model's hash and torch are loaded when first needed.

    Args:
        loading: a context in which the large libraries are imported.
        world: the processes that train; None if this is the only one.
    """

    def __init__(
        self,
        layout: RunLayout,
        ledger: Ledger,
        report: Callable[[str], None],
        *,
        loading: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        world: World | None = None,
    ) -> None:
        self.layout = layout
        self.ledger = ledger
        self.report = report
        self.loading = loading
        self.world = world
        self._settings: Settings | None = None
        self._session: Session | None = None
        self._begun: BaseDigest | None = None

    @property
    def settings(self) -> Settings:
        """The config in force, read when it is first needed.

        Raises:
            ConfigError: it is refused.
        """
        if self._settings is None:
            self._settings = Settings(self.layout.config)
        return self._settings

    @property
    def session(self) -> Session:
        """The session, opened on first use."""
        return self.open(again=False)

    def open(self, again: bool) -> Session:
        """Open the run; with `again`, even if it is open: config or model may have been repaired."""
        if again or self._session is None:
            with self.loading():
                self.hash_base()
                from onward.service.session import open_session

            begun, self._begun = self._begun, None
            config = self.settings.read()
            self._session = open_session(
                self.layout, self.ledger, report=self.report, config=config, begun=begun, world=self.world
            )
        return self._session

    def let_go(self) -> None:
        """Make the other processes that train free their models too."""
        if self.world is not None:
            from onward.training.ranks.orders import RELEASE

            self.world.tell(lambda: {"order": RELEASE})

    def require_ranks(self) -> None:
        """Check that the other processes that train are alive.

        Raises:
            RankLost: one is gone.
        """
        if self.world is not None:
            self.world.require_all()

    def hash_base(self) -> None:
        """Begin to hash the base model during the large imports, so that it costs no extra time."""
        if "torch" in sys.modules or self._begun is not None:
            return
        folder = find_here(self.settings.read().model, root=self.layout.root)
        if folder is not None:
            self._begun = BaseDigest(folder)

    def intake(self) -> Intake:
        """Make the intake, which checks files."""
        from onward.service.intake.checking import Intake
        from onward.service.intake.rules import RulesOfRun

        rules = RulesOfRun(self.layout, self.ledger, lambda: self.settings.read())
        return Intake(self.layout, self.ledger, rules=rules)

    def start_checker(self) -> subprocess.Popen[bytes]:
        """Start a process that checks files that arrived while this one trains."""
        command = [sys.executable, "-P", "-m", "onward", "check", "--run", str(self.layout.root)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_tracking(self) -> subprocess.Popen[bytes]:
        """Start a process that reports to the trackers until its standard input is closed."""
        command = [sys.executable, "-P", "-m", "onward", "track", "--follow", "--run", str(self.layout.root)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the owner, whose end it learns through the pipe
        )  # fmt: skip


@contextlib.contextmanager
def account(opened: OpenedRun, wishes: Wishes) -> Generator[Reporter]:
    """Record in ledger and log that a process began, how it ended, and who ended it; yield the reporter.

    A stop raised in the body ends it and is not an error.
    """
    reporter = Reporter(opened.layout, NotifyConfig)
    try:
        with _account(opened.ledger, wishes):
            yield reporter
    finally:
        with contextlib.suppress(Exception):  # the error being raised matters more than the last line of the log
            reporter.report()
        reporter.close()


@contextlib.contextmanager
def operate(
    opened: OpenedRun, wishes: Wishes, observe: Observe, reporter: Reporter, *, watch: bool = False
) -> Generator[Daemon]:
    """Make the daemon with everything that runs alongside: requests, heartbeat, log and notifications."""
    crash = find_crash(opened.ledger)
    owned = _own(opened, wishes, observe)
    reporter.notify = lambda: owned.settings.current.notify
    requests = Ledger(opened.layout.ledger, read_only=True, waiting=opened.ledger.waiting)
    tracking = Tracking(opened.start_tracking, lambda: bool(owned.settings.current.track))
    vital: list[Job] = [(POLL_SECONDS, lambda: wishes.poll(requests)), (BEAT_SECONDS, owned.heartbeat.beat)]
    failure: str | None = None
    try:
        with (
            _told(tracking, owned),
            Background([(1.0, reporter.report), (1.0, tracking.look)]),
            Background(vital),
        ):  # they run while the heavy parts load
            daemon = _make_daemon(opened, owned, crash, watch=watch)
            if not watch:
                daemon.begin()
            yield daemon
    except Stopped:
        raise
    except BaseException as error:
        failure = error.what if isinstance(error, OnwardError) else type(error).__name__
        raise
    finally:
        with contextlib.suppress(sqlite3.Error, OnwardError):  # the disk may be full or the ledger gone
            owned.answers.close(wishes, failure)
        requests.close()


@contextlib.contextmanager
def _told(tracking: Tracking, owned: Owned) -> Generator[None]:
    """Report the last steps to trackers when the body ends, however it ends."""
    try:
        yield
    finally:
        if not tracking.end():
            owned.hub.tell(Note("the trackers did not receive everything in time; onward track sends what is left"))


def _own(opened: OpenedRun, wishes: Wishes, observe: Observe) -> Owned:
    ledger = opened.ledger

    def warn(message: str) -> None:
        with contextlib.suppress(sqlite3.Error):  # the observer's terminal may be a file on the same full disk
            ledger.add_event("warning", message)
        with contextlib.suppress(Exception):  # it belongs to the caller, like the observer
            opened.report(message)

    return Owned(
        layout=opened.layout,
        ledger=ledger,
        settings=opened.settings,
        wishes=wishes,
        answers=Answers(ledger),
        heartbeat=Heartbeat(opened.layout.ledger),
        hub=Hub([observe], warn),
        shown=Shown(ledger),
        news=NewNotes(ledger),
        let_go=opened.let_go,
        require_ranks=opened.require_ranks,
    )


def _make_daemon(opened: OpenedRun, owned: Owned, crash: Crash | None, *, watch: bool) -> Daemon:
    """Import the large libraries, which only a stop may interrupt, and check that the run can be opened at all."""
    owned.shown.set("loading")
    wishes = owned.wishes
    wishes.interruptibly(lambda: _import_daemon(opened), by_any=False)
    with contextlib.suppress(sqlite3.OperationalError):  # a full disk is waited for, or found again
        try:
            wishes.interruptibly(lambda: _open_now(opened), by_any=True)  # before a file is taken in
        except Stopped:
            if wishes.wants_end:
                raise
    from onward.service.intake.inbox import Inbox
    from onward.service.owner.daemon import Daemon
    from onward.service.owner.incoming import Incoming

    intake = opened.intake()
    inbox = Inbox(opened.layout.inbox, owned.settings.current.settle_seconds) if watch else None
    incoming = Incoming(owned, intake, inbox, opened.start_checker)
    return Daemon(owned, opened.open, intake, incoming, crash=crash, patient=watch)


def _open_now(opened: OpenedRun) -> None:
    """Open the run now, so that anything wrong with config or model is raised at once."""
    from onward.service.owner.faults import for_person

    try:
        _ = opened.session
    except (Stopped, sqlite3.OperationalError):
        raise
    except Exception as error:
        raise for_person(error, None) from None


def _import_daemon(opened: OpenedRun) -> None:
    with opened.loading():
        opened.hash_base()
        importlib.import_module("onward.service.owner.daemon")


@contextlib.contextmanager
def _account(ledger: Ledger, wishes: Wishes) -> Generator[None]:
    shown = Shown(ledger)
    here = f"onward {__version__}, pid {os.getpid()} on {socket.gethostname()}"
    _note(ledger, "info", f"started: {here}", "started")
    try:
        yield
    except Stopped:
        _note_stop(ledger, wishes)
        shown.set(STOPPED)
    except (FileRejected, UsageError) as error:  # the command was refused; the run is as it was
        _note(ledger, "warning", error.what)
        shown.at_rest()
        raise
    except DeviceLost as error:  # the state stays, so that the next process counts this as a death in the same place
        _note(ledger, "error", error.what, "failed")
        with contextlib.suppress(sqlite3.Error):
            ledger.put(problem=error.what)
        raise
    except OnwardError as error:
        _note(ledger, "error", error.what)
        shown.set(FAILED, error.what)
        raise
    except BaseException as error:
        _note(ledger, "error", f"ended by {type(error).__name__}: {error}", "stopped")
        shown.set(STOPPED)
        raise
    else:
        if wishes.reason is not None:
            _note_stop(ledger, wishes)
        with contextlib.suppress(sqlite3.OperationalError):
            shown.at_rest()


def require_kept(ledger: Ledger, after: int) -> None:
    """Raise if the guard took a file back since an event.

    Raises:
        FileRejected: it did; the other files were trained.
    """
    taken = [event.message for event in ledger.events_after(after) if event.kind == "quarantined"]
    if taken:
        hint = "Reports are in rejected/. onward accept FILE trains a file anyway."
        raise FileRejected("\n".join(["taken back, and trained without:", *(f"  {text}" for text in taken)]), hint=hint)


def _note_stop(ledger: Ledger, wishes: Wishes) -> None:
    _note(ledger, "info", f"stopped by {wishes.reason or 'a request'} at step {ledger.committed_step()}", "stopped")


def _note(ledger: Ledger, level: str, message: str, kind: str | None = None) -> None:
    with contextlib.suppress(sqlite3.Error, OnwardError):  # the disk may be full or the ledger gone
        ledger.add_event(level, message, kind=kind)
