"""Measuring in the owner: its state is shown, results are recorded, and a request interrupts it within a step."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from onward.config import Config, stored_config
from onward.data.plan.replay import StreamPlan
from onward.data.tokenized import TokenizedFile
from onward.errors import ConfigError, OnwardError, first_line
from onward.service.knowledge.evaluation import Evaluation, owed_evaluation
from onward.service.knowledge.table import ANSWERS, BEFORE, GRID, NOTHING
from onward.service.session import Session
from onward.service.shown import Shown
from onward.service.wishes import Stopped
from onward.store.rows import FileRow
from onward.training.boundary import AtBoundary, Boundary, run_hooks
from onward.training.device.errors import is_device_lost
from onward.training.state import TrainState


class Measuring:
    """Measures at boundaries, and calls the other hooks there.

    Results are recorded before the boundary is committed, like step records: a kill in between leaves either both or
    results that settling trims. If a stop comes first, the measurement is owed, and the next process makes it with the
    same state before it trains.

    Args:
        look: called between two forward passes; raises `Stopped` to interrupt the measurement.

    Raises:
        ConfigError: there are hooks, and the model is sharded.
    """

    def __init__(self, session: Session, shown: Shown, hooks: tuple[AtBoundary, ...], look: Callable[[], None]) -> None:
        self._session = session
        self._ledger = session.ledger
        self._shown = shown
        self.evaluation = Evaluation(session, look)
        self._others = hooks
        if session.in_shards and hooks:
            raise ConfigError(
                "hooks at boundaries compute on rank 0 only, which a sharded model does not allow",
                where="sharding",
                hint="Set sharding: off, or train without hooks.",
            )

    def at_boundary(
        self, row: FileRow, state: TrainState, config: Config, plan: StreamPlan, tokens: TokenizedFile
    ) -> None:
        """Call the hooks at a boundary that is not committed yet, and record their results."""
        if not (config.evaluation.share or self._others):
            return
        boundary = Boundary(state.step, row.name, state.model, tokens, plan, config, state.cursor.position)
        with self._showing("saving"):
            try:
                results = self._results(boundary)
            except Stopped:
                return
            self._ledger.keep_boundary_results(row.id, state.step, results)

    def _results(self, boundary: Boundary) -> Mapping[str, Any]:
        """Return the results of all hooks. This run's own measures a twin, for which the model need not be prepared."""
        if not self._others:
            return self._at_boundary(boundary)
        return run_hooks((self._at_boundary, *self._others), boundary, self._session.device)

    def _at_boundary(self, boundary: Boundary) -> Mapping[str, Any]:
        return self._or_nothing(GRID, boundary.step, lambda: self.evaluation.at_boundary(boundary))

    def _or_nothing(self, name: str, step: int, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Measure; a failure in the model's own code is reported and leaves blanks, but never stops training.

        After a lost device the next process measures. What does not fit into memory may never fit, and leaves blanks.
        """
        try:
            return measure()
        except (Stopped, OnwardError, OSError, sqlite3.Error):  # from the machine or the config, or requested
            raise
        except Exception as error:
            if is_device_lost(error):
                raise
            reason = f"the model was not measured here: {type(error).__name__}: {first_line(error)}"
            self._ledger.add_event("warning", reason, step)
            return {name: NOTHING}

    def before_file(
        self, row: FileRow, state: TrainState, config: Config, tokens: TokenizedFile, *, judge: bool
    ) -> None:
        """Measure a file before its first step.

        Args:
            judge: whether to judge its answers too, for the guard.

        Raises:
            ConfigError: a file of `evaluation.files` cannot be read.
            Stopped: there was a request; nothing is recorded, and the file is not begun.
        """
        evaluation, results = self.evaluation, dict[str, Any]()
        if not (config.evaluation.share or judge):
            return
        with self._showing("tokenizing"):
            if config.evaluation.share:
                evaluation.require_questions(config)
            place = (state.cursor.position + 1, state.step)
            measure = partial(evaluation.before, state.model, row, config, tokens, place)
            results |= self._or_nothing(BEFORE, state.step, measure)
            if judge and evaluation.is_possible:
                answers = partial(evaluation.answers, state.model, row, tokens)
                results |= self._or_nothing(ANSWERS, state.step, lambda: {ANSWERS: answers()})
            self._ledger.keep_boundary_results(row.id, state.step, results)

    def catch_up(self, state: TrainState) -> FileRow | None:
        """Measure the boundary that the state is at, if a stop came first; return the file before it.

        Raises:
            Stopped: another stop came first.
        """
        row = owed_evaluation(self._ledger)
        if row is None or not state.cursor.at_boundary or row.position != state.cursor.position:
            return None
        if self._session.in_shards:
            reason = "the boundary that was still to be measured cannot be measured: the model is now sharded"
            self._ledger.add_event("warning", reason, state.step)
            self._ledger.keep_boundary_results(row.id, state.step, {GRID: NOTHING})
            return row
        config = stored_config(self._ledger.config_of(row))
        with self._showing("training"):
            results = self._or_nothing(
                GRID, state.step, lambda: self.evaluation.of_boundary(state.model, row, config, state.step)
            )
            self._ledger.keep_boundary_results(row.id, state.step, results)
        return row

    @contextmanager
    def _showing(self, after: str) -> Generator[None]:
        self._shown.set("evaluating")
        try:
            yield
        finally:
            self._shown.set(after)
