"""A watching daemon: what lands in the inbox is trained as one run, and what operators ask is done at the next step."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import tiny
from daemons import LONG, PATIENCE, SETTINGS, configure, done, end, hold, is_in, rows_file, twin_of, until, watch
from faults import FULL_SIZE
from runs import new_run
from states import assert_same_state, temporary_files

from onward import Run
from onward.errors import RunLocked, UsageError
from onward.service.holder import read_holder
from onward.service.owner.incoming import SMALL_FILE
from onward.service.wishes import AFTER_FILE, Wish, Wishes
from onward.store.ledger import Ledger


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


def test_an_inbox_is_one_run(run: Run, model: Path, tmp_path: Path) -> None:
    """`watch --once` empties the inbox by priority and ends; the state is that of one run over the same files."""
    names = {"b.jsonl": "", "c.jsonl": "low", "a.jsonl": "high"}
    files = [rows_file(tmp_path / name, 7 + place) for place, name in enumerate(names)]
    for file, folder in zip(files, names.values(), strict=True):
        (run.layout.inbox / folder).mkdir(exist_ok=True)
        shutil.copy(file, run.layout.inbox / folder)
    assert 0 == run.watch(once=True)
    assert ["a.jsonl", "b.jsonl", "c.jsonl"] == done(run)
    assert [] == [path for path in run.layout.inbox.rglob("*") if path.is_file()]
    assert_same_state(twin_of(run, model, [tmp_path / name for name in sorted(names)]), run.layout.root)
    assert run.verify().ok


def test_an_inbox_that_cannot_be_used_is_told_once(run: Run, tmp_path: Path) -> None:
    """A file where the inbox should be is named once, however often it is looked at; afterwards files are taken in.
    `--once` does not end before: nobody knows whether the inbox is empty."""

    def events() -> list[str]:
        with Ledger(run.layout.ledger, read_only=True) as ledger:
            found = [event.message for event in ledger.events(1000)]
        return [message for message in found if "inbox" in message or "taken in again" in message]

    shutil.rmtree(run.layout.inbox)
    run.layout.inbox.touch()
    process = watch(run, "--once")
    until(lambda: bool(events()), process)
    rows_file(tmp_path / "b.jsonl", 4)
    run.add(tmp_path / "b.jsonl")  # the inbox is looked at before and after it
    until(lambda: ["b.jsonl"] == done(run), process)
    (tmp_path / "inbox").mkdir()
    rows_file(tmp_path / "inbox" / "a.jsonl", 5)
    run.layout.inbox.unlink()
    (tmp_path / "inbox").rename(run.layout.inbox)
    process.join(PATIENCE)
    assert 0 == process.exitcode
    assert ["b.jsonl", "a.jsonl"] == done(run)
    problem, again = events()
    assert problem.startswith("the inbox cannot be used: [Errno 20] Not a directory")
    assert "files can be taken in again" == again


@pytest.mark.slow
def test_a_large_file_is_checked_beside_the_steps(run: Run, tmp_path: Path) -> None:
    """While one file trains, a large one that arrives is checked in another process and waits in the queue."""
    configure(run, epochs=10_000, save_steps=10**6)  # only steps happen until the end of the test
    process = watch(run)
    rows_file(run.layout.inbox / "first.jsonl", 20)
    until(is_in(run, "first.jsonl"), process)
    rows = ({"text": f"{number} {'word ' * 2_000}"} for number in range(120))
    shutil.copy(tiny.write_jsonl(tmp_path / "large.jsonl", rows), run.layout.inbox)
    assert (tmp_path / "large.jsonl").stat().st_size > SMALL_FILE
    until(lambda: "large.jsonl" in [entry["name"] for entry in run.history() if entry["state"] == "queued"], process)
    assert [] == done(run)
    assert 0 == end(process)


def test_bad_files_and_duplicates_are_reported_and_the_rest_goes_on(run: Run, tmp_path: Path) -> None:
    """Bad files and duplicates go to `rejected/` with a report, and hold up nothing else."""
    good = rows_file(tmp_path / "good.jsonl", 6)
    shutil.copy(good, run.layout.inbox / "good.jsonl")
    run.watch(once=True)
    shutil.copy(good, run.layout.inbox / "good.jsonl")
    (run.layout.inbox / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    rows_file(run.layout.inbox / "other.jsonl", 5)
    assert 2 == run.watch(once=True)
    assert ["good.jsonl", "other.jsonl"] == done(run)
    assert ["bad.jsonl", "bad.jsonl.report.json", "good.jsonl", "good.jsonl.report.json"] == sorted(
        path.name for path in run.layout.rejected.iterdir()
    )
    assert [2] == [
        p["line"] for p in json.loads((run.layout.rejected / "bad.jsonl.report.json").read_text())["problems"]
    ]


@pytest.mark.slow
def test_killed_at_random_while_files_arrive(run: Run, model: Path, tmp_path: Path) -> None:
    """Files dropped in while the daemon is killed again and again: each trained once, the state that of one run."""
    chance = random.Random(11)
    count, kills = (1000, 30) if FULL_SIZE else (12, 4)
    files = [rows_file(tmp_path / f"{n:04}.jsonl", 8, seed=n) for n in range(count)]
    process = watch(run)
    for number, file in enumerate(files, start=1):
        shutil.copy(file, run.layout.inbox)
        if number % (count // kills) == 0:
            process.join(chance.uniform(0.4, 2.0))
            end(process, signal.SIGKILL)
            process = watch(run)
    until(lambda: len(done(run)) == len(files), process)
    until(lambda: (read_holder(run.layout.lock) or {}).get("pid") == process.pid, process)  # it listens to signals
    assert 0 == end(process)
    history = run.history()
    assert {(8, "done")} == {(entry["rows_trained"], entry["state"]) for entry in history}
    assert sorted(file.name for file in files) == sorted(done(run))
    assert [] == temporary_files(run.layout.root)
    assert_same_state(twin_of(run, model, [tmp_path / name for name in done(run)]), run.layout.root)
    assert run.verify().ok


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_stop(run: Run, model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal in the middle of a file commits the step, exits 0, and the next start goes on as if it had not been."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    shutil.copy(file, run.layout.inbox)
    process = watch(run, prepare=hold(run))
    until(is_in(run, "long.jsonl"), process)
    assert 0 == end(process, number)
    status = run.status()
    assert ("stopped", f"checkpoint-{status['global_step']}") == (status["state"], status["checkpoint"])
    assert 0 < status["file_step"] < status["file_steps"]
    run.watch(once=True)
    assert_same_state(twin_of(run, model, [file]), run.layout.root)


def test_a_stop_while_it_loads(run: Run, tmp_path: Path) -> None:
    """A stop asked for before the first step ends the process with 0; the file is trained by the next one."""
    rows_file(run.layout.inbox / "a.jsonl", 6)
    process = watch(run)
    until(lambda: run.layout.lock.with_name(".lock.holder").exists(), process)
    run.stop()
    process.join(PATIENCE)
    assert 0 == process.exitcode
    run.watch(once=True)
    assert ["a.jsonl"] == done(run)


def test_pause_and_resume(run: Run, model: Path, tmp_path: Path) -> None:
    """A pause commits and waits, with and without the model in memory; a resume continues; nothing is changed."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    shutil.copy(file, run.layout.inbox)
    process = watch(run, prepare=hold(run))
    for release in (False, True):
        until(is_in(run, "long.jsonl"), process)
        answer = run.pause(release=release)
        status = run.status()
        assert (f"paused at step {status['global_step']}", "paused") == (answer, status["state"])
        assert f"checkpoint-{status['global_step']}" == status["checkpoint"]
        assert "goes on" == run.resume()
        until(lambda step=status["global_step"]: run.status()["global_step"] > step, process)
    hold(run).let_go.touch()
    until(lambda: done(run) == ["long.jsonl"], process)
    assert 0 == end(process)
    assert_same_state(twin_of(run, model, [file]), run.layout.root)
    assert run.verify(deep=True).ok


