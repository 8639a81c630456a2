"""What doctor finds before it matters, and who may look at a run."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daemons import configure
from examined import findings
from filelock import FileLock
from users import NOBODY, OPEN, as_nobody, let_others_reach

from onward import Run
from onward.layout import RunLayout
from onward.service.holder import is_held
from onward.service.lock import RunLock
from onward.service.proof.doctor import machine, process
from onward.service.proof.doctor.examination import examine
from onward.status import read_history, read_status
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord, TrackerRow

FILE: dict[str, Any] = {
    "command": "c", "sha256": "0" * 64, "bytes": 1, "format": "jsonl", "copy": "archive/a", "again": 0, "priority": 0,
    "rows": 1, "tokens": 1, "target_tokens": 1, "truncated": 0, "dropped": 0,
}  # fmt: skip


def test_a_sound_run_has_no_findings(layout: RunLayout) -> None:
    """Everything is `ok` where nothing is wrong."""
    allowed = {"dtype", "disk"}  # what this machine may lack
    assert [] == [entry for entry in examine(layout) if entry.level != "ok" and entry.subject not in allowed]


def test_a_changed_identity_key_is_shown_with_both_values(layout: RunLayout) -> None:
    """A locked key that the config changed is an error before the next start refuses it; a config that is refused is
    told once, not under each check that needs it.
    """
    configure(Run(layout.root), seed=7, learning_rate=0.5)
    (found,) = findings(layout, "identity")
    assert ("error", "locked keys were changed: seed: the run has 0, the config says 7") == (found.level, found.message)
    layout.config.write_text("batch_size: four")
    assert ["config"] == [found.subject for found in examine(layout) if "batch_size" in found.message]


def test_a_base_under_another_name_is_the_same(layout: RunLayout, model: Path, tmp_path: Path) -> None:
    """Its content counts, not where it lies."""
    configure(Run(layout.root), model=str(shutil.copytree(model, tmp_path / "moved")))
    (found,) = findings(layout, "base model")
    assert (["ok"], []) == ([found.level], findings(layout, "identity"))


@pytest.mark.parametrize(
    ("processors", "threads", "words"),
    [
        (None, 64, None), (2.0, 2, None), (1.5, 2, None),
        (1.5, 3, ("the time of 1.5 processors", "OMP_NUM_THREADS=2")),
        (1.0, 8, ("the time of 1 processor", "OMP_NUM_THREADS=1")),
        (0.25, 2, ("the time of 0.25 processors", "OMP_NUM_THREADS=1")),
    ],
)  # fmt: skip
def test_more_threads_than_processors_are_warned_of(
    processors: float | None, threads: int, words: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a control group gives less time than there are processors, threads wait for each other."""
    monkeypatch.setattr(machine, "read_processors", lambda: processors)
    monkeypatch.setattr(machine, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = [*machine.check_threads()]
    assert ["warning"] * (words is not None) == [finding.level for finding in found]
    for finding in found:
        assert finding.message == f"PyTorch computes with {threads} threads; a control group gives them {words[0]}"  # type: ignore[index]
        assert str(finding.hint).startswith(f"Set {words[1]}, from a run's first file on")  # type: ignore[index]


def test_a_paused_run_has_not_failed(layout: RunLayout) -> None:
    """A pause is named as a pause, a failure as the last failure."""
    with Ledger(layout.ledger) as ledger:
        ledger.put(paused={"release": False}, state="paused", problem="paused by an operator; onward resume goes on")
    assert [("ok", "onward resume goes on")] == [(entry.level, entry.hint) for entry in findings(layout, "paused")]
    assert [] == findings(layout, "last failure")
    with Ledger(layout.ledger) as ledger:
        ledger.put(paused=None, state="failed", problem="no memory")
    assert [("warning", "no memory")] == [(entry.level, entry.message) for entry in findings(layout, "last failure")]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"state": "failed", "problem": None}, []), ({"state": "idle", "problem": None}, []),
        ({"state": "failed", "problem": "no memory"}, [("warning", "last failure", "no memory")]),
        ({"state": "paused", "problem": "the disk is full"}, [("warning", "paused", "the disk is full")]),
    ],
)  # fmt: skip
def test_who_owns_a_run_and_what_keeps_it_from_going_on(
    facts: dict[str, Any], expected: list[tuple[str, str, str]], layout: RunLayout
) -> None:
    """The owner by its name, as far as it is known, and the problem of the ledger with its state."""
    with Ledger(layout.ledger) as ledger:
        ledger.put(**facts)

    def seen() -> list[tuple[str, str, str]]:
        return [(found.level, found.subject, found.message) for found in process.check_owner(layout)]

    assert expected == seen()
    with RunLock(layout.lock):
        assert [*expected, ("ok", "lock", f"held by pid {os.getpid()} on {socket.gethostname()}")] == seen()
        layout.lock.with_name(".lock.holder").unlink()
        assert [*expected, ("ok", "lock", "held")] == seen()


