"""The deep proof: trains everything since the last boundary again, apart from the run, and compares bit for bit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from onward.atomic import remove_tree
from onward.config import stored_config
from onward.data.plan.replay import StreamPlan
from onward.data.tokenized import TokenizedFile
from onward.digest import xxh3_file
from onward.errors import ConfigError, VerificationFailed
from onward.events import StepTaken
from onward.hooks.evaluation import WAY
from onward.layout import RunLayout, step_of
from onward.service.intake.tokens import make_tokens, open_tokens
from onward.service.knowledge.evaluation import Evaluation
from onward.service.knowledge.plans import OpenSources, first_in_stream, plan_of
from onward.service.knowledge.table import GRID
from onward.service.session import Session, open_session
from onward.store.ledger import Ledger
from onward.store.rows import FileRow, StepRecord
from onward.text import how_many
from onward.training.boundary import cross_boundary
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint
from onward.training.checkpoints.loading import load_state
from onward.training.device.environment import differences, promises_bits, same_environment
from onward.training.model.weights import save_weights
from onward.training.state import TrainState
from onward.training.trainer import Trainer

EXACT = "A replay is exact only on the same machine with the same versions, settings and thread count."
REST = "onward verify checks everything else."


def replay(layout: RunLayout, ledger: Ledger) -> str:
    """Train from the newest restore point before the current state up to it; return what was compared.

    Raises:
        VerificationFailed: a loss, a weight or a moment differs, or there is no restore point to start from.
    """
    found = inspect_checkpoint(layout.checkpoint(ledger.committed_step()))
    target = found.verified
    if target is None:
        raise VerificationFailed(f"the current checkpoint does not verify: {'; '.join(found.problems)}")
    if target.cursor.position == 0:
        return "nothing has been trained since the run began"
    folder, start = _start(layout, target)
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(layout, ledger, report=lambda _: None)
        if not promises_bits(target.environment):
            raise VerificationFailed(
                "equal bits are not promised for this run, so training again would prove nothing",
                hint="Its steps may differ each time (`deterministic: false`, `exchange: fast` or unequal devices, an "
                f"Apple GPU). {REST}",
            )
        if not same_environment(session.environment, target.environment):
            raise VerificationFailed(
                f"the state was made elsewhere: {differences(target.environment, session.environment)}",
                hint=EXACT,
            )
        config = stored_config(start.config)
        state = load_state(folder, start, replace(session.spec, config=config), treatment=session.treatment)
        evaluation = Evaluation(session, samples=Path(scratch) / "samples")
        unmeasured: list[str] = []
        try:
            steps = sum(1 for _ in _train_again(session, evaluation, state, target, Path(scratch), unmeasured))
            _require_equal(state, target, Path(scratch))
        except VerificationFailed as error:
            _require_one_environment(ledger, start.step, target.step, error)
            raise
    again = f"{how_many(steps, 'step')} from step {start.step} trained again"
    files = f"; not measured again, since evaluation.files have changed: {', '.join(unmeasured)}" if unmeasured else ""
    return f"{again}: weights, moments and losses equal, bit for bit{files}"


def _require_one_environment(ledger: Ledger, first: int, last: int, found: VerificationFailed) -> None:
    """Say so if steps that gave something else again may have been taken elsewhere: on a node of another kind, say.

    Args:
        first: the step at which the replay began; the state there is given.
        found: what differs.

    Raises:
        VerificationFailed: a handover between the two steps was not bitwise.
    """
    apart = [each for each in ledger.handovers() if first < each.step < last and each.name != "bitwise"]
    if apart:
        raise VerificationFailed(
            f"steps up to {apart[-1].step} were taken in another environment (handover {apart[-1].name}): {found.what}",
            hint=f"{EXACT} {REST}",
        )


def _start(layout: RunLayout, target: Manifest) -> tuple[Path, Manifest]:
    for point in layout.restore_points():
        if step_of(point) < target.step:
            manifest = inspect_checkpoint(point).verified
            if manifest is not None and manifest.run == target.run:
                return point, manifest
    raise VerificationFailed(
        "no restore point before the current state is kept, so there is nothing to train again from",
        where=layout.boundaries,
        hint="A rollback to the oldest one leaves none before it. The next file can be proven again: onward train FILE",
    )


def _train_again(
    session: Session, evaluation: Evaluation, state: TrainState, target: Manifest, scratch: Path, unmeasured: list[str]
) -> Iterator[None]:
    """Train up to a state, one yield per step; append files after which `evaluation.files` had other contents."""
    sources = _SameTokens(session, scratch)
    for row in session.ledger.files("training", "done"):
        if row.place <= state.cursor.position or row.place > target.cursor.position:
            continue
        yield from _train_file(sources, evaluation, state, target, row)
        if state.cursor.at_boundary and not _measure_again(session.ledger, evaluation, state, row):
            unmeasured.append(row.name)


def _measure_again(ledger: Ledger, evaluation: Evaluation, state: TrainState, row: FileRow) -> bool:
    """Repeat the measurements of a boundary and compare them, unless an earlier release measured in another way.

    Returns:
        False if they cannot be repeated: files of `evaluation.files` are missing now, or have other contents.
    """
    recorded = ledger.boundary_results(row.id).get(GRID)
    if recorded is None or recorded.get("way") != WAY:
        return True
    config = stored_config(ledger.config_of(row))
    if recorded["names"] not in ({}, evaluation.asked(config)):
        return False
    measured = evaluation.of_boundary(state.model, row, config, state.step)[GRID]
    if measured["names"] != recorded["names"]:  # they could not be read then
        return False
    if json.loads(json.dumps(measured)) != recorded:
        raise VerificationFailed(f"measured again after {row.name}, the model's scores differ from those recorded")
    return True


class _SameTokens:
    """The tokens that files were trained from, each compared once with what its original gives.

    Args:
        scratch: a folder for the tokens that are made again.
    """

    def __init__(self, session: Session, scratch: Path) -> None:
        self.session = session
        self._opened = OpenSources(session, lambda: None)
        self._made = scratch / "tokens"
        self._compared: set[str] = set()

    def of_plan(self, plan: StreamPlan, own: TokenizedFile, row: FileRow) -> Mapping[str, TokenizedFile]:
        """Open the files that a plan takes rows from, as `OpenSources` does.

        Raises:
            VerificationFailed: cached tokens are not those of their original.
        """
        sources = self._opened.of_plan(plan, own)
        for sha256, tokens in sources.items():
            self._compare(row if sha256 == row.sha256 else first_in_stream(self.session.ledger, sha256), tokens)
        return sources

    def _compare(self, row: FileRow, tokens: TokenizedFile) -> None:
        if tokens.directory.name in self._compared:
            return
        self._compared.add(tokens.directory.name)
        try:
            make_tokens(self.session, row, stored_config(self.session.ledger.config_of(row)), self._made, lambda: None)
        except ConfigError:  # an earlier release took rows that are refused now
            return
        again = TokenizedFile.open(self._made, verify=False)
        if not again.holds_same(tokens):
            raise VerificationFailed(
                f"the tokens of {row.name} in the cache are not those of its original",
                where=tokens.directory,
                hint="Remove this directory, and train again what may have been trained on it: "
                "onward rollback --to FILE --requeue",
            )
        remove_tree(self._made)


def _train_file(
    sources: _SameTokens, evaluation: Evaluation, state: TrainState, target: Manifest, row: FileRow
) -> Iterator[None]:
    session, ledger = sources.session, sources.session.ledger
    config = stored_config(ledger.config_of(row))
    tokens = open_tokens(session, row, config, lambda: None)
    plan = plan_of(ledger, row, tokens.rows, config, row.place)
    cross_boundary(state, config, plan, row.place)
    recorded = {step.step: step for step in ledger.steps(row.id)}
    anchor = evaluation.anchor_term(state.model, config)
    trainer = Trainer(state, config, session.execution, anchor)
    for result in trainer.steps(sources.of_plan(plan, tokens, row), plan):
        _require_same_step(row, recorded.get(result.step), result)
        yield
        if result.step == target.step:
            return


def _require_same_step(row: FileRow, recorded: StepRecord | None, result: StepTaken) -> None:
    for name in ("loss", "grad_norm", "anchor", "tokens", "target_tokens", "epoch"):
        before, again = getattr(recorded, name, None), getattr(result, name)
        if before != again:
            problem = f"step {result.step} of {row.name} had {name.replace('_', ' ')} {before!r}, again {again!r}"
            raise VerificationFailed(problem)


def _require_equal(state: TrainState, target: Manifest, scratch: Path) -> None:
    now = state.view()
    digest = now.digest()
    here = {"weights": digest.weights, "moments": digest.moments, "adam_step": now.adam_step()}
    differing = [key for key, value in here.items() if value != target.measurement[key]]
    if differing or now.plain() != target.state:
        raise VerificationFailed(f"trained again, the state differs in: {', '.join(differing) or 'counters'}")
    save_weights(state.model, now.weights, scratch)
    for path in scratch.glob("*.safetensors"):
        if xxh3_file(path) != target.files[path.name]["xxh3"]:
            raise VerificationFailed(f"trained again, {path.name} is a different file")
