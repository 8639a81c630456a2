"""The library: a run as an object, to make, train, watch, control and prove; what shows or exports it is in `views`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.events import Observe
from onward.layout import RunLayout
from onward.library.making import create, open_ledger, place_for_run
from onward.library.owning import Loading, Owning, PathLike, Report, silent
from onward.library.torch_defaults import defaults_of_torch, undisturbed
from onward.service import client
from onward.service.intake.inbox import STUCK, require_priority
from onward.service.outside.reporting import NewNotes
from onward.service.owner.process import account, operate, require_kept
from onward.service.wishes import Wish, Wishes
from onward.text import storable

if TYPE_CHECKING:
    from onward.service.proof.verify import Proof
    from onward.training.checkpoints.checkpoint import Manifest


class Run(Owning):
    """One run: a directory with a base model, a config, a stream and a state.

    Args:
        directory: a directory that `Run.create` or `onward init` made.
        loading: a context in which torch and other large libraries are imported when they are first needed. Onward
            changes no settings of the process that uses it; a program that wants those of the command line for its own
            process passes `onward.startup.large_imports`.
        place: which of several processes that train together this is (`onward.ranks.place_here`): rank 0 trains or
            watches, every other one calls `onward.following.follow`.
        start: which start of its command this is, if lost processes are started again (`onward.ranks.start_here`).

    Raises:
        UsageError: the directory is not a run.
    """

    @classmethod
    def create(
        cls,
        directory: PathLike,
        model: PathLike | None = None,
        *,
        report: Report = silent,
        loading: Loading = contextlib.nullcontext,
        later: bool = False,
        **settings: Any,
    ) -> Run:
        """Make a run. Settings are config keys: `Run.create("run", "path/to/model", batch_size=4, lora={"rank": 8})`.

        Args:
            report: receives a line when something takes long, and what the model's admission found.
            loading: as for `Run`.
            later: postpone the model's admission to the first start, which then may refuse it.

        Raises:
            ConfigError, UsageError: a setting is refused, or `directory` is a run already.
            ModelError: the base model or its tokenizer is missing or unusable, or the model cannot be proven right.
        """
        named = {} if model is None else {"model": model}
        create(RunLayout(Path(directory)), {**settings, **named}, report, loading, later=later)
        return cls(directory, loading=loading)

    @classmethod
    def adopt(
        cls,
        checkpoint: PathLike,
        directory: PathLike,
        model: PathLike | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        fresh_moments: bool = False,
        report: Report = silent,
        loading: Loading = contextlib.nullcontext,
    ) -> Run:
        """Make a run from a checkpoint of transformers' Trainer, which continues its weights, moments and step.

        Args:
            checkpoint: a `checkpoint-N` directory, LoRA (PEFT) or full.
            model: the base model, if the checkpoint does not name one that exists here.
            settings: config keys to set beyond what the checkpoint says.
            fresh_moments: take the weights alone, for a checkpoint whose optimizer is missing or of another kind.
            report: receives a line for everything that was taken over, was set or is unknown.
            loading: as for `Run`.

        Raises:
            ConfigError, UsageError: a setting is refused, it is no such checkpoint, or `directory` is in use.
            DamagedState: files of the checkpoint are missing or contradict each other.
            ModelError: the base model is missing or unusable, or cannot be proven right.
        """
        layout = RunLayout(Path(directory))
        with place_for_run(layout), defaults_of_torch():
            with loading():
                from onward.service.state.adopt import adopt

            base = None if model is None else os.fspath(model)
            for line in adopt(Path(checkpoint), layout, base, settings or {}, report, fresh_moments=fresh_moments):
                report(line)
        return cls(directory, loading=loading)

    def add(
        self, *paths: PathLike, priority: str = "normal", again: bool = False, report: Report = silent
    ) -> list[dict[str, Any]]:
        """Check files and put them in the stream, all or none; a process that trains picks them up by itself.

        Args:
            priority: `high`, `normal` or `low`.
            again: whether content that is in the stream already is trained once more.
            report: receives a line for each row that was left out.

        Returns:
            One entry per file, in order, with the keys of `onward add --json` and others that may change.

        Raises:
            FileRejected: a file was refused; its report is in `rejected/`.
            UsageError: there is no such file or no such priority.
        """
        require_priority(priority)
        with self._ledger_to_change() as ledger:
            left_out = NewNotes(ledger, ("left_out",))
            taken = self._opened(ledger).intake().take([Path(path) for path in paths], again=again, priority=priority)
            for note in left_out():
                report(note.message)
            return [asdict(row) for row in taken]

    def train(
        self,
        *paths: PathLike,
        again: bool = False,
        observe: Observe = silent,
        stop: Wishes | None = None,
        report: Report = silent,
    ) -> list[dict[str, Any]]:
        """Add files and train everything that waits, in order; return the history entries of the files done now.

        Args:
            again: as for `add`.
            observe: receives every event; what it raises is reported once, and training continues. What it sets for
                torch lasts as long as its call.
            stop: `stop.ask(reason)` ends training: the current step is finished and committed. Without one, Ctrl-C does
                that in a program that has no SIGINT handler of its own.

        Raises:
            RunLocked: another process owns the run.
            UsageError: there is no such file.
            FileRejected: a file was refused, and nothing was trained; or the guard took one back, and the others were
                trained.
            OnwardError: training cannot continue; what was committed stays.
            KeyboardInterrupt: Ctrl-C was pressed; everything that was trained is committed.
        """
        with self._working(stop, report) as (wishes, opened):
            ledger = opened.ledger
            seen, given = ledger.last_event(), client.Given(ledger, self._start, map(Path, paths), again=again)
            with (
                account(opened, wishes) as reporter,
                given.recorded() as intent,
                operate(opened, wishes, undisturbed(observe), reporter) as daemon,
            ):
                for refusal in daemon.intake.finish_left_over(intent):
                    report(f"from an earlier command: {refusal}")
                given.take(daemon.intake.take)
                daemon.run(once=True)
            require_kept(ledger, seen)
            positions = given.done()
        return [entry for entry in self.history() if entry["position"] in positions and entry["state"] == "done"]

    def watch(
        self,
        *,
        once: bool = False,
        observe: Observe = silent,
        stop: Wishes | None = None,
        report: Report = silent,
    ) -> int:
        """Train whatever arrives in the inbox and the stream, until stopped; survive every error that can be survived.

        Args:
            once: end when inbox and queue are empty.
            observe, stop, report: as for `train`.

        Returns:
            How many files were refused or quarantined while it ran, or are left in the inbox.

        Raises:
            RunLocked: another process owns the run.
            ConfigError, ModelError: the run cannot even be opened.
            DamagedState: the state cannot be trusted.
            KeyboardInterrupt: as for `train`.
        """
        with self._working(stop, report) as (wishes, opened):
            seen = opened.ledger.last_event()
            with (
                account(opened, wishes) as reporter,
                operate(opened, wishes, undisturbed(observe), reporter, watch=True) as daemon,
            ):
                daemon.run(once=once)
            return opened.ledger.count_events(seen, ("rejected", "quarantined")) + len(opened.ledger.get(STUCK, {}))

    def check_arrived(self, *, stop: Wishes | None = None) -> None:
        """Check the rows of files that arrived while another process trains; end when that process does."""
        from onward.service.intake.checker import check_arrived

        wishes = Wishes() if stop is None else stop
        with open_ledger(self.layout, wishes.waiting) as ledger:
            check_arrived(self.layout, ledger, wishes.check)

    def skip(self, file: str | int | None = None, *, reason: str | None = None, patience: float = 60.0) -> str:
        """Take the current file, or one that waits, out of the stream; the run is as if it had never begun it.

        Args:
            file: its name, position or hash prefix; None for the current one.
            reason: what the ledger and `history` give as the reason.
            patience: seconds to wait for the answer of a process that trains.

        Returns:
            What was done, in words.

        Raises:
            UsageError: no such file waits, or no file is being trained.
        """
        reason = None if reason is None else storable(reason)
        with self._ledger_to_change() as ledger:
            row = client.find_removable(self.layout, ledger, None if file is None else str(file))
            answer = client.ask_owner(self.layout, ledger, patience, Wish("skip", reason, row.id))
            if answer is not None:
                return answer
            row, reason = ledger.file(row.id), reason or "skipped by an operator"
            if row.state == "arriving":
                return self._opened(ledger).intake().withdraw(row, reason)
        with self._owned() as ledger:
            row = ledger.file(row.id)
            if row.state == "queued":
                return client.skip_queued(ledger, row, reason)
            from onward.service.owner import faults

            return faults.skip(self.layout, ledger, row, reason)

    def verify(self, *, deep: bool = False) -> Proof:
        """Check the run's proof; `deep` trains again from the last boundary in a scratch directory and compares.

        Returns:
            `proof.ok`, and `proof.checks`, each with `name`, `ok` and `detail`. A claim that does not hold is one of
            them, and is not raised.

        Raises:
            RunLocked: another process trains; a proof needs a state that does not change.
        """
        with self._owned(same_moment=False) as ledger:
            with self._loading():
                from onward.service.proof.kept import verify_and_keep

            return verify_and_keep(self.layout, ledger, deep=deep)

    def snapshot(self, target: PathLike) -> Manifest:
        """Make `target` a directory with the newest committed checkpoint, verified, while training continues.

        Its files are hard links where the file system allows: read them, but do not change them.

        Returns:
            The manifest; `manifest.step` is the global step, `manifest.size` the bytes of all files.

        Raises:
            UsageError: `target` exists already, or nothing was committed yet.
            DamagedState: the newest checkpoint is not what was committed.
            Unreadable: something cannot be read now.
        """
        with self._loading():
            from onward.service.state.reading import snapshot

        return snapshot(self.layout, Path(target))

    def rollback(self, to: str | int, *, requeue: bool = False) -> dict[str, Any]:
        """Go back to the boundary after a file (name, position or hash prefix) or at a step; later files are undone.

        Args:
            to: a number that is both a position and a step is refused; `file:4` and `step:4` say which is meant.
            requeue: whether the later files wait to be trained again.

        Returns:
            `global_step` and the names of the files that were `undone`.

        Raises:
            RunLocked: another process owns the run.
            UsageError: there is no such file, or no restore point for it.
        """
        with self._owned() as ledger:
            from onward.service.state.rollback import rollback

            return rollback(self.layout, ledger, str(to), requeue=requeue)

    def rebuild(
        self, without: str | int, *, observe: Observe = silent, stop: Wishes | None = None, report: Report = silent
    ) -> dict[str, Any]:
        """Make the run as if it had never seen a file (name, position or hash prefix): go back to before it and train
        the later ones again.

        If it is stopped or killed, `train` or `watch` continues it.

        Returns:
            `global_step`, the file that it is now `without`, and the names of those that were `queued` again.

        Raises:
            RunLocked, OnwardError, KeyboardInterrupt: as for `train`.
            UsageError: there is no such file.
        """
        from onward.service.state.rollback import leave_out

        with self._owned() as ledger:
            left_out = leave_out(self.layout, ledger, str(without))
        self.train(observe=observe, stop=stop, report=report)
        return left_out | {"global_step": self.status()["global_step"]}

    def reset(self) -> dict[str, Any]:
        """Forget all progress: remove the model and its restore points, mark every file undone.

        An adopted run is back at the step that it was adopted at.

        Returns:
            `global_step` and the names of the files that were `undone`.

        Raises:
            RunLocked: another process owns the run.
            UsageError: the adopted state is no longer kept.
        """
        with self._owned() as ledger:
            from onward.service.state.rollback import reset

            return reset(self.layout, ledger)