def test_how_far_trackers_are(layout: RunLayout) -> None:
    """Those that the config names, told to or not, and which of them fail."""
    assert [] == [*process.check_trackers(layout)]
    configure(Run(layout.root), track=["wandb", "mlflow", "tensorboard"])
    with Ledger(layout.ledger) as ledger:
        for name, step, problem in (("wandb", 7, "no route"), ("tensorboard", -1, None), ("trackio", 3, "unknown")):
            ledger.keep_tracker(TrackerRow(name, None, step, 0, 0, 0, 0, problem, 0.0))
    failing, told = process.check_trackers(layout)
    assert ("warning", "tracker wandb", "no route") == (failing.level, failing.subject, failing.message)
    assert ("ok", "sent so far: wandb: step 7, mlflow: nothing yet, tensorboard: step 0") == (told.level, told.message)


def test_a_file_that_ends_its_checker_is_named(layout: RunLayout) -> None:
    """A file whose checking was begun and never ended is named, with the command that takes it out.

    While a process checks files, one beginning may be its own.
    """
    with Ledger(layout.ledger) as ledger:
        for name, attempts in (("it's.jsonl", 3), ("another.jsonl", 1)):
            ledger.insert_file(**FILE, name=name, state="arriving", attempts=attempts)
    with FileLock(layout.intake_lock):
        (found,) = process.check_queue(layout)
    assert "checking it's.jsonl was begun 2 times and never finished" == found.message
    found, other = process.check_queue(layout)
    assert "checking another.jsonl was begun 1 time and never finished" == other.message
    assert "checking it's.jsonl was begun 3 times and never finished" == found.message
    assert """onward skip 'it'"'"'s.jsonl' takes it out""" == found.hint


