"""What a daemon survives: files that cannot be trained, lack of memory, crashes, full disks, failing observers."""

from __future__ import annotations

import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import tiny
import torch
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.data.plan.loader import Batch
from onward.errors import ModelError, NothingTrained, TrainingError
from onward.events import FileDone, Note, StepTaken
from onward.service.owner import disk
from onward.service.owner.recovery import Recovery
from onward.service.wishes import Wishes
from onward.status import read_status
from onward.store.ledger import Ledger
from onward.training.steps.loss import Placed, TargetLoss
from onward.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 4,
    "save_steps": 2,
    "max_length": 256,
    "learning_rate": 1e-2,
    "settle_seconds": 0.2,
    "disk_margin_mb": 1,
    "lora": {"rank": 4, "dropout": 0.0},
}
Twin = Callable[..., Path]


@pytest.fixture(scope="module")
def ready(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three files and a run that has taken them in, to be copied."""
    folder = tmp_path_factory.mktemp("ready")
    new_run(folder / "run", model, **SETTINGS).add(*files(folder))
    return folder


@pytest.fixture
def run(tmp_path: Path, ready: Path) -> Run:
    """A run with three files in its queue."""
    return Run(shutil.copytree(ready, tmp_path, dirs_exist_ok=True) / "run")


def files(folder: Path) -> list[Path]:
    """Files of 10, 14 and 7 rows."""
    return [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (10, 14, 7)]


@pytest.fixture(scope="module")
def twin(ready: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """A function that returns a run that had only the files named."""
    folder = tmp_path_factory.mktemp("twins")

    @cache
    def made(*names: str) -> Path:
        run = new_run(folder / "-".join(names), model, **SETTINGS)
        run.train(*(ready / name for name in names))
        return run.layout.root

    return made


def states(run: Run) -> dict[str, str]:
    """States of the files by name."""
    return {entry["name"]: entry["state"] for entry in run.history()}


def fail_in(monkeypatch: pytest.MonkeyPatch, rows: int, error: Callable[[], Exception], times: int = 99) -> list[int]:
    """Make the third step of the file with this many rows fail; returns the list that counts the failures."""
    plain, failed = Trainer.take_step, list[int]()

    def take_step(self: Trainer, batch: Batch, plan: Any) -> StepTaken:
        if plan.rows == rows and self.state.cursor.step == 2 and len(failed) < times:
            failed.append(self.state.step)
            raise error()
        return plain(self, batch, plan)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    return failed


def test_a_file_that_fails_is_tried_again_then_quarantined(
    run: Run, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes back to its boundary each time; then it is taken out, with a report, and the state never had it."""
    failed = fail_in(monkeypatch, 14, lambda: TrainingError("the loss of step 6 is not finite"))
    assert 1 == run.watch(once=True)
    assert [5, 5] == failed
    assert {"10.jsonl": "done", "7.jsonl": "done", "14.jsonl": "quarantined"} == states(run)
    report = json.loads((run.layout.rejected / "14.jsonl.report.json").read_text())
    assert "the loss of step 6 is not finite" == report["problems"][0]["reason"]
    assert (run.layout.archive / "14.jsonl").read_bytes() == (run.layout.rejected / "14.jsonl").read_bytes()
    assert_same_state(twin("10.jsonl", "7.jsonl"), run.layout.root)
    assert run.verify(deep=True).ok


def test_when_all_files_fail_few_are_quarantined(run: Run, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lets file after file fail is rather the machine: the fourth one is waited for, and named by `--once`; after
    a repair it goes on as if it had not failed. A file that was trained begins the count anew.
    """
    with Ledger(run.layout.ledger) as ledger:
        ledger.put(blamed={"step": 3, "files": 2})
    with monkeypatch.context() as broken:
        fail_in(broken, 14, lambda: TypeError("an upgraded library"))
        assert 1 == run.watch(once=True)
        assert {"10.jsonl": "done", "14.jsonl": "quarantined", "7.jsonl": "done"} == states(run)
    run.add(run.layout.archive / "14.jsonl", again=True)
    with Ledger(run.layout.ledger) as ledger:
        assert {"step": 3, "files": 3} == ledger.get("blamed")
        ledger.put(blamed={"step": ledger.committed_step(), "files": 3})
    waited = list[str]()
    monkeypatch.setattr(Recovery, "outlive", lambda self, error, full: (waited.append(error.what), stop.ask("test")))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType, reportUnknownMemberType]
    stop = Wishes()
    with monkeypatch.context() as broken:
        fail_in(broken, 14, lambda: TypeError("an upgraded library"))
        with pytest.raises(NothingTrained, match="an upgraded library; the 3 files before it"):
            run.watch(once=True)
        run.watch(stop=stop)
    assert [True] == ["the cause is rather the machine" in what for what in waited]
    assert 0 == run.watch(once=True)
    assert_same_state(twin("10.jsonl", "7.jsonl", "14.jsonl"), run.layout.root)


def test_a_file_that_fails_once_is_trained_as_if_it_had_not(
    run: Run, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second try that succeeds leaves the state of a run without failure."""
    failed = fail_in(monkeypatch, 14, lambda: TrainingError("a cosmic ray"), times=1)
    assert 0 == run.watch(once=True)
    assert [5] == failed
    assert {"done"} == set(states(run).values())
    assert_same_state(twin("10.jsonl", "14.jsonl", "7.jsonl"), run.layout.root)
    assert run.verify(deep=True).ok


def test_train_lets_a_failure_end_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the foreground the first failure is raised, and nothing is retried or taken out."""
    fail_in(monkeypatch, 14, lambda: TrainingError("the loss is not finite"))
    with pytest.raises(TrainingError):
        run.train()
    assert {"10.jsonl": "done", "14.jsonl": "training", "7.jsonl": "queued"} == states(run)


def test_out_of_memory_halves_the_parts_of_a_step(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same optimizer steps in smaller parts, as the ledger records; other files keep the config's."""
    plain = TargetLoss.__call__

    def call(self: TargetLoss, batch: Batch | Placed) -> torch.Tensor:
        if isinstance(batch, Batch) and max(batch.lines) > 10 and len(batch.rows) > 1:  # the file of 14 rows
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return plain(self, batch)

    monkeypatch.setattr(TargetLoss, "__call__", call)
    assert 0 == run.watch(once=True)
    history = {entry["name"]: entry for entry in run.history()}
    assert [(3, 10), (4, 14), (2, 7)] == [
        (history[name]["steps"], history[name]["rows_trained"]) for name in ("10.jsonl", "14.jsonl", "7.jsonl")
    ]
    with Ledger(run.layout.ledger) as ledger:
        configs = [ledger.config(row.config)["gradient_accumulation"] for row in ledger.files("done")]
    assert ["auto", 4, "auto"] == configs
    assert run.verify(deep=True).ok


def test_a_row_too_large_for_memory_is_quarantined(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even one row at a time does not fit, the file is taken out."""
    fail_in(monkeypatch, 14, lambda: MemoryError("out of memory"))
    assert 1 == run.watch(once=True)
    assert {"10.jsonl": "done", "7.jsonl": "done", "14.jsonl": "quarantined"} == states(run)


def test_a_failure_of_the_machine_is_waited_out(run: Run, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no file is to blame for is shown by `status`, and training goes on from the last commit."""
    notes: list[str] = []
    fail_in(monkeypatch, 14, lambda: OSError(5, "Input/output error"), times=2)
    assert 0 == run.watch(
        once=True, observe=lambda event: notes.append(str(event)) if isinstance(event, Note) else None
    )
    assert 2 == sum("tried again in" in note for note in notes)
    assert_same_state(twin("10.jsonl", "14.jsonl", "7.jsonl"), run.layout.root)


def test_a_config_that_cannot_be_read_waits_for_a_person(run: Run, twin: Twin) -> None:
    """A config broken at a boundary fails visibly; mending it is enough."""
    text, problems = run.layout.config.read_text(), list[str]()

    def break_and_mend(event: object) -> None:
        if isinstance(event, FileDone) and event.name == "10.jsonl":
            run.layout.config.write_text(text.replace("batch_size: 4", "batch_size: many"))
        if isinstance(event, Note):
            problems.append(event.message)
            run.layout.config.write_text(text)

    assert 0 == run.watch(once=True, observe=break_and_mend)
    assert "batch_size: 'many' is refused" in problems[0]
    assert_same_state(twin("10.jsonl", "14.jsonl", "7.jsonl"), run.layout.root)


def test_a_run_that_cannot_be_opened_is_refused_at_the_start(run: Run, model: Path) -> None:
    """What the user can fix is reported at once, not retried."""
    run.layout.config.write_text(run.layout.config.read_text().replace(str(model), "/nowhere/model"))
    with pytest.raises(ModelError):
        run.watch()


@pytest.mark.parametrize(
    ("before", "others", "refused", "state"), [(0, 0, 0, "done"), (4, 2, 1, "quarantined"), (4, 3, 0, "done")]
)
def test_deaths_in_one_file_are_counted(
    run: Run, before: int, others: int, refused: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that died in a file goes on with it; the fifth death without a commit between takes the file out,
    unless that befell the three files before it, too.
    """
    monkeypatch.setattr(Recovery, "_rest", lambda self, seconds: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    stop = Wishes()
    run.train(stop=stop, observe=lambda event: stop.ask("test") if getattr(event, "step", 0) == 4 else None)
    with Ledger(run.layout.ledger) as ledger:
        row = ledger.files("training")[0]
        ledger.put(
            state="training",
            died={"step": 4, "file": row.id, "count": before},
            blamed={"step": row.start_step, "files": others},
        )
    assert refused == run.watch(once=True)
    assert {"10.jsonl": "done", "14.jsonl": state, "7.jsonl": "done"} == states(run)
    reports = [path.read_text() for path in run.layout.rejected.glob("*.report.json")]
    assert [True] * refused == ["lack of memory, as dmesg tells" in text for text in reports]
    assert run.verify().ok


@pytest.mark.parametrize("missing", [0, 1])
def test_room_is_what_is_needed_and_the_margin(run: Run, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    """A daemon waits if one byte is missing of both together, and for nothing if none is; a stop that ends the wait is
    not reported as room.
    """
    needed, usage = 1000, namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(needed + (1 << 20) - missing))
    owned = MagicMock(settings=SimpleNamespace(current=run.config), layout=run.layout, wishes=Wishes())
    disk.DiskRoom(owned, True, lambda: owned.wishes.ask("SIGTERM")).wait(needed)
    assert bool(missing) == owned.wishes.pending
    assert [] == owned.ledger.add_event.mock_calls


def test_disk_below_the_margin_pauses_and_goes_on(run: Run, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little room, the daemon pauses in the middle of a file, says so, and continues by itself."""
    usage, seen = namedtuple("usage", "total used free"), list[dict[str, Any]]()
    room = {"free": 1 << 40, "asked": 0}

    def disk_usage(_: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return usage(0, 0, 1 << 40)  # the commit behind training asks too, at any moment
        if room["free"] == 0:
            room["asked"] += 1
            if room["asked"] == 4:
                seen.append(read_status(run.layout))
                room["free"] = 1 << 40
        return usage(0, 0, room["free"])

    def fill(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 5:
            room["free"] = 0

    monkeypatch.setattr(disk.shutil, "disk_usage", disk_usage)
    assert 0 == run.watch(once=True, observe=fill)
    assert ["paused"] == [status["state"] for status in seen]
    assert 1 == len(seen)
    assert_same_state(twin("10.jsonl", "14.jsonl", "7.jsonl"), run.layout.root)


def test_an_observer_that_fails_is_dropped(run: Run) -> None:
    """Training continues without it, and the caller learns why."""

    def observe(_: object) -> None:
        raise ValueError("no terminal")

    said: list[str] = []
    assert 0 == run.watch(once=True, observe=observe, report=said.append)
    assert {"done"} == set(states(run).values())
    words = ("an observer failed; training goes on", "an observer failed 3 times in a row and gets no more events")
    assert [f"{text}: ValueError('no terminal')" for text in words] == said


def test_who_is_named_is_told(run: Run, tmp_path: Path) -> None:
    """The command of `notify` gets each event asked for as JSON; the log has every event."""
    told = tmp_path / "told"
    script = tmp_path / "tell.sh"
    script.write_text(f"#!/bin/sh\ncat >> {told}\necho >> {told}\n")
    script.chmod(0o755)
    text = run.layout.config.read_text()
    text = text.replace('command: ""', f'command: "{script}"').replace(
        'events: ["rejected", "failed", "paused"]', 'events: ["done", "rejected"]'
    )
    run.layout.config.write_text(text)
    (run.layout.inbox / "bad.jsonl").write_text("nonsense\n")
    assert 1 == run.watch(once=True)
    kinds = [json.loads(line)["kind"] for line in told.read_text().splitlines() if line]
    assert ["done", "done", "done", "rejected"] == sorted(kinds)
    log = run.layout.log.read_text()
    assert [True] * 4 == [f"{name} done" in log for name in ("10.jsonl", "14.jsonl", "7.jsonl")] + ["rejected" in log]


def test_a_notification_that_fails_is_a_line_in_the_log(run: Run) -> None:
    """A notification that fails is a line in the log, and holds up nothing."""
    text = run.layout.config.read_text().replace('command: ""', 'command: "/nowhere/tell"')
    run.layout.config.write_text(text.replace('events: ["rejected", "failed", "paused"]', 'events: ["done"]'))
    assert 0 == run.watch(once=True)
    assert {"done"} == set(states(run).values())
    assert "notify.command failed" in run.layout.log.read_text()
