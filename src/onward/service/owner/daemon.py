"""The daemon: takes files in, trains them, obeys wishes and survives faults, until it is stopped.

One turn takes in what is in the inbox, then trains one file. `train` drives the same loop without an inbox, to the end
of the queue, and lets a failure end it.
"""

from __future__ import annotations

import contextlib
import gc
import sqlite3
import time
from collections.abc import Callable
from functools import partial

from onward.errors import (
    DeviceLost,
    GuardRejected,
    NothingTrained,
    OnwardError,
    RankLost,
    RunLocked,
    VerificationFailed,
)
from onward.events import Committed, Event, FileDone, FileStarted, Note, Resumed, StepTaken
from onward.service.intake.archive import compress_original
from onward.service.intake.checking import Intake
from onward.service.knowledge.evaluation import owed_evaluation
from onward.service.owner import faults
from onward.service.owner.alongside.heartbeat import tell_systemd
from onward.service.owner.control import PAUSE_NOTE, Control, Work
from onward.service.owner.crashes import Crash
from onward.service.owner.disk import DiskRoom
from onward.service.owner.incoming import Incoming
from onward.service.owner.owned import Owned
from onward.service.owner.recovery import Recovery
from onward.service.owner.training.start import Start, load_start
from onward.service.owner.training.surroundings import Surroundings
from onward.service.owner.training.worker import Worker
from onward.service.session import Session
from onward.service.shown import IDLE, PAUSED
from onward.service.state.retention import Retention
from onward.service.state.settle import Settled, Settlement
from onward.service.wishes import Stopped
from onward.training.device.environment import release_freed_memory
from onward.training.device.errors import forget_frames, is_device_lost

TICK = 0.1
"""Seconds between two checks for requests while idle."""
LOOK_SECONDS = 5.0
"""Seconds between two looks at the inbox while a file is trained."""


