"""Keys that act at once act in a process that runs; a config that is broken meanwhile changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from daemons import SETTINGS, configure, done, rows_file
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.config import known_keys
from onward.config.keys import OPERATION_KEYS, START_KEYS, acts
from onward.data.plan.loader import Batch
from onward.errors import ConfigError, TrainingError
from onward.events import Committed, Event, FileStarted, Note, StepTaken
from onward.progress import PlainLines
from onward.training.trainer import Trainer

STEPS = 10
"""Steps of the file in which the config is changed."""


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run with one file in its queue."""
    made = new_run(tmp_path / "run", model, **SETTINGS)
    made.add(rows_file(tmp_path / "a.jsonl", 2 * STEPS))
    return made


def step(number: int) -> Callable[[Event], bool]:
    """Return whether an event is this step."""
    return lambda event: isinstance(event, StepTaken) and event.step == number


def watch(run: Run, *acts: tuple[Callable[[Event], bool], Callable[[], object]]) -> list[Event]:
    """Watch a run to the end of its queue; at the first event of each kind something is done. Returns the events."""
    events, left = list[Event](), list(acts)

    def observe(event: Event) -> None:
        events.append(event)
        for act in tuple(left):
            if act[0](event):
                left.remove(act)
                act[1]()

    assert 0 == run.watch(once=True, observe=observe)
    assert [] == left
    return events


def test_save_steps(run: Run) -> None:
    """Commits come more often from the next step on."""
    configure(run, save_steps=100)
    events = watch(run, (step(4), lambda: configure(run, save_steps=1)))
    assert [*range(4, STEPS + 1)] == [event.step for event in events if isinstance(event, Committed) and event.step]


def test_what_is_kept(run: Run, model: Path, tmp_path: Path) -> None:
    """Restore points beyond a lower number are removed at the next commit."""
    files = [rows_file(tmp_path / f"{name}.jsonl", 4, seed=seed) for seed, name in enumerate("bcd")]
    twin = new_run(tmp_path / "twin", model, **SETTINGS, keep_boundaries=1, keep_days=0)
    twin.train(tmp_path / "a.jsonl", *files)
    for file in files:
        run.add(file)
    is_last = lambda event: isinstance(event, FileStarted) and event.name == "d.jsonl"  # noqa: E731
    watch(run, (is_last, lambda: configure(run, keep_boundaries=1, keep_days=0)))
    expected = [point.name for point in twin.layout.restore_points()]
    assert expected == [point.name for point in run.layout.restore_points()]


def test_settle_seconds(run: Run, tmp_path: Path) -> None:
    """A file that was to stand still for ten minutes is taken once it need not."""
    configure(run, settle_seconds=600.0)
    tiny.write_jsonl(run.layout.inbox / "b.jsonl", tiny.chat_rows(2, seed=2))
    watch(run, (step(STEPS), lambda: configure(run, settle_seconds=0.1)))
    assert ["a.jsonl", "b.jsonl"] == done(run)


def test_disk_margin_mb(run: Run) -> None:
    """Training pauses for a margin that the disk does not have, and continues for one that it has."""
    is_full = lambda event: isinstance(event, Note) and event.message.startswith("the disk is too full")  # noqa: E731
    watch(
        run,
        (step(2), lambda: configure(run, disk_margin_mb=10**9)),
        (is_full, lambda: configure(run, disk_margin_mb=1)),
    )
    assert ["a.jsonl"] == done(run)


def test_compress_archive(run: Run) -> None:
    """The current file is compressed when it is done."""
    watch(run, (step(2), lambda: configure(run, compress_archive=True)))
    assert ["a.jsonl.zst"] == [path.name for path in run.layout.archive.iterdir()]


def test_notify(run: Run, tmp_path: Path) -> None:
    """Those added to `notify` while a file is trained are notified that it is done."""
    told, script = tmp_path / "told", tmp_path / "tell.sh"
    script.write_text(f"#!/bin/sh\ncat > {told}\n")
    script.chmod(0o755)
    watch(run, (step(2), lambda: configure(run, notify={"command": str(script), "events": ["done"]})))
    assert "done" == json.loads(told.read_text())["kind"]


def test_retries(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that fails is not tried again once the config says so."""
    failed: list[int] = []

    def take_step(self: Trainer, batch: Batch, plan: Any) -> StepTaken:
        del batch, plan
        failed.append(self.state.step)
        configure(run, retries=0)
        raise TrainingError("the loss is not finite")

    configure(run, retries=9)
    monkeypatch.setattr(Trainer, "take_step", take_step)
    assert 1 == run.watch(once=True)
    assert [0] == failed


def test_log_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines come as often as the config says now; while it is broken, as often as it said last."""
    every: list[int] = [2]

    def read() -> int:
        if not every:
            raise ConfigError("the config is refused")
        return every[0]

    show = PlainLines(read)
    for number in range(1, 13):
        if number == 5:
            every[0] = 3
        if number == 10:
            every.clear()
        show(StepTaken(number, number, 99, 0, 1, "d", 1, 1, 0.5, 0.1, 1.0, 1.0))
    assert [2, 4, 6, 9, 12] == [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()]


def test_a_config_that_is_broken_meanwhile(run: Run, model: Path, tmp_path: Path) -> None:
    """It is reported once and shown with the state until it is fixed; the config read before stays in force."""
    text, seen = run.layout.config.read_text(), list[Any]()

    def look() -> None:
        status = run.status()
        seen.append((status["state"], "batch_size: 'many' is refused" in (status["problem"] or "")))

    events = watch(
        run,
        (step(2), lambda: run.layout.config.write_text(text.replace("batch_size: 2", "batch_size: many"))),
        (step(4), look),
        (step(6), lambda: run.layout.config.write_text(text)),
        (step(8), look),
    )
    assert [("training", True), ("training", False)] == seen
    notes = [event.message for event in events if isinstance(event, Note)]
    assert ["the config is refused; the earlier config stays in force: "] == [
        note.partition("batch_size")[0] for note in notes
    ]
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    twin.train(tmp_path / "a.jsonl")
    assert_same_state(twin.layout.root, run.layout.root)


def test_every_key_acts_at_one_time() -> None:
    """The page about the config says of every key when a change of it acts."""
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
    for key in known_keys():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
        assert acts(key) == row.split(" | ")[-1].removesuffix(" |"), key
    at_once = {key.partition(".")[0] for key in known_keys() if acts(key) == "at once"}
    assert set(OPERATION_KEYS) == at_once | set(START_KEYS)
    assert set(START_KEYS) == {key for key in known_keys() if acts(key) == "at the next start"}
