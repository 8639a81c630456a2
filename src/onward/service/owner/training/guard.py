"""The guard: warns of files that harm the model or cannot be learnt, or takes them back.

What it finds is a function of what the ledger has on the file and on earlier boundaries, so that a process that
continues after a kill finds the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from onward.config.sections import GuardConfig
from onward.data.plan.replay import StreamPlan
from onward.data.tokenized import TokenizedFile
from onward.errors import GuardRejected
from onward.events import Note, StepTaken
from onward.hooks.limits import RUNNING, WINDOW, Finding, Judged, Limits, grown, moved_away, spiked, unanswered
from onward.service.knowledge.evaluation import Evaluation
from onward.service.knowledge.table import ANSWERS, GRID, same_rows
from onward.service.settings import Settings
from onward.store.ledger import Ledger
from onward.store.rows import FileRow, StepRecord
from onward.text import printable
from onward.training.state import TrainState

NAMED = 10
"""The most rows that a report names, by loss, out of the steps with the largest loss and the largest gradient."""
Problems = list[dict[str, Any]]
"""Rows of a report: line, reason and remedy."""


@dataclass(frozen=True)
class InHand:
    """The current file: its row in the ledger, its plan and its tokens."""

    row: FileRow
    plan: StreamPlan
    tokens: TokenizedFile


class Guard:
    """Judges files by the limits of the current config.

    Args:
        evaluation: measures rows, for reports.
    """

    def __init__(self, ledger: Ledger, settings: Settings, evaluation: Evaluation) -> None:
        self._ledger = ledger
        self._settings = settings
        self._evaluation = evaluation
        self._steps = deque[Judged](maxlen=WINDOW + RUNNING)
        self._told = False

    def judges_answers(self, row: FileRow) -> bool:
        """Whether the answers of a file have to be judged before it is begun."""
        return self._settings.current.guard.action == "reject" and bool(self._limits().answers) and not row.accepted

    def begin(self, file: InHand, state: TrainState) -> Iterator[Note]:
        """Watch a file from now on; a resumed one is also judged by the steps that it took before.

        Raises:
            GuardRejected: its answers say nothing, or do not belong to their questions.
        """
        row = file.row
        taken = self._ledger.last_steps(row.id, WINDOW + RUNNING)[::-1]
        self._steps = deque((Judged(step.step, step.loss, step.grad_norm) for step in taken), self._steps.maxlen)
        self._told = False
        if not taken and self.judges_answers(row):
            answers = self._ledger.boundary_results(row.id).get(ANSWERS, {})
            found = list(unanswered(answers, self._limits()))
            if found:
                why = "its answer fits the question of another row better"
                rows = [{"line": line, "reason": why, "remedy": ""} for line in answers["lines"][:NAMED]]
                yield from self._act(row, found, state, lambda: rows)

    def after_step(self, file: InHand, result: StepTaken, state: TrainState) -> Iterator[Note]:
        """Judge a step; yield what the user should read.

        Raises:
            GuardRejected: loss or gradient norm left the file's usual range.
        """
        self._steps.append(Judged(result.step, result.loss, result.grad_norm))
        limits = self._limits()
        if limits.spike is None or self._told:
            return
        found = spiked(list(self._steps), limits)
        if found is not None:
            self._told = True
            yield from self._act(file.row, [found], state, partial(self._worst_rows, file, state))

    def at_boundary(self, row: FileRow, state: TrainState, file: InHand | None = None) -> Iterator[Note]:
        """Judge a file by what was measured at its boundary; yield what the user should read.

        Args:
            file: the file with its plan and tokens, for the rows that a report names.

        Raises:
            GuardRejected: an earlier file suffered, or the model moved too far away from its base.
        """
        limits = self._limits()
        if limits == Limits():
            return
        found = list(self._compared(row, limits))
        if found:
            yield from self._act(row, found, state, partial(self._worst_rows, file, state))

    def _limits(self) -> Limits:
        guard = self._settings.current.guard
        return Limits() if guard.action == "off" else _limits_of(guard)

    def _compared(self, row: FileRow, limits: Limits) -> Iterator[Finding]:
        """Compare the boundary after a file with the newest measurement before it, on the same rows."""
        now = self._ledger.boundary_results(row.id).get(GRID, {})
        known = self._evaluation.account.up_to(row.place - 1)
        before, after, base = dict[int, float](), dict[int, float](), dict[int, float]()
        files = dict[int, int]()
        earlier_files = {key: score for key, score in now.get("model", {}).items() if key != row.sha256}
        for key, score in earlier_files.items():
            of_base = known.of_base.get(key) or now.get("base", {}).get(key)
            for place in self._ledger.places_of(key, row.place - 1):
                earlier = known.newest_loss(key, score, place)
                if earlier is None:
                    continue
                before[place], after[place] = earlier.value, score["loss"]
                files[place] = row.place - earlier.place
                if of_base and same_rows(of_base, score):
                    base[place] = of_base["loss"]
        yield from grown(before, after, limits, base, files)
        moved = known.anchor or self._evaluation.anchor_at_start
        if moved is not None:
            kl = (now.get("anchor") or {}).get("kl")
            yield from moved_away(moved.value, kl, limits, row.place - moved.place)

    def _act(
        self, row: FileRow, found: Sequence[Finding], state: TrainState, to_look_at: Callable[[], Problems]
    ) -> Iterator[Note]:
        texts = [self._named(finding) for finding in found]
        if self._settings.current.guard.action == "reject" and not row.accepted:
            problems: Problems = [{"line": None, "reason": text, "remedy": ""} for text in texts]
            problems += to_look_at()
            raise GuardRejected(f"it exceeded the guard's limits: {texts[0]}", row.id, problems)
        for text in texts:
            message = f"{printable(row.name)}: {text}{' (accepted)' if row.accepted else ''}"
            self._ledger.add_event("warning", message, state.step, kind="guard")
            yield Note(message)

    def _named(self, finding: Finding) -> str:
        """Return the text of a finding with the name of the file that suffered."""
        row = None if finding.position is None else self._ledger.at_position(finding.position)
        return finding.text if row is None else f"{finding.text}: {printable(row.name)}"

    def _worst_rows(self, file: InHand | None, state: TrainState) -> Problems:
        """Name rows of the steps with the largest loss and the largest gradient, the largest loss first."""
        if file is None or not self._evaluation.is_possible:
            return []
        steps = self._ledger.steps(file.row.id)
        why: dict[int, str] = {}
        for name, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
            worst: StepRecord = max(steps, key=lambda step: getattr(step, key))
            for reference in file.plan.rows_at(worst.step_in_file - 1):
                if reference.sha256 == file.row.sha256:
                    why.setdefault(reference.row, f"step {worst.step}, of the largest {name}")
        losses = self._evaluation.row_losses(state.model, [file.tokens.row(row) for row in why])
        ranked = sorted(zip(losses, why, strict=True), key=lambda pair: (-pair[0], pair[1]))
        return [
            {"line": file.tokens.line(row), "reason": f"loss {loss:.4f} ({why[row]})", "remedy": ""}
            for loss, row in ranked[:NAMED]
        ]


def _limits_of(guard: GuardConfig) -> Limits:
    """Return the limits of a config, in which 0 means off."""
    return Limits(guard.forgetting or None, guard.anchor or None, guard.spike or None, guard.answers or None)
