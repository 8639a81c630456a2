"""Obeys wishes: what operators ask for is done in order, and each wish is answered exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onward.errors import OnwardError
from onward.service.intake.checking import Intake
from onward.service.owner import faults
from onward.service.owner.owned import Owned
from onward.service.shown import PAUSED
from onward.service.wishes import AFTER_FILE, RELEASE, Stopped, Wish
from onward.store.rows import FileRow

PAUSE_NOTE = "paused by an operator; onward resume goes on"


@dataclass(frozen=True)
class Work:
    """What obeying a wish may do to the work of the process.

    Args:
        leave: drops the worker, whose file goes back to its boundary.
        release: frees the model and its memory.
        say: shows a line to the user.
    """

    leave: Callable[[], None]
    release: Callable[[], None]
    say: Callable[[str], None]


class Control:
    """Does what the wishes ask for, one after another.

    A stop stays at the head of the queue until the process ends: only then is it answered.

    Args:
        intake: withdraws files whose rows are not checked yet.
    """

    def __init__(self, owned: Owned, intake: Intake) -> None:
        self.after_file = False
        """Whether the process should end at the next boundary."""
        self.is_stopped = False
        """Whether a stop was asked for."""
        self.is_paused = False
        self.began_paused = False
        """Whether the pause was asked of an earlier process."""
        self._owned = owned
        self._ledger = owned.ledger
        self._wishes = owned.wishes
        self._answer = owned.answers.give
        self._intake = intake

    def is_over(self) -> bool:
        """Whether the process should end now."""
        return self.is_stopped or (self.after_file and not self._ledger.files("training"))

    def may_train(self) -> bool:
        """Whether a file may be begun or continued now."""
        return not (self.is_paused or self.is_over())

    def begin_paused(self) -> None:
        """Stay paused, as an earlier process was asked to be."""
        self.is_paused = self.began_paused = True

    def obey(self, work: Work) -> None:
        """Do everything that is asked for, up to a stop; `work` must be able to drop any current file."""
        self._owned.answers.write()
        while not self.is_stopped and (wish := self._wishes.head()) is not None:
            self._do(wish, work)

    def obey_at_once(self, work: Work) -> None:
        """Do what is possible without leaving the file, up to the first wish that needs that; called between steps."""
        self._owned.answers.write()
        while (wish := self._wishes.head()) is not None and self._wishes.answered_at_once(wish):
            self._do(wish, work)

    def obey_while_reading(self, work: Work) -> None:
        """Obey while files are read; called for every row.

        Raises:
            Stopped: the process should end, or leave the current file.
        """
        if self._wishes.in_hand is not None:
            self.obey_at_once(work)
            self._wishes.check()
            return
        self.obey(work)
        if self.is_stopped:
            raise Stopped(self._wishes.reason)

    def obey_at_rest(self, work: Work) -> None:
        """Obey while training waits for room on the disk.

        Raises:
            Stopped: nothing should be trained now.
        """
        self.obey_at_once(work)
        if not self.may_train():
            raise Stopped(self._wishes.reason)

    def _do(self, wish: Wish, work: Work) -> None:
        if wish.kind == "stop" and wish.argument != AFTER_FILE:
            self.is_stopped = True
            return
        self._wishes.take()
        if wish.kind == "stop":
            self._stop_after_file(wish)
        elif wish.kind == "pause":
            self._pause(wish, work)
        elif wish.kind == "resume":
            self._resume(wish)
        else:
            self._skip(wish, work)

    def _stop_after_file(self, wish: Wish) -> None:
        self.after_file = True
        self._wishes.reason = self._wishes.reason or "onward stop --after-file"
        is_begun = self._wishes.in_hand is not None or bool(self._ledger.files("training"))
        self._answer(wish, "stops after the current file" if is_begun else "stops now: no file is being trained")

    def _pause(self, wish: Wish, work: Work) -> None:
        if wish.argument == RELEASE:
            work.release()
        step = self._ledger.committed_step()

        def note() -> None:
            self._ledger.put(paused={"release": wish.argument == RELEASE})
            self._ledger.add_event("warning", f"paused by an operator at step {step}", step, kind="paused")

        self.is_paused = True
        self._owned.shown.set(PAUSED, PAUSE_NOTE)
        self._answer(wish, f"paused at step {step}", note)

    def _resume(self, wish: Wish) -> None:
        if not self.is_paused and self._ledger.get("paused") is None:  # asked before the process began, as paused
            self._answer(wish, "it was not paused")
            return

        def note() -> None:
            self._ledger.put(paused=None)
            self._ledger.add_event("info", "resumed by an operator", kind="resumed")

        self.is_paused = self.began_paused = False
        self._answer(wish, "goes on", note)

    def _skip(self, wish: Wish, work: Work) -> None:
        """Take out exactly the file that is meant, whatever state it has reached by now."""
        try:
            answer = self._take_out(wish, work)
        except Exception as error:  # from the disk or the state: handled like any other failure
            self._answer(wish, f"it could not be skipped: {faults.describe(error)}")
            raise
        self._answer(wish, answer)
        work.say(answer)

    def _take_out(self, wish: Wish, work: Work) -> str:
        reason = wish.argument or "skipped by an operator"
        row = self._meant(wish)
        if row is None and wish.file is None:
            return "no file is being trained; onward skip FILE takes out a waiting file"
        if row is None:
            return "the file vanished from the inbox before it was read; there is nothing to take out"
        if row.state == "arriving":
            try:
                return self._intake.withdraw(row, reason)
            except OnwardError:  # another process may have accepted, refused or forgotten it since
                if self._meant(wish) == row:
                    raise
                return self._take_out(wish, work)
        without = f"onward rebuild --without file:{row.position} leaves it out"
        if row.state == "done":
            return f"{row.name} is done; {without}"
        if row.state == "training":
            if self._wishes.in_hand not in (None, row.id):
                return f"{row.name} is fully trained and being committed; after that, {without}"
            work.leave()
        elif row.state != "queued":
            return f"{row.name} is already {row.state}"
        return faults.skip(self._owned.layout, self._ledger, self._ledger.file(row.id), reason)

    def _meant(self, wish: Wish) -> FileRow | None:
        if wish.file is None:
            return next(reversed(self._ledger.files("training")), None)
        return self._ledger.find(wish.file)