def test_a_pause_outlasts_the_process(run: Run, tmp_path: Path) -> None:
    """A daemon that is started again stays paused, unless it is asked to resume before it has begun; to train in the
    foreground lifts the pause."""
    assert "begins paused" in run.pause()
    assert "paused" == run.status()["state"]
    rows_file(run.layout.inbox / "a.jsonl", 6)
    process = watch(run)
    until(lambda: run.status()["state"] == "paused" and run.status()["queue"] == 1, process)
    assert 0 == run.status()["global_step"]
    assert 0 == end(process)
    run.watch(once=True)
    assert [] == done(run)
    asked = Wishes()
    asked.put(Wish("resume"))
    run.watch(once=True, stop=asked)
    assert ["a.jsonl"] == done(run)
    run.pause()
    run.train()
    assert "no process owns the run, and no file is waiting" == run.status()["doing"]


def test_stop_after_the_file(run: Run, tmp_path: Path) -> None:
    """`stop --after-file` is acknowledged at once and ends the daemon at the boundary, with the queue as it is."""
    rows_file(run.layout.inbox / "1.jsonl", 20)
    rows_file(run.layout.inbox / "2.jsonl", 21)
    process = watch(run, prepare=hold(run))
    until(is_in(run, "1.jsonl"), process)
    assert "stops after the current file" == run.stop(after_file=True)
    hold(run).let_go.touch()
    process.join(PATIENCE)
    assert (0, ["1.jsonl"], 1) == (process.exitcode, done(run), run.status()["queue"])


