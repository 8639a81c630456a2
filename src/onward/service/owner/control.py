"""Obeying: what operators asked for is done in its order, and each wish is answered exactly once."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from onward.layout import RunLayout
from onward.service.intake.checking import Intake
from onward.service.owner import faults
from onward.service.shown import PAUSED, Shown
from onward.service.wishes import AFTER_FILE, RELEASE, Wish, Wishes
from onward.store.ledger import Ledger

PAUSE_NOTE = "paused by an operator; onward resume goes on"


@dataclass(frozen=True)
class Work:
    """What obeying does to the work of the process.

    Args:
        leave: lets go of the worker, whose file goes back to its boundary.
        release: lets go of model and memory.
        say: shows a line to a person.
    """

    leave: Callable[[], None]
    release: Callable[[], None]
    say: Callable[[str], None]


class Control:
    """Does what the wishes ask for, one after another.

    Args:
        intake: takes back files whose rows are not checked yet.
    """

    def __init__(self, layout: RunLayout, ledger: Ledger, wishes: Wishes, shown: Shown, intake: Intake) -> None:
        self.wishes = wishes
        self.after_file = False
        """Whether the process is to end at the next boundary."""
        self.is_stopped = False
        """Whether the process is to end now."""
        self.is_paused = False
        self.began_paused = False
        """Whether the pause is one that an earlier process was asked for."""
        self._layout = layout
        self._ledger = ledger
        self._shown = shown
        self._intake = intake
        self._stops: list[Wish] = []

    def begin_paused(self) -> None:
        """Stay paused, as an earlier process was asked to be."""
        self.is_paused = self.began_paused = True

    def obey(self, work: Work) -> None:
        """Do everything that is asked for, up to a stop; nothing is in hand but what `work` can let go of."""
        while not self.is_stopped and (wish := self.wishes.take()) is not None:
            self._do(wish, work)

    def obey_at_once(self, work: Work) -> None:
        """Do what needs no file to be left, up to the first wish that does; called between two steps."""
        while (wish := self.wishes.head()) is not None and self.wishes.answered_at_once(wish):
            self.wishes.take()
            self._do(wish, work)

    def finish(self) -> None:
        """Answer the stop that ends the process, and close what came after it."""
        step = self._ledger.committed_step()
        for wish in self._stops:
            self._answer(wish, f"stopped at step {step}")
        self._stops.clear()
        while (wish := self.wishes.take()) is not None:
            self._answer(wish, f"the process ended first, at step {step}")

    def _do(self, wish: Wish, work: Work) -> None:
        if wish.kind == "stop":
            self._stop(wish)
        elif wish.kind == "pause":
            self._pause(wish, work)
        elif wish.kind == "resume":
            self._resume(wish)
        else:
            self._skip(wish, work)

    def _stop(self, wish: Wish) -> None:
        if wish.argument == AFTER_FILE:
            self.after_file = True
            self._answer(wish, "stops after the file in hand")
            return
        self.is_stopped = True
        self._stops.append(wish)

    def _pause(self, wish: Wish, work: Work) -> None:
        opposite = self.wishes.cancel("resume")
        if opposite is not None:
            self._answer(wish, "not paused: a resume was asked for right after")
            self._answer(opposite, "goes on: the pause before it was not begun")
            return
        if wish.argument == RELEASE:
            work.release()
        step = self._ledger.committed_step()
        with self._ledger.transaction():
            self._ledger.put(paused={"release": wish.argument == RELEASE})
            self._answer(wish, f"paused at step {step}")
            self._ledger.add_event("warning", f"paused by an operator at step {step}", step, kind="paused")
        self.is_paused = True
        self._shown.set(PAUSED, PAUSE_NOTE)

    def _resume(self, wish: Wish) -> None:
        if not self.is_paused:
            self._answer(wish, "it was not paused")
            return
        with self._ledger.transaction():
            self._ledger.put(paused=None)
            self._answer(wish, "goes on")
            self._ledger.add_event("info", "resumed by an operator", kind="resumed")
        self.is_paused = self.began_paused = False

    def _skip(self, wish: Wish, work: Work) -> None:
        """Take out the file that is meant, wherever it stands by now, and no other."""
        reason = wish.argument or "skipped by an operator"
        training = self._ledger.files("training")
        if wish.file is not None:
            row = self._ledger.file(wish.file)
        elif training:
            row = training[-1]
        else:
            self._answer(wish, "no file is being trained; onward skip FILE takes a waiting one out")
            return
        committing = row.state == "training" and self.wishes.in_hand not in (None, row.id)
        if row.state == "done" or committing:
            self._answer(wish, f"{row.name} is done; onward rebuild --without {row.position} leaves it out")
            return
        if row.state == "training":
            work.leave()
            row = self._ledger.file(row.id)
        if row.state == "arriving":
            answer = self._intake.withdraw(row, reason)
        elif row.state in ("training", "queued"):
            answer = faults.skip(self._layout, self._ledger, row, reason)
        else:
            answer = f"{row.name} is {row.state}; there is nothing to take out"
        self._answer(wish, answer)
        work.say(answer)

    def _answer(self, wish: Wish, answer: str) -> None:
        """Acknowledge a wish; one that came by signal has nobody waiting. A full disk is no reason not to obey."""
        if wish.request is not None:
            with contextlib.suppress(sqlite3.OperationalError):
                self._ledger.acknowledge(wish.request, answer)
