"""One file's journey: from the queue through its steps to a committed boundary. Read this first.

`Worker.train_next` is a generator of events, for its caller to show. The state is in `TrainState`, the record of it in
the ledger, and after a kill at any instant `Settlement` can recover both.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from functools import partial

from onward.config import Config, stored_config
from onward.data.plan.replay import StreamPlan
from onward.data.tokenized import TokenizedFile
from onward.digest import sha256_json
from onward.events import Committed, Event, FileDone, Note, Resumed
from onward.service.intake.tokens import forget_tokens, open_tokens
from onward.service.knowledge.evaluation import owed_evaluation
from onward.service.knowledge.plans import OpenSources, plan_of
from onward.service.owner.training.committed import CommittedState, Reached
from onward.service.owner.training.guard import Guard, InHand
from onward.service.owner.training.measuring import Measuring
from onward.service.owner.training.part_tokens import with_part_tokens
from onward.service.owner.training.postconditions import require_done
from onward.service.owner.training.recordings import Recordings
from onward.service.owner.training.start import Start
from onward.service.owner.training.steps import file_started, log_entry, record_of, watched
from onward.service.owner.training.surroundings import Surroundings
from onward.service.session import Session
from onward.service.state.ownership import Ownership
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import FileRow
from onward.text import how_many
from onward.training.boundary import cross_boundary
from onward.training.device.memory import gpu_is_crowded
from onward.training.model.adapter import require_droppable
from onward.training.schedule import require_horizon, require_unstretched
from onward.training.steps.economy import Learned
from onward.training.trainer import Trainer


class Worker:
    """Trains the files that wait, one after another, as one run.

    Args:
        session: the run, opened by the one process that owns it.
        start: the state to continue from.
    """

    def __init__(self, session: Session, start: Start, around: Surroundings) -> None:
        self.session = session
        self.ledger = session.ledger
        self.state = start.state
        self.around, self._in_shards = around, start.in_shards
        self.config = session.config if start.manifest is None or start.manifest.cursor.at_boundary else start.config
        self._in_force = start.config
        self._has_begun = False
        self._committed = CommittedState(session, start)
        self._ownership = Ownership(session.layout, session.ledger)
        self._sources: tuple[str, ...] = ()
        self._files = OpenSources(session, around.look)
        self._measuring = Measuring(session, around.shown, around.hooks, around.look)
        self._guard = Guard(self.ledger, around.settings, self._measuring.evaluation)
        self._learned = Learned(around.memory)
        self._compute_as_asked()

    def train_next(self) -> Iterator[Event]:
        """Take the file whose turn it is to its boundary, or as far as the wishes allow.

        Files that may begin at once follow, each while the boundary before it is committed. A worker that was left at a
        step continues from there when called again; nothing is being written meanwhile.

        Raises:
            StepFailed: a step of the current file failed.
            OnwardError: the state or the machine does not allow training to continue. What was committed stays, and
                this worker cannot be used again.
        """
        row = self.ledger.next_owed()
        if row is None and owed_evaluation(self.ledger) is None:
            return
        metrics = Metrics(self.session.layout.ledger, waiting=self.ledger.waiting)
        try:
            yield from self._begin_run()
            yield from self._catch_up()
            while row is not None:
                row = yield from self._journey(row, metrics)
        except Exception:
            yield from self._collect(wait=True)  # before the run is rolled back, the pending commit has to end
            raise
        except GeneratorExit:
            self._committed.join()
            raise
        finally:
            self.around.wishes.in_hand = None
            metrics.close()

    def bytes_needed(self) -> int:
        """Return the free bytes that the next checkpoint needs."""
        return self._committed.bytes_needed()

    def _begin_run(self) -> Iterator[Event]:
        """Begin to commit the state of step 0, or report what is resumed and measure its handover; called once."""
        if self._has_begun:
            return
        newest = self._committed.newest
        if newest is None:
            yield from self._begin_commit(Reached(None))
        else:
            checkpoint = self.session.layout.checkpoint(newest.step).relative_to(self.session.layout.root)
            yield Resumed(newest.step, checkpoint.as_posix(), self.state.learning_rate)
            if not newest.cursor.at_boundary:
                row = self.ledger.at_position(newest.cursor.position)
                self._committed.hand_over("resume", row.id if row else None)
        self._measuring.evaluation.writers = self._committed.probe().writers
        self._has_begun = True

    def _catch_up(self) -> Iterator[Event]:
        """Measure and judge the boundary that the state is at, if a stop came before that was done."""
        row = self._measuring.catch_up(self.state)
        if row is not None:
            yield from self._guard.at_boundary(row, self.state)

    def _journey(self, row: FileRow, metrics: Metrics) -> Generator[Event, None, FileRow | None]:
        """Take one file from where it is to its boundary; return the file that follows at once."""
        self.around.wishes.in_hand = row.id
        resumed = row.state == "training" and self.state.cursor.position == row.position
        if not resumed:
            self.config = self._config_in_force(row)
            if self.config != self._in_force:  # the pending commit has the old config
                yield from self._collect(wait=True)
        self._compute_as_asked()
        self.around.shown.set("tokenizing")
        tokens = open_tokens(self.session, row, self.config, self.around.look)
        if self.config.replay.policy == "forgotten":  # it reads what was measured at the previous boundary
            yield from self._collect(wait=True)
        position = self.state.cursor.position + (not resumed)
        plan = plan_of(self.ledger, row, tokens.rows, self.config, position)
        self._sources = plan.sources
        trained = self.state.cursor.step if resumed else 0
        files = self._files.of_plan(plan, tokens, trained)
        first = self.state.step + (self._committed.newest is not None)
        self._ownership.require_room(first, self.state.step + plan.steps - trained)
        if not resumed:
            self._measuring.before_file(row, self.state, self.config, tokens, judge=self._guard.judges_answers(row))
        handover = "resumed" if resumed else self._begin(row, plan, tokens)
        yield file_started(row, self.state.cursor, plan, tokens.meta, handover, self.config.max_length)
        self.around.shown.set("training")
        row = self.ledger.file(row.id)
        in_hand = InHand(row, plan, tokens)
        yield from self._train(in_hand, files, metrics)
        return (yield from self._finish(in_hand)) if self.state.cursor.at_boundary else None

    def _config_in_force(self, row: FileRow) -> Config:
        """Read the current config: it takes effect only at boundaries, and its identity never changes.

        A file that was begun before and lost is trained again under the config that it had; one that did not fit into
        memory is trained in smaller parts.
        """
        session = self.session
        if row.config is not None:
            return stored_config(self.ledger.config_of(row))
        config = self.around.settings.read()
        session.check(config)
        require_droppable(self.state.model, config.lora.dropout)
        if row.parts is not None:
            config = config.model_copy(update={"gradient_accumulation": row.parts})
        return with_part_tokens(session, self.state, config, self._learned)

    def _compute_as_asked(self) -> None:
        """Make environment and probe state whether the config in force asks for deterministic operations."""
        if self.config.deterministic != self.session.config.deterministic:
            self.session = replace(self.session, config=self.config)
            self._committed.compute_as(self.session)

    def _begin(self, row: FileRow, plan: StreamPlan, tokens: TokenizedFile) -> str:
        """Cross the boundary before a file: measure the handover, put the config into force, set the cursor."""
        state, config, old = self.state, self.config, self._in_force
        if state.step > 0:
            require_unstretched(old, config)
        require_horizon(config, state.step + plan.steps)
        records = self.around.settings.current.cuda_graphs == "auto"
        handover = self._committed.hand_over("boundary", row.id, records=records)
        position = state.cursor.position + 1
        recorded = config.recorded()
        fingerprint = sha256_json(recorded)
        with self.ledger.transaction():
            self.ledger.keep_config(fingerprint, recorded)
            for key, (before, after) in old.differences(config).items():
                self.ledger.add_config_change(state.step, row.id, key, (before, after))
                change = f"config: {key} changed from {before} to {after}"
                self.ledger.add_event("info", change, state.step, kind="config")
            self.ledger.move_file(
                row.id, "training", position=position, config=fingerprint, start_step=state.step,
                planned_steps=plan.steps, rows=plan.rows, held_out=len(plan.held_out), token_digest=tokens.digest,
            )  # fmt: skip
        cross_boundary(state, config, plan, position)
        self._in_force = config
        return handover

    def _train(self, file: InHand, files: Mapping[str, TokenizedFile], metrics: Metrics) -> Iterator[Event]:
        session, state, file_id = self.session, self.state, file.row.id
        yield from self._guard.begin(file, self.state)
        anchor = self._measuring.evaluation.anchor_term(state.model, self.config)
        execution = self._in_shards.execution(session) if self._in_shards else session.execution
        recordings = Recordings(self.ledger, session.environment, file_id)
        self._learned.can_record = self._committed.probe().can_record and recordings.may_be_made()
        trainer = Trainer(state, self.config, execution, anchor, learned=self._learned)
        trainer.economy.follow(self.around.settings.current)
        is_crowded = partial(gpu_is_crowded, session.device, self.around.memory)
        steps = recordings.watched(trainer.steps(files, file.plan), self._learned)
        for result in watched(steps, self.around.heartbeat, is_crowded):
            metrics.append(record_of(file_id, result), result.replayed)
            if result.step % self.around.settings.current.log_steps == 0 or state.cursor.at_boundary:
                self._committed.log.append(log_entry(result, self.config.epochs))
            yield result
            yield from self._collect(wait=False)
            yield from self._guard.after_step(file, result, state)
            if state.cursor.at_boundary:
                return
            trainer.economy.follow(self.around.settings.current)
            if self.around.wishes:
                yield from self._begin_commit(Reached(file_id), is_awaited=True)
                yield from self._wait_for_commit()
                return
            if result.step % self.around.settings.current.save_steps == 0:
                yield from self._begin_commit(Reached(file_id))

    def _finish(self, file: InHand) -> Generator[Event, None, FileRow | None]:
        """Check the file's postconditions and commit its boundary; return the file that follows at once."""
        row, plan, step = file.row, file.plan, self.state.step
        require_done(self.ledger, self.state, row.id, plan)
        self._measuring.at_boundary(row, self.state, self.config, plan, file.tokens)
        yield from self._guard.at_boundary(row, self.state, file)

        def done(ledger: Ledger) -> None:
            ledger.move_file(row.id, "done", finished=ledger.clock())
            ledger.add_event("info", f"{row.name} done: {how_many(plan.steps, 'step')}", step, kind="done")

        end = FileDone(row.name, self.state.cursor.position, step - plan.steps + 1, step)
        yield from self._collect(wait=True)
        may_go_on = not self.around.wishes.pending and self.around.goes_on()
        following = self.ledger.next_queued() if may_go_on else None
        yield from self._begin_commit(Reached(row.id, done, end), is_awaited=following is None)
        if following is None:
            yield from self._wait_for_commit()
        return following

    def _wait_for_commit(self) -> Iterator[Event]:
        """Wait until the pending commit is done."""
        self.around.shown.set("saving")
        yield from self._collect(wait=True)

    def _begin_commit(self, reached: Reached, *, is_awaited: bool = False) -> Iterator[Event]:
        """Copy the state, to be committed while training continues; the previous commit is waited for."""
        yield from self._collect(wait=True)
        self._committed.begin(self.around.settings.over(self.config), reached, is_awaited=is_awaited)

    def _collect(self, *, wait: bool) -> Iterator[Event]:
        """Collect a finished commit; what made it fail is raised here."""
        before = self._committed.newest
        written = self._committed.collect(wait=wait)
        if written is None:
            return
        yield Committed(written.manifest.step, written.removed, written.restore_point)
        if written.done is not None:
            if before is not None and written.manifest.measurement["weights"] == before.measurement["weights"]:
                yield Note(f"{written.done.name} changed no weight: is the learning rate too small?")
            forget_tokens(self.session, self._sources)
            yield written.done