def test_skip_of_the_file_after_which_to_stop(run: Run, tmp_path: Path) -> None:
    """A skip and a stop after the same file: the file is skipped, and then the daemon ends."""
    rows_file(run.layout.inbox / "1.jsonl", 20)
    rows_file(run.layout.inbox / "2.jsonl", 21)
    process = watch(run, prepare=hold(run))
    until(is_in(run, "1.jsonl"), process)
    with Ledger(run.layout.ledger) as ledger:  # in one act: the daemon sees both at the same step
        ledger.query("BEGIN IMMEDIATE")
        number = ledger.add_request("stop", AFTER_FILE)
        ledger.add_request("skip")
        ledger.query("COMMIT")
        process.join(PATIENCE)
        answers = [
            row["answer"] for row in ledger.query("SELECT answer FROM requests WHERE id >= ? ORDER BY id", number)
        ]
    assert (0, [], 1) == (process.exitcode, done(run), run.status()["queue"])
    assert ["stops after the current file", "skipped 1.jsonl, back at step 0"] == answers


def test_skip_is_as_if_the_file_had_never_come(run: Run, model: Path, tmp_path: Path) -> None:
    """The current file is taken back to its boundary and kept as skipped; the state is that of a run without it."""
    files = [rows_file(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", 9), ("b", LONG), ("c", 7))]
    for file in files:
        shutil.copy(file, run.layout.inbox)
        if file.name == "a.jsonl":
            run.watch(once=True)
    process = watch(run, prepare=hold(run, step=7))
    until(is_in(run, "b.jsonl", step=7), process)
    answer = run.skip(reason="no use")
    assert "skipped b.jsonl, back at step 5" == answer
    until(lambda: done(run) == ["a.jsonl", "c.jsonl"], process)
    assert 0 == end(process)
    (skipped,) = [entry for entry in run.history() if entry["state"] == "skipped"]
    assert ("b.jsonl", "no use") == (skipped["name"], skipped["note"])
    assert_same_state(twin_of(run, model, [files[0], files[2]]), run.layout.root)
    assert run.verify(deep=True).ok


def test_skip_without_a_daemon(run: Run, tmp_path: Path) -> None:
    """A waiting file is taken out by name, the file a stop left half trained without one; else it is refused."""
    run.add(rows_file(tmp_path / "a.jsonl", 6), rows_file(tmp_path / "b.jsonl", 7))
    with pytest.raises(UsageError, match="no file is being trained"):
        run.skip()
    with pytest.raises(UsageError, match=r"this run has no file 'z\.jsonl'"):
        run.skip("z.jsonl")
    assert "skipped a.jsonl" == run.skip("a.jsonl")
    run.train()
    assert ["b.jsonl"] == done(run)
    with pytest.raises(UsageError, match=r"'b\.jsonl' is done.*\n.*rebuild --without file:1"):
        run.skip("b.jsonl")


def test_others_may_look_and_add_but_not_train(run: Run, tmp_path: Path) -> None:
    """While a daemon runs `status`, `history` and `add` work; a second owner is refused with pid and host."""
    rows_file(run.layout.inbox / "long.jsonl", LONG)
    process = watch(run, prepare=hold(run))
    until(is_in(run, "long.jsonl"), process)
    with pytest.raises(RunLocked, match=f"pid {process.pid} on "):
        run.watch(once=True)
    with pytest.raises(RunLocked):
        run.train()
    assert 1 == len(run.add(rows_file(tmp_path / "next.jsonl", 6)))
    with Ledger(run.layout.ledger, read_only=True) as reader:
        reader.query("BEGIN")
        reader.query("SELECT * FROM files")  # a reader that keeps its view open delays nobody
        hold(run).let_go.touch()
        until(lambda: done(run) == ["long.jsonl", "next.jsonl"], process)
    assert 0 == end(process)


def test_what_was_asked_of_a_dead_process_is_closed(run: Run, tmp_path: Path) -> None:
    """A request that its process never answered does not stop the next one."""
    with Ledger(run.layout.ledger) as ledger:
        number = ledger.add_request("stop")
    rows_file(run.layout.inbox / "a.jsonl", 6)
    run.watch(once=True)
    assert ["a.jsonl"] == done(run)
    with Ledger(run.layout.ledger) as ledger:
        (request,) = ledger.query("SELECT * FROM requests WHERE id = ?", number)
    assert "the process for which it was meant had ended" == request["answer"]


def test_control_of_a_run_that_nobody_works_on(run: Run) -> None:
    """Stop and resume say that there is nothing to do."""
    assert ("no process owns this run", "it was not paused") == (run.stop(), run.resume())


REBUILDS = [(name, kept) for kept in (5, 1) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
FEW_REBUILDS = [("a.jsonl", 1), ("b.jsonl", 5), ("b.jsonl", 1), ("c.jsonl", 5)]
"""From the start, from a boundary, from the start as the boundary is gone, and nothing to train again."""


@pytest.mark.parametrize(("name", "kept"), REBUILDS if FULL_SIZE else FEW_REBUILDS)
def test_rebuild_is_a_run_that_never_had_the_file(run: Run, model: Path, tmp_path: Path, name: str, kept: int) -> None:
    """Without a first, middle or last file, its boundary kept or not, with a file waiting: the state of such a run."""
    config = run.layout.config.read_text()
    config = config.replace("keep_boundaries: 5", f"keep_boundaries: {kept}").replace("keep_days: 7", "keep_days: 0")
    run.layout.config.write_text(config)
    files = [rows_file(tmp_path / f"{letter}.jsonl", rows) for letter, rows in zip("abc", (9, 5, 7), strict=True)]
    run.train(*files)
    waiting = rows_file(tmp_path / "d.jsonl", 6)
    run.add(waiting)
    result = run.rebuild(name)
    rest = [file for file in (*files, waiting) if file.name != name]
    assert (name, [file.name for file in rest]) == (result["without"], done(run))
    assert_same_state(twin_of(run, model, rest), run.layout.root)
    assert run.verify(deep=True).ok


def test_rebuild_keeps_the_configs_that_files_had(run: Run, model: Path, tmp_path: Path) -> None:
    """A file that was trained under an older config is trained again under that one."""
    files = [rows_file(tmp_path / f"{letter}.jsonl", rows) for letter, rows in zip("abc", (9, 5, 7), strict=True)]
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    for one, names in ((run, files), (twin, files[1:])):
        one.train(*names[:-1])
        one.layout.config.write_text(
            one.layout.config.read_text().replace("learning_rate: 0.01", "learning_rate: 0.003")
        )
        one.train(names[-1])
    run.rebuild("a.jsonl")
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify(deep=True).ok
