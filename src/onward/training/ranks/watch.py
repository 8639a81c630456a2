"""Signs of life: every rank writes one per second; a rank that misses another's for too long reports which it was.

They go through the store by which the ranks found each other, from a thread of their own: a rank that computes, waits
for a collective or commits shows them; one that was killed or is frozen does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from onward.errors import RankLost, first_line
from onward.training.ranks.failures import Released

BEAT = 1.0
"""Seconds between two signs of life."""
MISSED = 3.0
"""Seconds without a sign after which a rank is taken to be the one whose connection broke."""
GRACE = 20.0
"""Seconds (at most the patience) that a process has to end once another rank is lost."""
STUCK = 10.0
"""How many times the patience a rank may stay away from the others while it shows signs of life."""
HINT = "What was committed is safe. onward train goes on from the last commit, on as many devices as there are."
_LOST, _RELEASED, _STOP, _SAID = "lost", "released", "stop", "said"


class Watch:
    """What one rank knows about whether the others are alive. Rank 0 watches all of them, the others watch rank 0.

    Args:
        store: the store of the group, for this watch alone.
        names: descriptions of the ranks.
        patience: seconds without a sign of life after which a rank is lost.
        clock: seconds that never jump.
    """

    def __init__(
        self, store: Any, rank: int, names: Sequence[str], patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.place = 0
        """How often this rank has met the others."""
        self.on_stop: Callable[[str], None] | None = None
        """On rank 0: called, from another thread, with who asked for a stop."""
        self.asked: Callable[[], str | None] = lambda: None
        """On other ranks: returns who asked for a stop."""
        self.on_loss: Callable[[RankLost], None] = lambda _: None
        """Called, from another thread, if a rank is lost, this one `may_hang`, and it has not ended in time."""
        self.may_hang = False
        """Whether this rank also waits for others in places where it cannot check whether they are alive."""
        self._lost_since: float | None = None
        self._store, self._rank, self._names, self._patience, self._clock = store, rank, names, patience, clock
        self._others = range(1, len(names)) if rank == 0 else range(1)
        self._seen = dict.fromkeys(self._others, (b"", clock()))
        self.misses_first = False
        """Whether rank 0 is the one that is gone, so that it cannot say so."""
        self._problem: str | None = None
        self._is_released = False
        self._has_asked = False
        self._last = clock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="onward-ranks", daemon=True)

    def start(self) -> None:
        """Give the first sign of life, and continue in a thread."""
        self._store.set(f"beat/{self._rank}", "0 0")
        self._thread.start()

    def close(self, *, released: bool) -> None:
        """End the thread; with `released`, the others are told that their work is over."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(BEAT)
        if released:
            self._try(lambda: self._store.set(_RELEASED, "1"))

    def check(self, waited: float = 0.0) -> None:
        """Check that those that this rank waits for are alive.

        Args:
            waited: seconds that it has waited for them to reach the same place; 0 if they may take any time.

        Raises:
            RankLost: one is not, or does not arrive.
            Released: rank 0 has ended.
        """
        if self._is_released:
            raise Released
        if self._problem is None and waited > STUCK * self._patience:
            behind = [rank for rank, (beat, _) in self._seen.items() if _place_of(beat) < self.place]
            self._find(f"{self._list(behind)} did not reach the point where the others waited for {waited:.0f} s")
        if self._problem is not None:
            raise self._lost(self._problem)

    def blame(self, error: BaseException) -> RankLost:
        """Return the error for a broken connection, which names the rank that is gone, if that is known.

        Raises:
            Released: rank 0 has ended, and closed its connections.
        """
        self._wait_for_gone()
        if self._is_released and self._problem is None:
            raise Released
        return self._lost(self._problem or f"the connection to another rank broke: {first_line(error)}")

    def explain(self, error: RankLost) -> RankLost:
        """Return the error that ends this rank in the words of the rank that knows why, and tell the others if this one
        does.

        A rank that fails while all compute together breaks the connections of the others only when it ends.
        """
        self._wait_for_gone()
        return self._lost(self._problem or self._find(error.what))

    def _wait_for_gone(self) -> None:
        ends = self._clock() + 3 * MISSED
        while self._clock() < ends and self._problem is None and not self._is_released:
            gone = [rank for rank, (_, seen) in self._seen.items() if self._clock() - seen > MISSED]
            if gone:
                self.misses_first = 0 in gone
                self._find(f"{self._list(gone)} is gone: it was killed or died")
            time.sleep(BEAT / 5)

    def _find(self, problem: str) -> str:
        """Keep what ends the group, tell the others, and return it."""
        self._problem = problem
        self._try(lambda: self._store.set(_LOST, problem))
        return problem

    def _lost(self, problem: str) -> RankLost:
        return RankLost(problem, where="devices", hint=HINT)

    def is_first_to_say(self) -> bool:
        """Whether no other rank has reported yet what ended the group; True for only one rank."""
        try:
            return bool(self._store.add(_SAID, 1) == 1)
        except Exception:  # the store is gone
            return True

    def look(self) -> None:
        """Give a sign of life, check those of the others, and pass on stop requests; called by the thread.

        If a rank has been lost for too long, this calls `on_loss`.
        """
        now = self._clock()
        if now - self._last > 3 * BEAT:  # this process itself was suspended: nothing is known about the others
            self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
        self._last = now
        self._store.set(f"beat/{self._rank}", f"{now} {self.place}")
        beats = self._store.multi_get([f"beat/{rank}" for rank in self._others])
        for rank, beat in zip(self._others, beats, strict=True):
            if beat != self._seen[rank][0]:
                self._seen[rank] = (beat, now)
        silent = [rank for rank, (_, seen) in self._seen.items() if now - seen > self._patience]
        if silent and self._problem is None:
            self.misses_first = 0 in silent
            self._find(f"{self._list(silent)} has shown no sign of life for {self._patience:.0f} s")
        if self._problem is None and self._store.check([_LOST]):
            self._problem = self._store.get(_LOST).decode()
        if self._rank == 0:
            self._pass_stop_on()
        else:
            self._ask_for_stop()
            self._is_released = self._is_released or self._store.check([_RELEASED])
        self._end_in_time()

    def _run(self) -> None:
        while not self._end.wait(BEAT):
            try:
                self.look()
            except Exception:
                if not self._end.is_set():
                    self._without_store()
                return

    def _end_in_time(self) -> None:
        if self._problem is None or not self.may_hang:
            return
        now = self._clock()
        self._lost_since = now if self._lost_since is None else self._lost_since
        if now - self._lost_since > min(self._patience, GRACE):
            self.on_loss(self._lost(self._problem))

    def _pass_stop_on(self) -> None:
        if self._has_asked or self.on_stop is None or not self._store.check([_STOP]):
            return
        self._has_asked = True
        self.on_stop(self._store.get(_STOP).decode())

    def _ask_for_stop(self) -> None:
        reason = None if self._has_asked else self.asked()
        if reason is not None:
            self._has_asked = True
            self._store.set(_STOP, f"{reason} to rank {self._rank}")

    def _without_store(self) -> None:
        """Handle the loss of the store, whose agent is gone: rank 0 stops as on a signal, and the others follow."""
        if self.on_stop is not None:
            self.on_stop("the end of the process that started the others")

    def _list(self, ranks: Sequence[int]) -> str:
        return ", ".join(self._names[rank] for rank in ranks) or "another rank"

    @staticmethod
    def _try(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # the store is gone, and with it the readers of this
            return


def _place_of(beat: bytes) -> int:
    return int(beat.rpartition(b" ")[2] or b"0")
