"""The daemon: files in, files trained, control obeyed, faults outlived, until it is stopped.

One turn takes in what lies in the inbox, then trains one file. `train` drives the same loop without an inbox, to
the end of the queue, and lets a failure end it.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onward.config import Config
from onward.errors import DamagedState, OnwardError, RunLocked, VerificationFailed
from onward.events import Committed, Event, FileDone, FileStarted, Note, StepTaken
from onward.service.intake.archive import compress_original
from onward.service.intake.checking import Intake
from onward.service.intake.inbox import Inbox
from onward.service.owner import faults
from onward.service.owner.control import Control, pause_fact
from onward.service.owner.heartbeat import Heartbeat, tell_systemd
from onward.service.owner.incoming import Incoming
from onward.service.owner.worker import Worker
from onward.service.session import Session
from onward.service.state.retention import Retention
from onward.service.state.settle import Settled, Settlement
from onward.service.stop import Stopped
from onward.store.ledger import Ledger
from onward.training.environment import release_freed_memory

TICK = 0.1
"""Seconds between two looks at what was asked, while nothing is done."""
BESIDE_STEPS = 5.0
"""Seconds between looks at the inbox while a file is trained."""
LONGEST_PAUSE = 300.0
"""Seconds that a daemon waits at most before it tries again."""
CRASHES = 5
"""Times that the process may die in one file without a commit before the file is quarantined."""
BUSY = ("loading", "tokenizing", "training", "saving", "evaluating")

Observe = Callable[[Event], None]


class Daemon:
    """Works on one run that this process owns.

    Args:
        open_session: opens the run; called with True to open it again, so that a mended config or model is seen.
        inbox: None for a process that only empties the queue.
        patient: outlive failures (retry, quarantine, wait); else the first one is raised.
        observe: receives every event; one that raises is dropped.
        start_checker: starts a process that checks what arrived.
    """

    def __init__(
        self,
        ledger: Ledger,
        config: Config,
        open_session: Callable[[bool], Session],
        intake: Intake,
        control: Control,
        heartbeat: Heartbeat,
        *,
        root: Path,
        inbox: Inbox | None = None,
        patient: bool = True,
        observe: Observe = lambda _: None,
        start_checker: Callable[[], subprocess.Popen[bytes]],
    ) -> None:
        self.ledger = ledger
        self.config = config
        self.control = control
        self._open_session = open_session
        self._intake = intake
        self._heartbeat = heartbeat
        self._root = root
        self._incoming = Incoming(ledger, intake, inbox, control, heartbeat, start_checker)
        self._is_watching = inbox is not None
        self._patient = patient
        self._observe = observe
        self._worker: Worker | None = None
        self._was_dropped = False
        self._failures = 0
        self._once = False
        self._has_begun = False
        self._began_paused = False
        self._settled: Settled | None = None
        self._state = ""
        self._answered = 0

    def begin(self) -> None:
        """Once: account for how the process before this one ended, and mend what it left."""
        if self._has_begun:
            return
        self._after_crashes()
        if self.ledger.get("paused") is not None:
            if self._patient:
                self.control.is_paused = self._began_paused = True
            else:  # a person trains now: that says more than an earlier pause
                self.ledger.put(paused=None)
        self.ledger.put(state="loading", problem=None)
        self._settle()
        self._has_begun = True

    def run(self, *, once: bool = False) -> None:
        """Work until a stop is asked for; with `once`, until inbox and queue are empty or the run is paused.

        Raises:
            DamagedState, VerificationFailed: the state cannot be trusted; nothing goes on without a person.
            OnwardError: as above, and any failure where the daemon is not `patient`.
        """
        self._once = once
        with self._incoming.watching():
            tell_systemd("READY=1")
            while not self.control.stop:
                try:
                    self.begin()
                    if not self._turn():
                        break
                    self._failures = 0
                except Stopped:
                    continue
                except (DamagedState, VerificationFailed, RunLocked):
                    raise
                except Exception as error:
                    if not self._patient:
                        raise
                    self._outlive(error)
        tell_systemd("STOPPING=1")
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk is no reason not to stop
            self.control.answer(self.ledger, "stop", f"stopped at step {self._step()}")

    def _settle(self) -> None:
        """Mend what the process before left; what is lost is owed again."""
        self._settled = Settlement(self._intake.layout, self.ledger, Retention.of(self.config)).settle()
        for problem in self._settled.damage:
            self._show(f"damaged: {problem}")

    def _turn(self) -> bool:
        """Do the next thing; False when there is nothing left to do."""
        self._heartbeat.moved()
        if "skip" in self.control.wishes:
            self._skip()
        if "pause" in self.control.wishes or self.control.is_paused:
            return self._pause()
        self.control.answer(self.ledger, "resume", "it was not paused")
        if self.control.after_file and not self.ledger.files("training"):
            return False
        self._take_in()
        if self.ledger.next_owed() is not None and not (self._incoming.is_checking() and self._intake.outranks_queue()):
            self._wait_for_room(self._next_bytes())
            self._train_file()
            return True
        if self._once and not self._incoming.unsettled and self.ledger.next_arriving() is None:
            return False
        if not self._is_watching:
            return self.ledger.next_arriving() is not None
        self._set_state("tokenizing" if self.ledger.next_arriving() else "idle")
        self._wait(TICK if self.ledger.next_arriving() else 5 * TICK)
        return True

    def _take_in(self) -> None:
        """Move settled files out of the inbox and check arrived ones, for a bounded time."""
        if self._state in ("", "idle") and self.ledger.next_arriving() is not None:
            self._set_state("tokenizing")
        self._incoming.take_in(all_or_none=self._once)

    # files trained

    def _train_file(self) -> None:
        """Train the file that is owed, and those that follow at once, until something is asked for."""
        try:
            if self._worker is None:
                self._set_state("loading")
                with self.control.interruptible():
                    session = self._open_session(self._was_dropped)
                    self._worker = Worker(session, self.control, self._settled, goes_on=self._goes_on)
            for event in self._worker.train_next():
                self._see(event)
        except Stopped:
            raise
        except BaseException as error:
            self._drop_worker()
            if not self._patient or not faults.blames_file(error):
                raise
            self._handle_failed_file(error)
        finally:
            self._state = ""  # the worker moved it

    def _goes_on(self) -> bool:
        """Whether the next file may begin at once: nothing was asked for, no file is to be looked for or checked."""
        if self.control.after_file or self.ledger.next_arriving() is not None:
            return False
        return not (self._incoming.has_changed() or self._incoming.is_due())

    def _see(self, event: Event) -> None:
        """Show an event, and do what has to be done between two steps."""
        self._heartbeat.moved(event.seconds if isinstance(event, StepTaken) else None)
        try:
            self._observe(event)
        except Exception as error:  # an observer's failure is its own
            self._observe = lambda _: None
            with contextlib.suppress(sqlite3.Error):  # its terminal may be a file on the same full disk
                self.ledger.add_event("warning", f"the observer failed and is dropped: {error!r}")
        if self.control.after_file:
            self._acknowledge_after_file()
        if isinstance(event, FileStarted | StepTaken | Committed) and not self.control:
            if self._worker is not None:
                self._wait_for_room(self._worker.bytes_needed())
            if self._is_watching and self._incoming.seconds_since_scan() > BESIDE_STEPS:
                with contextlib.suppress(Exception):  # whatever it is, it comes again between two files
                    self._incoming.take_in(between_steps=True)
        if isinstance(event, FileDone) and self.config.compress_archive:
            row = self.ledger.at_position(event.position)
            if row is not None:
                compress_original(self._intake.layout, self.ledger, row)

    def _acknowledge_after_file(self) -> None:
        wish = self.control.wishes["stop"]
        if wish.id != self._answered:
            self._answered = wish.id
            self.ledger.acknowledge(wish.id, "stops after the file in hand")

    def _handle_failed_file(self, error: BaseException) -> None:
        row = self.ledger.next_owed()
        if row is None:
            raise error
        done = faults.handle(self._intake.layout, self.ledger, row, error)
        self._show(done)

    def _drop_worker(self) -> None:
        """Let go of model and optimizer; the next file is begun from the last commit."""
        self._worker = self._settled = None
        self._was_dropped = True
        gc.collect()
        release_freed_memory()

    # control

    def _skip(self) -> None:
        wish = self.control.wishes["skip"]
        reason = wish.argument or "skipped by an operator"
        row = next(iter(self.ledger.files("training")), None)
        if row is None:
            self.control.answer(
                self.ledger, "skip", "no file is being trained; onward skip FILE takes a waiting one out"
            )
            return
        self._drop_worker()
        answer = faults.skip(self._intake.layout, self.ledger, row, reason)
        self.control.answer(self.ledger, "skip", answer)
        self._show(answer)

    def _pause(self) -> bool:
        """Hold still until a resume or a stop; on request without the model in memory."""
        wish = self.control.wishes.get("pause")
        if wish is not None:
            release = wish.argument == "release"
            if release:
                self._drop_worker()
            with self.ledger.transaction():
                self.ledger.put(paused=pause_fact(release))
                self.control.answer(self.ledger, "pause", f"paused at step {self._step()}")
                self.ledger.add_event("warning", "paused by an operator", self._step(), kind="paused")
            self.control.is_paused = True
        if self._once and self._began_paused:
            return False
        self._set_state("paused", "paused by an operator; onward resume goes on")
        if "resume" in self.control.wishes:
            with self.ledger.transaction():
                self.ledger.put(paused=None, problem=None)
                self.control.answer(self.ledger, "resume", "goes on")
                self.ledger.add_event("info", "resumed by an operator")
            self.control.is_paused = self._began_paused = False
            return True
        if self.control.after_file:
            return False
        self._take_in()
        self._wait(2 * TICK)
        return True

    # faults

    def _wait_for_room(self, needed: int) -> None:
        """Hold still while the disk has no room for the next checkpoint and the margin; memory keeps what was done.

        A process that is not patient goes on: the write itself refuses in words.
        """
        needed += self.config.disk_margin_mb << 20
        if not self._patient or shutil.disk_usage(self._root).free >= needed:
            return
        free = shutil.disk_usage(self._root).free
        before = self.ledger.get("state")
        problem = f"the disk is too full: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed; goes on by itself"
        self.ledger.put(state="paused", problem=problem)
        self.ledger.add_event("warning", problem, kind="paused")
        while shutil.disk_usage(self._root).free < needed and not self.control:
            self._heartbeat.moved()
            self._wait(5 * TICK)
        self.ledger.put(state=before, problem=self._incoming.problem)
        self.ledger.add_event("info", "the disk has room again")
        self._state = ""

    def _next_bytes(self) -> int:
        if self._worker is not None:
            return 0  # it asks between steps, knowing the size
        newest = self.ledger.newest_checkpoint()
        return int(newest.bytes * 1.1) if newest else 0

    def _outlive(self, error: Exception) -> None:
        """Wait a while after a failure of the machine or the config, then go on from the last commit."""
        self._drop_worker()
        self._failures += 1
        full = faults.is_out_of_space(error)
        seconds = 2.0 if full else min(2.0 ** (self._failures - 1), LONGEST_PAUSE)
        what = error.what if isinstance(error, OnwardError) else f"{type(error).__name__}: {error}"
        problem = f"{what}; tried again in {seconds:.0f} s (failure {self._failures} in a row)"
        self._show(problem)
        try:
            self.ledger.put(state="paused" if full else "failed", problem=problem)
            self.ledger.add_event("error", problem, kind="failed")
        except sqlite3.Error:
            pass  # the disk is full or fails: said on the terminal, and again at the next try
        self._state = "failed"
        self._wait_out(seconds)
        try:
            self.ledger.put(problem=self._incoming.problem)
        except sqlite3.Error:
            return

    def _after_crashes(self) -> None:
        """Count how often the process died without a commit in between: wait longer each time, then give a file up."""
        state = self.ledger.get("state")
        died: dict[str, Any] = self.ledger.get("died") or {"step": None, "file": None, "count": 0}
        if state not in BUSY:
            self.ledger.put(died=None)
            return
        row = next(iter(self.ledger.files("training")), None)
        step, file_id = self._step(), row.id if row else None
        same = died["step"] == step and died["file"] == file_id
        count = died["count"] + 1 if same else 1
        self.ledger.put(died={"step": step, "file": file_id, "count": count})
        self.ledger.add_event("warning", f"the process before this one died while it was {state}, after step {step}")
        if not self._patient:
            return
        if row is not None and count >= CRASHES and state in ("training", "saving"):
            reason = f"the process died {count} times in it without getting past step {step}"
            self._show(faults.quarantine(self._intake.layout, self.ledger, row, reason))
            self.ledger.put(died=None)
        elif count >= 3:
            seconds = min(2.0 ** (count - 2), LONGEST_PAUSE)
            problem = f"the process died {count} times after step {step}; goes on in {seconds:.0f} s"
            self.ledger.put(state="failed", problem=problem)
            self._wait_out(seconds)
            self.ledger.put(problem=None)

    def _wait_out(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self.control.stop and "skip" not in self.control.wishes:
            self._heartbeat.moved()
            time.sleep(TICK)

    # the rest

    def _wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not (self.control.stop or self.control.wishes or self._incoming.is_due()):
            time.sleep(TICK / 2)

    def _step(self) -> int:
        return self.ledger.committed_step()

    def _set_state(self, state: str, problem: str | None = None) -> None:
        if state != self._state:
            self.ledger.put(state=state, problem=problem or self._incoming.problem)
            self._state = state

    def _show(self, message: str) -> None:
        self._see(Note(message))