def test_little_room_is_warned_of_before_training_pauses(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the next checkpoint with its margin there must be room, for all that is kept and two gigabytes should be."""
    needed = sum(path.stat().st_size for path in layout.checkpoints()[0].iterdir())
    configure(Run(layout.root), disk_margin_mb=3, keep_boundaries=4, keep_days=2)
    least, kept, little = needed + (3 << 20), (4 + 1 + 2) * needed, machine.LITTLE_DISK

    def level(free: int) -> str:
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        found = next(machine.check_disk(layout))
        sizes = f"a checkpoint takes {needed / 1e6:.0f} MB, restore points up to {kept / 1e6:.0f} MB"
        assert f"{free / 1e9:.1f} GB free; {sizes}" == found.message
        return found.level

    assert ["error", "warning", "warning", "ok"] == [level(free) for free in (least - 1, least, little, little + 1)]
    monkeypatch.setattr(machine, "LITTLE_DISK", 0)
    configure(Run(layout.root), disk_margin_mb=0)
    assert ["error", "warning", "warning", "ok"] == [level(free) for free in (needed - 1, needed, kept, kept + 1)]


@pytest.mark.parametrize(("has_room", "level"), [(True, "ok"), (False, "warning")])
def test_a_step_without_room_in_memory_is_warned_of(
    has_room: bool, level: str, layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what makes a step smaller; where there is room there is nothing to do."""
    monkeypatch.setattr(machine, "memory_in_words", lambda _: ("1 GB", has_room))
    (found,) = machine.check_memory(layout)
    assert (level, "1 GB", has_room) == (found.level, found.message, found.hint is None)


def test_files_out_of_the_stream_have_no_number(layout: RunLayout) -> None:
    """Trained and waiting files are numbered in order; a skipped one has no number, and shifts none."""
    with Ledger(layout.ledger) as ledger:
        for name, state in (("s.jsonl", "skipped"), ("q.jsonl", "queued"), ("u.jsonl", "quarantined")):
            ledger.insert_file(**FILE, name=name, state=state)
    expected = [(1, "8.jsonl"), (2, "4.jsonl"), (3, "q.jsonl"), (None, "s.jsonl"), (None, "u.jsonl")]
    assert expected == [(entry["position"], entry["name"]) for entry in read_history(layout)]


def test_a_failure_between_two_tries_has_its_reason(layout: RunLayout) -> None:
    """`failed` is never without a problem: between tries it is the last failure. Every state says what is done."""
    with Ledger(layout.ledger) as ledger:
        ledger.add_event("error", "the base is gone", kind="failed")
        ledger.put(state="failed", problem=None)
        assert "the base is gone" == read_status(layout)["problem"]
        ledger.put(state="loading")
    status = read_status(layout)
    assert ("stopped", "the process that owned the run died (loading)") == (status["state"], status["problem"])
    with RunLock(layout.lock):
        assert ("loading", "loading the model and the state") == (
            read_status(layout)["state"], read_status(layout)["doing"],
        )  # fmt: skip


def test_steps_that_a_dead_process_lost_do_not_count(layout: RunLayout) -> None:
    """Until they are trained again the run stands where it was committed, and a living process at its last step."""
    with Ledger(layout.ledger) as ledger:
        committed = ledger.committed_step()
        at = {"position": 3, "start_step": committed, "planned_steps": 9}
        row = ledger.insert_file(**FILE, name="t.jsonl", state="training", **at)
        metrics = Metrics(layout.ledger)
        for step in (1, 2):
            metrics.append(StepRecord(row, committed + step, step, 0, 2, "digest", 20, 10, 1.5, 1e-4, 0.5, 0.25))
        metrics.close()
        found = []
        for state, held in (("training", False), ("loading", True), ("training", True)):
            ledger.put(state=state)
            with RunLock(layout.lock) if held else nullcontext():
                status = read_status(layout)
            found.append((status["global_step"] - committed, status["file_step"], status["loss"]))
    assert [(0, 0, None), (0, 0, None), (2, 2, 1.5)] == found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("has_log", [False, True])
def test_another_user_may_look(has_log: bool, layout: RunLayout) -> None:
    """Status, history and the lock can be read by a user who may not write, with and without SQLite's log there."""
    let_others_reach(layout.root)
    layout.lock.unlink(missing_ok=True)

    def look() -> Any:
        return [read_status(layout)["state"], len(read_history(layout)), is_held(layout.lock)]

    with Ledger(layout.ledger) as ledger:
        if not has_log:
            ledger.close()
        before = sorted(path.name for path in layout.root.iterdir())
        assert ["idle", 2, False] == as_nobody(look)
        assert before == sorted(path.name for path in layout.root.iterdir())
        with FileLock(layout.lock):
            assert ["idle", 2, True] == as_nobody(look)
        refused = as_nobody(lambda: Run(layout.root).pause())
        assert ("attempt to write" if has_log else "this user may not write the ledger") in refused
    layout.ledger.chmod(0o600)
    assert "this user may not read the ledger" in as_nobody(look)


def test_looking_takes_no_lock(tmp_path: Path) -> None:
    """Asking whether a run is held makes no file, and those who ask are never taken for an owner."""
    lock = tmp_path / ".lock"
    assert not is_held(lock)
    assert [] == list(tmp_path.iterdir())
    lock.touch(0o444)
    assert not is_held(lock)
    assert not is_held(lock)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not OPEN, reason="other users may not read the folder of these packages")
@pytest.mark.parametrize(
    ("closed", "is_others"),
    [
        ("archive", False),
        ("ledger.sqlite3", False),
        ("cache/tokens", True),
        ("current_model/checkpoint-3", True),
        (".lock", True),
        ("", False),
        ("", True),
    ],
)
def test_what_may_not_be_written_is_named_with_a_way_out(closed: str, is_others: bool, layout: RunLayout) -> None:
    """A folder or file that its user may not write, or that a command of root left behind, is an error with a command.

    Whoever only looks at another user's run gets a warning.
    """
    let_others_reach(layout.root)
    for path in [layout.root, *layout.root.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    place = layout.root / closed

    def look() -> Any:
        return [[found.level, found.message, found.hint] for found in findings(layout, "access")]

    assert [] == as_nobody(look)
    way = f"chmod -R u+rwX {layout.root}"
    if is_others:
        os.chown(place, 0, 0)
        way = f"sudo chown -R nobody {layout.root}" if closed else "be the user who owns the run: root"
    place.chmod(0o555 if place.is_dir() else 0o444)
    ((level, message, hint),) = as_nobody(look)
    assert ("warning" if is_others and not closed else "error") == level
    assert message.startswith(f"this user may not write {closed or 'its folder'}")
    assert hint.endswith(way)
