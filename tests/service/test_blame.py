"""Who is blamed for a failure: the file for what its rows cause, the machine and the config for everything else."""

from __future__ import annotations

import gc
import shutil
import sqlite3
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import onward
from daemons import SETTINGS, configure, rows_file
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.data.plan.loader import Batch
from onward.errors import ConfigError, DeviceLost, NoSpace, OnwardError, TrainingError, Unreadable
from onward.events import Event, FileDone, Note, StepTaken
from onward.service.owner import daemon as daemons
from onward.service.wishes import RELEASE, Wish, Wishes
from onward.store.ledger import Ledger
from onward.training.trainer import Trainer

NAMES = ("a.jsonl", "b.jsonl", "c.jsonl")


@pytest.fixture(scope="module")
def ready(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three files and a run that has taken them in, to be copied."""
    folder = tmp_path_factory.mktemp("ready")
    files = [rows_file(folder / name, rows) for name, rows in zip(NAMES, (4, 6, 3), strict=True)]
    new_run(folder / "run", model, **SETTINGS).add(*files)
    return folder


@pytest.fixture
def run(tmp_path: Path, ready: Path) -> Run:
    """A run with three files in its queue: 2, 3 and 2 steps."""
    return Run(shutil.copytree(ready, tmp_path, dirs_exist_ok=True) / "run")


def fail_in(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], times: int = 99) -> list[int]:
    """Make the second step of the file of 6 rows fail; returns the list that counts the failures."""
    plain, failed = Trainer.take_step, list[int]()

    def take_step(self: Trainer, batch: Batch, plan: Any) -> StepTaken:
        if plan.rows == 6 and self.state.cursor.step == 1 and len(failed) < times:
            failed.append(self.state.step)
            raise error()
        return plain(self, batch, plan)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    return failed


def states(run: Run) -> dict[str, str]:
    """States of the files by name."""
    return {entry["name"]: entry["state"] for entry in run.history()}


def noted(observed: list[str]) -> Callable[[Event], None]:
    """Return an observer that keeps what notes say."""
    return lambda event: observed.append(event.message) if isinstance(event, Note) else None


LAST = "<|last|>"


def embedded(folder: Path, *, without: int) -> Path:
    """Save a tiny model whose embedding lacks this many of its tokenizer's tokens, `LAST` being the first to go."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny.byte_tokenizer(extra=[LAST])
    config = GPT2Config(vocab_size=len(tokenizer) - without, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_that_the_model_cannot_take(tmp_path: Path) -> None:
    """A row with a token that the model has not puts its file into quarantine; the others are trained."""
    base = embedded(tmp_path / "base", without=0)
    settings: dict[str, Any] = {**SETTINGS, "max_length": 64, "method": "full"}
    run = Run.create(tmp_path / "run", str(base), **settings)
    for name, text in zip(NAMES, ("one", f"a text with {LAST}", "another"), strict=True):
        run.add(tiny.write_jsonl(tmp_path / name, [{"text": text}]))
    embedded(base, without=1)  # what `add` could not know
    with pytest.raises(TrainingError, match=r"b.jsonl cannot be trained: IndexError: index out of range") as refused:
        run.train()
    assert "onward skip file:2 takes the file out" in str(refused.value)
    told: list[str] = []
    assert 1 == run.watch(once=True, observe=noted(told))
    assert {"a.jsonl": "done", "b.jsonl": "quarantined", "c.jsonl": "done"} == states(run)
    tried, taken_out = (note for note in told if note.startswith("b.jsonl"))
    assert "b.jsonl failed and is tried again (1 of 1): IndexError" in tried
    assert "b.jsonl quarantined (rejected/b.jsonl.report.json): IndexError" in taken_out
    assert (run.layout.rejected / "b.jsonl.report.json").is_file()
    assert run.verify(deep=True).ok
    run.add(tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": "long " * 20}]))
    config = run.layout.config.read_text()
    run.layout.config.write_text(config.replace("max_length: 64", "max_length: 65"))
    with pytest.raises(ConfigError, match="max_length is 65, the model has learned 64 positions"):
        run.train()  # the config is to blame for rows of 65 tokens, not the file
    run.layout.config.write_text(config)
    assert ["d.jsonl"] == [file["name"] for file in run.train()]


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        sqlite3.OperationalError("disk I/O error"),
        NoSpace("the disk has no room"),
        Unreadable("it cannot be read"),
        ConfigError("the config does not allow this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_machine_and_the_config_are_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A file in whose step the machine failed is no failure of the file, which is not even counted."""
    failed = fail_in(monkeypatch, lambda: error, times=1)
    told: list[str] = []
    assert 0 == run.watch(once=True, observe=noted(told))
    assert ({"done"}, 1) == (set(states(run).values()), len(failed))
    assert [True] == [note.endswith("(failure 1 in a row)") for note in told]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), ImportError("no such kernel")])
def test_a_model_that_cannot_be_loaded(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What happens before a file's first step is not the file's: `watch` waits for it, `train` says it in words."""
    plain, failures = daemons.load_start, [error, error]

    def load_start(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return plain(*arguments)

    monkeypatch.setattr(daemons, "load_start", load_start)
    outcome = onward("train", "--run", run.layout.root)
    assert (1, True) == (outcome.status, "onward: training cannot go on: " in outcome.err)
    assert "Traceback" not in outcome.err
    assert 0 == run.watch(once=True)
    assert {"done"} == set(states(run).values())


@pytest.mark.parametrize("error", [IndexError("index out of range"), RuntimeError("a shape"), KeyError("x")])
def test_train_says_in_words_what_a_step_raised(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whatever a step raises is a line with the file and the way out, and exit status 1."""
    fail_in(monkeypatch, lambda: error)
    outcome = onward("train", "--run", run.layout.root)
    assert (1, True) == (outcome.status, "onward: b.jsonl cannot be trained: " in outcome.err)
    assert "onward skip file:2" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_lost_device_ends_the_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost GPU is not tried again in the same process; each end counts as a death in the file, up to five."""
    failed = fail_in(monkeypatch, lambda: RuntimeError("CUDA error: device-side assert triggered"))
    for _ in range(2):
        with pytest.raises(DeviceLost, match="CUDA error: device-side assert triggered"):
            run.watch(once=True)
    assert 2 == len(failed)
    assert "the GPU was lost to this process" in run.status()["problem"]
    with Ledger(run.layout.ledger) as ledger:
        died = ledger.get("died")
        assert ("training", 1) == (ledger.get("state"), died["count"])
        ledger.put(died={**died, "count": 4})
    outcome = onward("train", "--run", run.layout.root)
    assert (1, True) == (outcome.status, "onward: the GPU was lost to this process: CUDA error" in outcome.err)
    with Ledger(run.layout.ledger) as ledger:
        ledger.put(died={**died, "count": 4})
    assert 1 == run.watch(once=True)
    assert {"a.jsonl": "done", "b.jsonl": "quarantined", "c.jsonl": "done"} == states(run)


def test_the_end_of_a_schedule_is_no_fault_of_a_file(run: Run) -> None:
    """Beyond `total_steps` nothing is refused: the daemon says so, waits, and continues once the config is fixed."""
    configure(run, schedule="linear", total_steps=2, warmup_steps=1)
    outcome = onward("train", "--run", run.layout.root)
    assert (2, True) == (outcome.status, "Set schedule: constant and learning_rate: 0.001" in outcome.err)
    seen: list[Any] = []

    def mend(event: Event) -> None:
        if isinstance(event, Note) and "ends at step 2" in event.message:
            seen.append((run.status()["state"], event.message in run.status()["problem"], states(run)))
            configure(run, schedule="constant", total_steps=None, learning_rate=1e-3)

    assert 0 == run.watch(once=True, observe=mend)
    assert [("failed", True, {"a.jsonl": "done", "b.jsonl": "queued", "c.jsonl": "queued"})] == seen
    assert {"done"} == set(states(run).values())
    assert [] == list(run.layout.rejected.iterdir())


def test_a_config_that_refuses_an_accepted_file(run: Run) -> None:
    """A file whose rows the config no longer admits waits for the config."""
    configure(run, max_length=8, over_length="reject")

    def mend(event: Event) -> None:
        if isinstance(event, Note) and "tried again in" in event.message:
            configure(run, max_length=256, over_length="truncate")

    outcome = onward("train", "--run", run.layout.root)
    assert (2, True) == (outcome.status, "onward skip a.jsonl" in outcome.err)
    assert 0 == run.watch(once=True, observe=mend)
    assert {"done"} == set(states(run).values())


def test_a_stop_ends_a_daemon_that_cannot_begin(run: Run) -> None:
    """A wish made while nothing works ends the waiting, is obeyed, and does not make it try again and again."""
    run.layout.boundaries.rmdir()
    run.layout.boundaries.symlink_to(run.layout.boundaries)  # cannot be listed
    stop, told = Wishes(), list[str]()

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            told.append(event.message)
            stop.ask("test")
            if len(told) > 20:
                run.layout.boundaries.unlink(missing_ok=True)

    assert 0 == run.watch(stop=stop, observe=observe)
    assert 1 == len(told)
    assert "it cannot be read" in told[0]


def test_a_failed_step_leaves_no_model_in_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a daemon has taken a file back, model and optimizer are gone while the process lives."""
    held: list[weakref.ref[Any]] = []
    plain = Trainer.take_step

    def take_step(self: Trainer, batch: Batch, plan: Any) -> StepTaken:
        if plan.rows == 6 and self.state.cursor.step == 1:
            held.extend([weakref.ref(self.state.model), weakref.ref(self.state.optimizer)])
            raise TrainingError("the loss is not finite")
        return plain(self, batch, plan)

    left: list[bool] = []

    def look(event: Event) -> None:
        if isinstance(event, Note) and event.message.startswith("b.jsonl"):
            gc.collect()
            left.extend(reference() is not None for reference in held)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    assert 1 == run.watch(once=True, observe=look)
    assert [False] * 6 == left  # of one try, then of two


def test_a_released_pause_leaves_no_model_in_memory(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pause --release` frees the model; a resume loads it again and loses nothing."""
    held: list[weakref.ref[Any]] = []
    plain = Trainer.take_step

    def take_step(self: Trainer, batch: Batch, plan: Any) -> StepTaken:
        held[:] = [weakref.ref(self.state.model), weakref.ref(self.state.optimizer)]
        return plain(self, batch, plan)

    wishes, left = Wishes(), list[bool]()

    def observe(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 3:
            wishes.put(Wish("pause", RELEASE))
        if isinstance(event, Note) and event.message == "paused by an operator at step 3":
            gc.collect()
            left.extend(reference() is not None for reference in held)
            wishes.put(Wish("resume"))
        if isinstance(event, FileDone) and event.name == NAMES[-1]:
            wishes.ask("test")

    monkeypatch.setattr(Trainer, "take_step", take_step)
    run.watch(stop=wishes, observe=observe)
    assert [False, False] == left
    twin = new_run(run.layout.root.parent / "twin", model, **SETTINGS)
    twin.train(*(run.layout.root.parent / name for name in NAMES))
    assert_same_state(twin.layout.root, run.layout.root)


def test_an_error_that_is_none_of_these_is_still_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library raises an error of Onward for what it cannot name, with the line of code that raised it."""

    def load_start(*_: Any) -> Any:
        raise AttributeError("a mistake")

    monkeypatch.setattr(daemons, "load_start", load_start)
    with pytest.raises(OnwardError, match="training cannot go on: AttributeError: a mistake") as raised:
        run.train()
    assert "test_blame.py, line " in str(raised.value.where)