class Daemon:
    """Works on one run that this process owns.

    Args:
        open_session: opens the run; called with True to reopen it, so that a repaired config or model is seen.
        crash: how the previous process died, if it did.
        patient: survive failures (retry, quarantine, wait); otherwise the first one is raised.
    """

    def __init__(
        self,
        owned: Owned,
        open_session: Callable[[bool], Session],
        intake: Intake,
        incoming: Incoming,
        *,
        crash: Crash | None,
        patient: bool,
    ) -> None:
        self.owned = owned
        self.ledger = owned.ledger
        self.wishes = owned.wishes
        self.control = Control(owned, intake)
        self._open_session = open_session
        self.intake = intake
        self._incoming = incoming
        self._patient = patient
        self._work = Work(leave=self._drop_worker, release=self._drop_worker, say=self._show)
        self._look = partial(self.control.obey_while_reading, self._work)
        intake.stop = self._look
        self._room = DiskRoom(owned, patient, partial(self.control.obey_at_rest, self._work))
        self._recovery = Recovery(owned, crash)
        self._worker: Worker | None = None
        self._was_dropped = False
        self._once = False
        self._has_begun = False
        self._settled: Settled | None = None

    def begin(self) -> None:
        """Account for how the previous process ended, and repair what it left; called once."""
        if self._has_begun:
            return
        if self._patient:
            self._recovery.after_death()
        if self.ledger.get("paused") is not None and not self.control.is_paused:
            if self._patient:
                self.control.begin_paused()
            else:  # the user trains now, which overrides an earlier pause
                self.ledger.put(paused=None)
        self.owned.shown.set("loading")
        self._settle()
        self._has_begun = True

    def run(self, *, once: bool = False) -> None:
        """Work until a stop is asked for; with `once`, until inbox and queue are empty or the run is paused.

        Raises:
            DamagedState, VerificationFailed: the state cannot be trusted, and a person has to decide.
            DeviceLost: the GPU was lost to this process.
            NothingTrained: with `once`, file after file failed.
            OnwardError: as above, and any failure if the daemon is not `patient`.
        """
        self._once = once
        if not self._patient:
            self.owned.news()  # earlier news is not reported again
        with self._incoming.watching():
            tell_systemd("READY=1")
            while not self.control.is_stopped:
                try:
                    self.ledger.require_own_release()
                    self.control.obey(self._work)  # even if nothing can begin
                    if self.control.is_stopped:
                        break
                    self.begin()
                    if not self._turn():
                        break
                    self._recovery.succeeded()
                except Stopped:
                    pass  # the next turn begins with the requests
                except (VerificationFailed, RunLocked, DeviceLost):
                    raise
                except Exception as error:
                    self._after_failure(error)
        tell_systemd("STOPPING=1")
        self.ledger.require_own_release()
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk must not keep it from stopping
            self.owned.tell_news()

    def _turn(self) -> bool:
        """Do the next thing; return False when there is nothing left to do."""
        self.owned.heartbeat.moved()
        self.owned.look_at_config()
        self.owned.tell_news()
        if self.control.is_over():
            return False
        if self.control.is_paused:
            return self._stay_paused()
        self._take_in()
        if not self.control.may_train():  # there was a request while files were taken in
            return True
        if self.ledger.next_owed() is not None and not (self._incoming.is_checking() and self.intake.outranks_queue()):
            self._room.wait(self._next_bytes())
            self.wishes.check()
            if self.ledger.next_owed() is not None:
                self._train_file()
            return True
        if owed_evaluation(self.ledger) is not None:
            self._train_file()
            return True
        if self._once and self._incoming.knows_all and self.ledger.next_arriving() is None:
            return False
        if not self._incoming.is_watching:
            return self.ledger.next_arriving() is not None
        self.owned.shown.set("tokenizing" if self.ledger.next_arriving() else IDLE)
        self._wait(TICK if self.ledger.next_arriving() else 5 * TICK)
        return True

    def _stay_paused(self) -> bool:
        """Wait for a moment; wishes are obeyed before the next one."""
        if self._once and self.control.began_paused:
            return False
        self.owned.shown.set(PAUSED, PAUSE_NOTE)
        self._take_in()
        self._wait(2 * TICK)
        return True

    def _take_in(self) -> None:
        """Move settled files out of the inbox and check files that arrived, for a bounded time."""
        if self.owned.shown.state == IDLE and self.ledger.next_arriving() is not None:
            self.owned.shown.set("tokenizing")
        self._incoming.take_in(all_or_none=self._once)

    def _settle(self) -> Settled:
        """Repair what the previous process left; what was lost will be trained again."""
        retention = Retention.of(self.owned.settings.current)
        settlement = Settlement(self.owned.layout, self.ledger, retention, self.wishes.check_for_end)
        settled = self._settled = settlement.settle()
        for message in settled.messages():
            self._show(message)
        if settled.damage and settled.manifest is not None:
            self._show(f"went back to step {settled.manifest.step}, which verifies; later steps are trained again")
        return settled

    # files trained

    def _train_file(self) -> None:
        """Train the next file, and those that can follow at once, until there is a request."""
        failure: faults.Failure | None = None
        at_fault: int | None = None
        try:
            if self._worker is None:
                self._worker = self._load()
            for event in self._worker.train_next():
                self._see(event)
        except (Stopped, RankLost):
            raise
        except Exception as error:
            self._drop_worker()
            if isinstance(error, GuardRejected):
                at_fault = error.file_id
            elif not (self._patient and faults.blames_file(error)):
                raise self._in_words(error) from None
            failure = faults.Failure.of(error)
            forget_frames(error)
        if failure is not None:  # the frames of its traceback are gone, and with them the model
            self.owned.look_at_config()
            row = self.ledger.next_owed() if at_fault is None else self.ledger.file(at_fault)
            config = self.owned.settings.current
            assert row is not None
            faults.handle(self.owned.layout, self.ledger, row, failure, config)

    def _load(self) -> Worker:
        self.owned.shown.set("loading")
        settled = self._settled or self._settle()
        step = settled.manifest.step if settled.manifest else 0
        self._keep(f"loading the model and the state of step {step}", step, "loading")
        session, start = self.wishes.interruptibly(lambda: self._open(settled), by_any=True)
        owned = self.owned
        around = Surroundings(
            self.wishes, owned.settings, owned.shown, owned.heartbeat, goes_on=self._goes_on, look=self._look
        )
        return Worker(session, start, around)

    def _open(self, settled: Settled) -> tuple[Session, Start]:
        session = self._open_session(self._was_dropped)
        return session, load_start(session, settled)

    def _goes_on(self) -> bool:
        """Whether the next file may begin at once: no request is open, and no file has to be looked for or checked."""
        if self.control.after_file or self.ledger.next_arriving() is not None:
            return False
        return not (self._incoming.has_changed() or self._incoming.is_due())

    def _see(self, event: Event) -> None:
        """Pass on an event, and do what has to be done between two steps."""
        self.owned.heartbeat.moved()
        self.owned.hub.tell(event)
        if isinstance(event, Resumed):
            message = f"resumed at step {event.step} from {event.checkpoint}, learning rate {event.learning_rate:g}"
            self._keep(message, event.step, "resuming")
        if isinstance(event, FileStarted | StepTaken | Committed):
            self._between_steps()
        if isinstance(event, FileDone) and self.owned.settings.current.compress_archive:
            row = self.ledger.at_position(event.position)
            if row is not None:
                with contextlib.suppress(Stopped):  # it stays as it is
                    compress_original(self.owned.layout, self.ledger, row, self.wishes.check)

    def _between_steps(self) -> None:
        self.ledger.require_own_release()
        self.owned.look_at_config()
        self.control.obey_at_once(self._work)
        self.owned.tell_news()
        if self.wishes:
            return
        if self._worker is not None:
            self._room.wait(self._worker.bytes_needed())
        if self._incoming.is_watching and self._incoming.seconds_since_scan() > LOOK_SECONDS:
            with contextlib.suppress(OSError, sqlite3.Error, OnwardError, Stopped):  # it will recur between two files
                self._incoming.take_in(between_steps=True)

    def _drop_worker(self) -> None:
        """Free model and optimizer; the next file begins from the last commit."""
        self._worker = self._settled = None
        self._was_dropped = True
        self.owned.let_go()
        gc.collect()
        release_freed_memory()

    # faults

    def _after_failure(self, error: Exception) -> None:
        """After a failure of the machine or the config, wait a while to continue from the last commit, or raise it."""
        self.ledger.require_own_release()
        self._drop_worker()
        if not self._patient or is_device_lost(error) or (self._once and isinstance(error, NothingTrained)):
            raise self._in_words(error) from None
        forget_frames(error)
        self._recovery.outlive(error, full=self._room.refused(error))

    def _in_words(self, error: Exception) -> Exception:
        """Return the error to raise for a failure; what its traceback held is freed."""
        words = faults.for_person(error, self.ledger.next_owed())
        forget_frames(error)
        return words

    def _next_bytes(self) -> int:
        if self._worker is not None:
            return 0  # the size is known once steps are taken; it asks between them
        newest = self.ledger.newest_checkpoint()
        return int(newest.bytes * 1.1) if newest else 0

    # the rest

    def _wait(self, seconds: float) -> None:
        """Wait; any request and anything new in the inbox ends the wait."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not (self.wishes.pending or self._incoming.is_due()):
            self.owned.while_waiting()
            time.sleep(TICK / 2)

    def _keep(self, message: str, step: int, kind: str) -> None:
        """Record in the ledger what belongs in the log; on a full disk, training continues without it."""
        with contextlib.suppress(sqlite3.OperationalError):
            self.ledger.add_event("info", message, step, kind=kind)

    def _show(self, message: str) -> None:
        self.owned.hub.tell(Note(message))
