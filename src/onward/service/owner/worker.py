"""One file's journey: from the queue through its steps to a committed boundary. Read this first.

`Worker.train_next` is a generator of events; whoever iterates renders them. The state lives in `TrainState`, the
account of it in the ledger, and a kill at any instant leaves both where `Commits.settle` finds them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from typing import Any

from onward.config import Config, read_config, stored_config
from onward.data.order import FilePlan, make_plan
from onward.data.tokenize import TokenizedFile
from onward.digest import sha256_json
from onward.errors import TrainingError
from onward.events import Committed, Event, FileDone, FileStarted, Note, StepTaken
from onward.service.intake.tokens import forget_tokens, open_tokens
from onward.service.session import Session, check_identity
from onward.service.state.commits import Commit
from onward.service.state.retention import Retention
from onward.service.state.settle import Settled, Settlement
from onward.service.state.writer import Writer
from onward.service.stop import Interruption
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics, StepRecord
from onward.store.rows import FileRow
from onward.training import huggingface
from onward.training.boundary import cross_boundary
from onward.training.checkpoint import SPACE_MARGIN, Facts, Manifest, estimate_size, load_state
from onward.training.handover import Probe, compare, measure
from onward.training.model import build_model
from onward.training.optim import build_optimizer
from onward.training.schedule import require_horizon, require_unstretched
from onward.training.state import Snapshot, TrainState
from onward.training.trainer import Trainer

LedgerMoves = Callable[[Ledger], None]


class Worker:
    """Trains what the stream owes, one file after another, as one run.

    Args:
        session: the run, opened by the one process that owns it.
        stop: polled after every step; once it is true the state is committed and the file is left.
        settled: the state to go on from, where it was found already and nothing moved since.
        goes_on: asked at a boundary: whether the next file may begin while the boundary is committed behind it.
    """

    def __init__(
        self,
        session: Session,
        stop: Interruption,
        settled: Settled | None = None,
        *,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.session = session
        self.ledger = session.ledger
        self.stop = stop
        self._writer = Writer(session.layout, session.ledger.clock)
        self._newest: Manifest | None = None
        self._copy: Snapshot | None = None
        self._probed: Probe | None = None
        self.config = session.config
        self._settled = settled
        self._goes_on = goes_on
        self._finished: FileDone | None = None
        self._is_open = False
        self._facts: Facts | None = None
        self._log: deque[dict[str, Any]] = deque(maxlen=huggingface.LOG_TAIL)

    @property
    def manifest(self) -> Manifest:
        """The newest checkpoint."""
        assert self._newest is not None
        return self._newest

    def train_next(self) -> Iterator[Event]:
        """Take the file that the stream owes now to its boundary, or as far as `stop` lets it come.

        Files that may begin at once follow, each while the boundary before it is committed. A worker that was left at
        a step goes on from there when it is called again; nothing is being written then.

        Raises:
            OnwardError: the state, the file or the machine does not allow to go on; what was committed stays, and this
                worker cannot be used again.
        """
        yield from self._settle()
        if self.ledger.next_owed() is None:
            return
        if not self._is_open:
            with self.stop.interruptible():
                self._load()
            yield from self._begin_run()
            self._is_open = True
        row = self.ledger.next_owed()
        metrics = Metrics(self.session.layout.ledger)
        try:
            while row is not None:
                row = yield from self._journey(row, metrics)
        except Exception:
            yield from self._collect(wait=True)  # whoever goes back must not meet a commit that still goes on
            raise
        except GeneratorExit:
            self._writer.join()
            raise
        finally:
            metrics.close()

    def bytes_needed(self) -> int:
        """Return the free bytes that the next checkpoint wants."""
        self._facts = self._facts or self.session.facts()
        return int(estimate_size(self.state.view(), self._facts) * SPACE_MARGIN)

    def _settle(self) -> Iterator[Event]:
        """Once: find the state to go on from, and bring ledger and directories to it."""
        if self._settled is not None:
            return
        self._settled = Settlement(self.session.layout, self.ledger, Retention.of(self.config)).settle()
        for problem in self._settled.damage:
            yield Note(f"damaged: {problem}")

    def _load(self) -> None:
        """Load the newest verifiable state, or make that of step 0; nothing is written."""
        self.ledger.put(state="loading")
        session, settled = self.session, self._settled
        if settled is None or settled.folder is None or settled.manifest is None:
            model = build_model(self.config, session.base, session.device, session.dtype)
            self.state = TrainState(model, build_optimizer(model, self.config))
            self._in_force = self.config
            return
        self._newest = settled.manifest
        self._in_force = stored_config(self.manifest.config)
        if not self.manifest.cursor.at_boundary:
            self.config = self._in_force
        self.state = load_state(settled.folder, self.manifest, self.config, session.base, session.device, session.dtype)
        self._log.extend(json.loads((settled.folder / huggingface.TRAINER_STATE).read_bytes())["log_history"])

    def _begin_run(self) -> Iterator[Event]:
        """Begin to commit the state of step 0, or measure the handover of a resume."""
        settled = self._settled
        if settled is None or settled.manifest is None:
            yield from self._begin_commit(None)
            return
        if settled.damage:
            yield Note(f"went back to step {self.manifest.step}, which verifies; what came after is trained again")
        if not self.manifest.cursor.at_boundary:
            self._hand_over("resume", self.ledger.at_position(self.manifest.cursor.position))

    def _journey(self, row: FileRow, metrics: Metrics) -> Generator[Event, None, FileRow | None]:
        """Take one file from where it stands to its boundary; returns the file that follows at once."""
        resumed = row.state == "training" and self.state.cursor.position == row.position
        if not resumed:
            self.config = self._config_in_force(row)
            if self.config != self._in_force:  # what is being written must not meet another config
                yield from self._collect(wait=True)
        self.ledger.put(state="tokenizing")
        tokens = open_tokens(self.session, row, self.config, self.stop.check)
        plan = make_plan(row.sha256, tokens.rows, self.config, row.occurrence)
        handover = "resumed" if resumed else self._begin(row, plan)
        yield FileStarted(
            name=row.name,
            position=self.state.cursor.position,
            rows=plan.rows,
            truncated=tokens.meta["truncated"],
            dropped=tokens.meta["dropped"],
            steps=plan.steps,
            steps_done=self.state.cursor.step,
            handover=handover,
        )
        self.ledger.put(state="training")
        yield from self._train(row.id, tokens, plan, metrics)
        return (yield from self._finish(row, plan)) if self.state.cursor.at_boundary else None

    def _config_in_force(self, row: FileRow) -> Config:
        """Read the config as it is now: it changes at boundaries only, and never its identity.

        A file that was begun before and lost is trained again under the config that it had, and one that did not
        fit into memory in smaller parts.
        """
        session = self.session
        if row.config is not None:
            return stored_config(self.ledger.config_of(row))
        config = read_config(session.layout.config)
        check_identity(session.ledger, config, session.base_digest, session.tokenizer_digest)
        if row.parts is not None:
            config = config.model_copy(update={"gradient_accumulation": row.parts})
        return config

    def _begin(self, row: FileRow, plan: FilePlan) -> str:
        """Cross the boundary before a file: measure the handover, put the config in force, set the cursor."""
        state, config, old = self.state, self.config, self._in_force
        if state.step > 0:
            require_unstretched(old, config)
        require_horizon(config, state.step + plan.steps)
        handover = self._hand_over("boundary", row)
        position = state.cursor.position + 1
        fingerprint = sha256_json(config.flat())
        with self.ledger.transaction():
            self.ledger.keep_config(fingerprint, config.model_dump(mode="json"))
            for key, (before, after) in old.differences(config).items():
                self.ledger.add_config_change(state.step, row.id, key, (before, after))
                self.ledger.add_event("info", f"config: {key} changed from {before} to {after}", state.step)
            self.ledger.move_file(
                row.id, "training", position=position, config=fingerprint, start_step=state.step,
                planned_steps=plan.steps, rows=plan.rows,
            )  # fmt: skip
        cross_boundary(state, config, plan, position)
        self._in_force = config
        return handover

    def _train(self, file_id: int, tokens: TokenizedFile, plan: FilePlan, metrics: Metrics) -> Iterator[Event]:
        session, state = self.session, self.state
        trainer = Trainer(state, self.config, session.device, session.dtype, session.pad_id)
        for result in trainer.steps({plan.sha256: tokens}, plan):
            metrics.append(_record(file_id, result))
            self._remember(result)
            yield result
            yield from self._collect(wait=False)
            if state.cursor.at_boundary:
                return
            if self.stop:
                yield from self._begin_commit(file_id)
                yield from self._wait_for_commit()
                return
            if result.step % self.config.save_steps == 0:
                yield from self._begin_commit(file_id)

    def _finish(self, row: FileRow, plan: FilePlan) -> Generator[Event, None, FileRow | None]:
        """Hold the file against its postconditions and commit its boundary; returns the file that follows at once."""
        self._require_done(row.id, plan)
        step = self.state.step

        def done(ledger: Ledger) -> None:
            ledger.move_file(row.id, "done", finished=ledger.clock())
            ledger.add_event("info", f"{row.name} done: {plan.steps} steps", step, kind="done")

        yield from self._begin_commit(row.id, done)
        self._finished = FileDone(row.name, self.state.cursor.position, step - plan.steps + 1, step)
        following = None if self.stop or not self._goes_on() else self.ledger.next_queued()
        if following is None:
            yield from self._wait_for_commit()
        return following

    def _require_done(self, file_id: int, plan: FilePlan) -> None:
        counted = self.ledger.count_trained(file_id)
        counters = self.state.counters
        expected = (plan.steps, plan.rows * plan.epochs)
        if counted != expected:
            raise _broken(f"the file was to train (steps, rows) {expected}, the ledger counted {counted}")
        adam_step = self.state.view().adam_step()
        if adam_step != counters.step - counters.adam_origin:
            raise _broken(f"Adam counts {adam_step} steps, the run {counters.step - counters.adam_origin}")

    def _hand_over(self, kind: str, row: FileRow | None) -> str:
        """Measure the state and hold it against what was measured before the last commit, written or not."""
        after = measure(self.state.view(), self._probe().of_model())
        measured = self._writer.measured()
        before = self.manifest.measurement if measured is None else measured.to_dict()
        environment = self.manifest.environment if measured is None else self.session.environment
        name, difference = compare(before, after, environment, self.session.environment)
        self.ledger.add_handover(
            kind=kind, step=self.state.step, file_id=row.id if row else None, difference=difference,
            before=json.dumps(before), after=json.dumps(after.to_dict()), name=name,
        )  # fmt: skip
        return name

    def _probe(self) -> Probe:
        if self._probed is None:
            session = self.session
            self._probed = Probe(self.state.model, self.config.seed, session.device, session.dtype)
        return self._probed

    def _wait_for_commit(self) -> Iterator[Event]:
        """Wait until what was begun is committed."""
        self.ledger.put(state="saving")
        yield from self._collect(wait=True)

    def _begin_commit(self, file_id: int | None, with_ledger: LedgerMoves = lambda _: None) -> Iterator[Event]:
        """Copy the state, to be committed while training goes on; the commit before is waited for."""
        yield from self._collect(wait=True)
        self._facts = self._facts or self.session.facts()
        self._copy = self.state.snapshot(into=self._copy)
        self._writer.submit(
            Commit(
                self.state.model, self._copy, self.config, self._probe().of_copy(self._copy), self._facts,
                tuple(self._log), self._newest, file_id, with_ledger,
            )
        )  # fmt: skip

    def _collect(self, *, wait: bool) -> Iterator[Event]:
        """Take note of a commit that is finished; what made it fail is raised here."""
        manifest = self._writer.collect(wait=wait)
        if manifest is None:
            return
        before, self._newest = self._newest, manifest
        finished, self._finished = self._finished, None
        yield Committed(manifest.step)
        if finished is not None:
            if before is not None and manifest.measurement["weights"] == before.measurement["weights"]:
                yield Note(f"{finished.name} changed no weight: is the learning rate too small?")
            forget_tokens(self.session)
            yield finished

    def _remember(self, result: StepTaken) -> None:
        if result.step % self.config.log_steps == 0 or self.state.cursor.at_boundary:
            self._log.append(
                {
                    "step": result.step,
                    "epoch": result.epoch,
                    "loss": result.loss,
                    "learning_rate": result.learning_rate,
                    "grad_norm": result.grad_norm,
                }
            )


def _record(file_id: int, result: StepTaken) -> StepRecord:
    values = asdict(result)
    del values["steps_in_file"]
    return StepRecord(file_id, **values)


def _broken(reason: str) -> TrainingError:
    return TrainingError(
        f"the file did not do what it was to do: {reason}", hint="Nothing of it was committed as done. onward verify"
    )
