"""The state as it was last committed: copied, written behind training, and compared where a state is handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onward.config import Config
from onward.events import FileDone
from onward.service.owner.training.handing_over import Crossing, LateHandover, keep_handover
from onward.service.owner.training.recordings import Recordings
from onward.service.owner.training.start import Start
from onward.service.session import Session
from onward.service.state.commits import Commit, Written
from onward.service.state.writer import Writer
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import SPACE_MARGIN, Facts, estimate_size
from onward.training.measuring.handover import Measurement, compare, measure
from onward.training.measuring.probe import Probe, Probed
from onward.training.state import Snapshot, StateDigest

if TYPE_CHECKING:
    from onward.service.owner.training.sharded import ShardedRun


@dataclass(frozen=True)
class Reached:
    """The place at which a state is committed.

    Args:
        file_id: the file in hand; None for the state of step 0.
        with_ledger: further changes of the ledger in the same transaction (a file is done).
        done: what to report once it is committed.
    """

    file_id: int | None
    with_ledger: Callable[[Ledger], None] = lambda _: None
    done: FileDone | None = None


class CommittedState:
    """Copies the state, commits the copy while training continues, and compares the state with it at handovers.

    One copy is written at a time: `collect` it before the next one is begun.

    Args:
        start: the state that the process began with; it is trained in place.
    """

    def __init__(self, session: Session, start: Start) -> None:
        self.newest = start.manifest
        self.log = start.log
        self._session, self._ledger = session, session.ledger
        self._state, self._in_shards = start.state, start.in_shards
        self._writer = Writer(session.layout, session.ledger)
        self._copy: Snapshot | None = None
        self._late: LateHandover | None = None
        self._facts: Facts | None = None
        self._probe: Probe | ShardedRun | None = None
        self._probe_repeats = False

    def compute_as(self, session: Session) -> None:
        """Record and measure from now on as this session's config asks for."""
        self._session, self._facts, self._probe, self._probe_repeats = session, None, None, False

    def probe(self) -> Probe | ShardedRun:
        """Return the probe of the state, made when it is first needed."""
        if self._probe is None:
            session, config = self._session, self._session.config
            self._probe = self._in_shards or Probe(
                self._state.model, config.seed, session.device, session.dtype, exact=config.deterministic,
                writers=session.writers,
            )  # fmt: skip
        return self._probe

    def bytes_needed(self) -> int:
        """Return the free bytes that the next checkpoint needs."""
        size = estimate_size(self._state.view(), self._recorded_facts())
        return int((self._in_shards.bytes_needed(size) if self._in_shards else size) * SPACE_MARGIN)

    def begin(self, config: Config, reached: Reached, *, is_awaited: bool = False) -> None:
        """Copy the state and begin to commit the copy.

        Args:
            config: the config to record with it.
            is_awaited: whether nothing is trained until it is committed.
        """
        self._copy = self._state.snapshot(into=self._copy)
        if self.newest is None and not self._is_cut and self._copy.marks is None:  # for `LateHandover`
            self._copy = replace(self._copy, known=self._copy.digest())
        self._writer.submit(
            Commit(
                self._state.model, self._copy, config, self.probe().of_copy(self._copy), self._recorded_facts(),
                tuple(self.log), self.newest, reached.file_id, reached.with_ledger, reached.done,
                self._in_shards.commit(self._copy) if self._in_shards else None,
            ),
            is_awaited=is_awaited,
        )  # fmt: skip

    def collect(self, *, wait: bool) -> Written | None:
        """Return what a finished commit did, once; None if there is none or it is still running.

        Raises:
            OnwardError, OSError: the commit failed; nothing of it remains.
        """
        written = self._writer.collect(wait=wait)
        if written is not None:
            self.newest = written.manifest
            if self._late is not None:
                self._late.keep(self._ledger, written.manifest)
                self._late = None
        return written

    def join(self) -> None:
        """Wait until nothing is being written."""
        self._writer.join()

    def hand_over(self, kind: str, file_id: int | None, *, records: bool = False) -> str:
        """Compare the state with what was measured before the last commit, written or not; return the class that holds.

        Args:
            records: whether the probe may be recorded.

        Raises:
            VerificationFailed: they are not the same state.
            OnwardError, OSError: the commit failed.
        """
        crossing = Crossing(kind, self._state.step, file_id)
        here = self._session.environment
        self._late = self._without_probe(crossing)
        if self._late is not None:
            return self._late.name
        measured = self._writer.measured()
        if measured is not None:
            before, environment = measured.to_dict(), here
        else:
            assert self.newest is not None
            before, environment = self.newest.measured, self.newest.environment
        after = self._measured_now(measured, records=records)
        found = compare(before, after, environment, here)
        keep_handover(self._ledger, crossing, before, after, found)
        return found[0]

    @property
    def _is_cut(self) -> bool:
        return self._in_shards is not None and self._in_shards.is_cut

    def _without_probe(self, crossing: Crossing) -> LateHandover | None:
        """Return the handover of a state whose copy is being written, if a second probe would tell nothing; else None.

        That is so if nothing was trained yet, or if the probe was repeatable in this process and the state is proven,
        on its device, to be the one that was copied.
        """
        copy, here = self._copy, self._session.environment
        if copy is None or self._is_cut or not self._writer.is_writing:
            return None
        if self.newest is None and copy.known is not None:
            return LateHandover.of_first(crossing, copy, self._state, here)
        if self.newest is None or self._probe_repeats:
            return LateHandover.of_proven(crossing, copy, self._state, here)
        return None

    def _measured_now(self, known: Measurement | None, *, records: bool) -> Measurement:
        """Measure the current state; `known` was measured of its last copy.

        A second probe of one state shows whether the probe is repeatable.
        """
        if self._in_shards and self._is_cut:
            return self._in_shards.measure()
        now = self._state.view()
        if known is None:
            return measure(now, self.probe().of_model())
        before = Probed(known.probe_loss, known.probe_gradient)
        if not self._state.step:
            return measure(now, before)
        if self._copy is not None and self._state.is_proven(self._copy):
            now = replace(now, known=StateDigest(known.weights, known.moments))
        probed = self._probed_again(before, records=records)
        self._probe_repeats = probed == before
        return measure(now, probed)

    def _probed_again(self, before: Probed, *, records: bool) -> Probed:
        """Measure the probe a second time; if recording it goes wrong, keep that first."""
        recordings, probe = Recordings(self._ledger, self._session.environment, None), self.probe()
        known = probe.hindrance
        try:
            return probe.again(before, records=records and probe.can_record and recordings.may_be_made())
        finally:
            if probe.hindrance != known:
                recordings.give_up("the probe is", probe.hindrance, self._state.step)

    def _recorded_facts(self) -> Facts:
        self._facts = self._facts or self._session.facts()
        return self._facts
