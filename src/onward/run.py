"""The library: a run as an object. The command line does nothing that this cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward import status
from onward.config import Config, parse_config, read_config, render_yaml
from onward.errors import DamagedState, UsageError
from onward.events import Observe
from onward.layout import RunLayout
from onward.service.holder import is_held
from onward.service.lock import RunLock
from onward.service.owner.control import AFTER_FILE, RELEASE, expire_requests, request
from onward.service.owner.process import OpenedRun, account
from onward.service.stop import StopRequest
from onward.store.ledger import Ledger, make_ledger
from onward.store.lookup import find_file

if TYPE_CHECKING:
    from onward.service.proof.verify import Proof

PathLike = str | os.PathLike[str]


def _silent(_: Any) -> None:
    return None


class Run:
    """One run: a directory with a base model, a config, a stream and a state.

    Args:
        directory: a directory that `Run.create` or `onward init` made.

    Raises:
        UsageError: there is no run in it.
    """

    def __init__(self, directory: PathLike = ".") -> None:
        self.layout = RunLayout(Path(directory))
        self.layout.require()

    @classmethod
    def create(
        cls,
        directory: PathLike,
        model: str | None = None,
        *,
        report: Callable[[str], None] = _silent,
        **settings: Any,
    ) -> Run:
        """Make a run. Settings are config keys: `Run.create("run", "path/to/model", batch_size=4, lora={"rank": 8})`.

        Raises:
            ConfigError: a setting is refused.
            ModelError: the base model cannot be had.
            UsageError: there is a run in `directory` already.
        """
        values: dict[str, Any] = {**settings, **({"model": model} if model is not None else {})}
        layout = RunLayout(Path(directory))
        _refuse_occupied(layout)
        if layout.config.exists() and values:
            hint = "Leave the settings out to use it, or remove it."
            raise UsageError("there is a config in this directory already", where=layout.config, hint=hint)
        config = read_config(layout.config) if layout.config.exists() else parse_config(values)
        _create(layout, config, report)
        return cls(directory)

    @classmethod
    def adopt(
        cls,
        checkpoint: PathLike,
        directory: PathLike,
        model: str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = _silent,
    ) -> Run:
        """Make a run from a checkpoint of transformers' Trainer: weights, moments and step go on.

        Args:
            checkpoint: a `checkpoint-N` directory, LoRA (PEFT) or full.
            model: the base model, where the checkpoint does not name one that is here.
            settings: config keys to set beyond what the checkpoint says.
        """
        from onward.service.state.adopt import adopt

        layout = RunLayout(Path(directory))
        _refuse_occupied(layout)
        adopt(Path(checkpoint), layout, model, settings or {}, report)
        return cls(directory)

    @property
    def config(self) -> Config:
        """The config as it stands in the run's directory."""
        return read_config(self.layout.config)

    def add(self, *paths: PathLike, priority: str = "normal", again: bool = False) -> list[dict[str, Any]]:
        """Check files and put them in the stream, all or none; a process that trains takes them up by itself.

        Raises:
            FileRejected: a file was refused; its report is in `rejected/`.
        """
        from onward.service.intake.inbox import PRIORITIES

        if priority not in PRIORITIES:
            raise UsageError(
                f"there is no priority {priority!r}", where="priority", hint=f"One of: {', '.join(PRIORITIES)}"
            )
        with self._ledger() as ledger:
            opened = OpenedRun(self.layout, ledger, _silent)
            taken = opened.intake().take([Path(path) for path in paths], again=again, priority=priority)
            return [asdict(row) for row in taken]

    def train(
        self,
        *paths: PathLike,
        again: bool = False,
        observe: Observe = _silent,
        stop: StopRequest | None = None,
        report: Callable[[str], None] = _silent,
    ) -> list[dict[str, Any]]:
        """Add files and train what the stream owes, in order; returns the history entries of files done now.

        Args:
            observe: receives every event; one that raises is dropped, and training goes on.
            stop: ask it to stop; the step in hand is finished and committed.

        Raises:
            RunLocked: another process owns the run.
            FileRejected: a file was refused; nothing was trained.
            OnwardError: training cannot go on; what was committed stays.
        """
        stop = StopRequest() if stop is None else stop
        with self._owned() as ledger:
            given = [Path(path) for path in paths]
            intent = ledger.add_intent(given, again=again, priority=0) if given else None
            before = {row.id for row in ledger.files("done")}
            opened = OpenedRun(self.layout, ledger, report)
            with account(ledger), opened.operate(stop, observe) as daemon:
                intake = opened.intake(stop.check)
                for refusal in intake.finish_left_over(intent):
                    report(f"handed over earlier: {refusal}")
                if given:
                    intake.take(given, again=again, intent=intent)
                daemon.run(once=True)
            positions = {row.position for row in ledger.files("done") if row.id not in before}
        return [entry for entry in self.history() if entry["position"] in positions and entry["state"] == "done"]

    def watch(
        self,
        *,
        once: bool = False,
        observe: Observe = _silent,
        stop: StopRequest | None = None,
        report: Callable[[str], None] = _silent,
    ) -> int:
        """Train whatever arrives in the inbox and the stream, until stopped; outlive what can be outlived.

        Args:
            once: end when inbox and queue are empty.
            observe, stop, report: as for `train`.

        Returns:
            How many files were refused or quarantined meanwhile.

        Raises:
            RunLocked: another process owns the run.
            ConfigError, ModelError: the run cannot even be opened.
            DamagedState: the state cannot be trusted.
        """
        stop = StopRequest() if stop is None else stop
        with self._owned() as ledger:
            seen = ledger.last_event()
            opened = OpenedRun(self.layout, ledger, report)
            with account(ledger), opened.operate(stop, observe, watch=True) as daemon:
                daemon.run(once=once)
            return ledger.count_events(seen, ("rejected", "quarantined"))

    def check_arrived(self, *, stop: StopRequest | None = None) -> None:
        """Check the rows of files that arrived, while another process trains; end when that process does."""
        from onward.service.intake.checker import check_arrived

        stop = StopRequest() if stop is None else stop
        with self._ledger() as ledger:
            check_arrived(self.layout, ledger, stop.check)

    def pause(self, *, release: bool = False, patience: float = 60.0) -> str:
        """Ask the process that trains to hold still after its step; `release` gives the model's memory back.

        Without such a process the pause is noted, and the next `watch` begins paused.
        """
        with self._ledger() as ledger:
            if not is_held(self.layout.lock):
                ledger.put(paused={"release": release}, state="paused")
                return "no process works on this run; the next onward watch begins paused"
            return request(self.layout, ledger, "pause", RELEASE if release else None, patience=patience)

    def resume(self, *, patience: float = 60.0) -> str:
        """Ask a paused process to go on."""
        with self._ledger() as ledger:
            if not is_held(self.layout.lock):
                was_paused = ledger.get("paused") is not None
                ledger.put(paused=None, state="stopped" if ledger.next_owed() else "idle")
                return "no longer paused; onward watch goes on" if was_paused else "it was not paused"
            return request(self.layout, ledger, "resume", patience=patience)

    def stop(self, *, after_file: bool = False, patience: float = 600.0) -> str:
        """Ask the process that trains to commit and end, now or at the next boundary."""
        with self._ledger() as ledger:
            if not is_held(self.layout.lock):
                return "no process works on this run"
            until = (lambda: False) if after_file else (lambda: not is_held(self.layout.lock))
            argument = AFTER_FILE if after_file else None
            return request(self.layout, ledger, "stop", argument, patience=patience, until=until)

    def skip(self, file: str | None = None, *, reason: str | None = None, patience: float = 60.0) -> str:
        """Take the file in hand, or a waiting one, out of the stream; the run is as if it had never begun it.

        Raises:
            UsageError: no such file waits, or none is in hand.
        """
        with self._ledger() as ledger:
            row = find_file(ledger, file, "queued", "training") if file else next(iter(ledger.files("training")), None)
            if row is None:
                hint = "onward skip FILE takes a waiting one out; onward rebuild --without FILE a finished one."
                raise UsageError("no file is being trained", where=self.layout.root.absolute(), hint=hint)
            if row.state == "training" and is_held(self.layout.lock):
                return request(self.layout, ledger, "skip", reason, patience=patience)
        with self._owned() if row.state == "training" else self._ledger() as ledger:
            from onward.service.owner.faults import skip

            return skip(self.layout, ledger, ledger.file(row.id), reason or "skipped by an operator")

    def status(self) -> dict[str, Any]:
        """Return where the run stands (keys as in `onward status --json`)."""
        return status.read_status(self.layout)

    def history(self) -> list[dict[str, Any]]:
        """Return one entry per file (keys as in `onward history --json`)."""
        return status.read_history(self.layout)

    def verify(self, *, deep: bool = False) -> Proof:
        """Check the run's proof; `deep` trains again from the last boundary in a scratch directory and compares.

        Raises:
            RunLocked: another process trains; a proof needs a state that stands still.
        """
        with self._owned() as ledger:
            from onward.service.proof.verify import verify

            return verify(self.layout, ledger, deep=deep)

    def rollback(self, to: str | int, *, requeue: bool = False) -> dict[str, Any]:
        """Go back to the boundary after a file (name, position or hash prefix) or at a step; later files are undone.

        Raises:
            UsageError: there is no such file, or no restore point for it.
        """
        with self._owned() as ledger:
            from onward.service.state.rollback import rollback

            return rollback(self.layout, ledger, str(to), requeue=requeue)

    def rebuild(
        self,
        without: str,
        *,
        observe: Observe = _silent,
        stop: StopRequest | None = None,
        report: Callable[[str], None] = _silent,
    ) -> dict[str, Any]:
        """Make the run as if it had never seen a file: go back to before it and train the later ones again.

        Stopped or killed, `train` or `watch` goes on with it.

        Raises:
            UsageError: no such file.
        """
        from onward.service.state.rollback import leave_out

        with self._owned() as ledger:
            result = leave_out(self.layout, ledger, without)
        self.train(observe=observe, stop=stop, report=report)
        return {**result, "global_step": self.status()["global_step"]}

    def reset(self) -> dict[str, Any]:
        """Forget all progress: remove the model and its restore points, mark every file undone.

        An adopted run begins again at its base model, not at the checkpoint that was adopted.
        """
        with self._owned() as ledger:
            from onward.service.state.rollback import reset

            return reset(self.layout, ledger)

    @contextlib.contextmanager
    def _owned(self) -> Generator[Ledger]:
        with self._ledger() as ledger:
            asked = ledger.last_request()  # what is asked from here on is asked of this process
            with RunLock(self.layout.lock):
                expire_requests(ledger, asked)
                yield ledger

    def _ledger(self) -> Ledger:
        ledger = Ledger(self.layout.ledger)
        if ledger.get("run") is None:
            ledger.close()
            raise DamagedState(
                "the ledger is empty",
                where=self.layout.ledger,
                hint="Put it back from a copy. If nothing was trained here: remove it, then onward init",
            )
        return ledger


def _refuse_occupied(layout: RunLayout) -> None:
    if layout.ledger.exists():
        hint = f"onward status --run {layout.root}; for another run name another directory."
        raise UsageError("there is a run in this directory already", where=layout.root.absolute(), hint=hint)
    if layout.checkpoints() or layout.restore_points():
        hint = f"onward adopt {layout.root}/current_model/checkpoint-N --run NEW_RUN makes a run of it."
        raise UsageError("this directory holds a model without its ledger", where=layout.root.absolute(), hint=hint)
    if layout.root.exists() and not layout.root.is_dir():
        raise UsageError("this is a file, not a directory", where=layout.root.absolute())


def _create(layout: RunLayout, config: Config, report: Callable[[str], None]) -> None:
    """Find the base model first, so that a refusal leaves nothing behind; the ledger last, so that it makes the run."""
    from onward.training.base import require_complete, resolve_base, with_absolute_path

    base = resolve_base(config.model, download=True, report=report)
    require_complete(base)
    config = with_absolute_path(config, base)
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.make()
        if not layout.config.exists():
            layout.config.write_text(render_yaml(config), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the run cannot be made: {error.strerror}", where=layout.root.absolute()) from None
    make_ledger(layout.ledger)
