"""What stands in the way of taking files in: names, folders, rights, open files, a command that was killed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import onward_process
from poisons import POISONS, SETTINGS, announce, states
from runs import new_run

from onward import Run
from onward.errors import ConfigError, DamagedState, FileRejected
from onward.service.intake.checking import Intake
from onward.service.intake.refusals import Refusal, keep_refused
from onward.service.intake.writers import is_being_written
from onward.service.owner.alongside.checker import Checker
from onward.store.ledger import Ledger
from onward.store.rows import FileRow


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


@pytest.mark.parametrize("copy", ["../secret", "/etc/passwd", "archive/../../secret", "ledger.sqlite3", "archive/.."])
def test_a_row_of_the_ledger_names_no_file_outside(run: Run, copy: str) -> None:
    """A path that Onward never writes is refused: nothing outside the run is read or moved."""
    with pytest.raises(DamagedState, match="the ledger names a file outside"):
        run.layout.kept(copy)
    with pytest.raises(DamagedState, match="the ledger names a file outside"):
        run.layout.dropped(copy.replace("archive/", "x/").replace("ledger", "low/high/ledger"))


def test_a_report_never_overwrites_a_file(run: Run, tmp_path: Path) -> None:
    """A refused file with the name of a report and the file that it would be the report of are both kept."""
    for name, content in (("x.jsonl.report.json", "1"), ("x.jsonl", "2")):
        path = tmp_path / name
        path.write_text(content)
        keep_refused(run.layout, path, Refusal.of_training(name, "bad", ""), 0.0)
    assert {
        "x.jsonl": "2",
        "x.jsonl.report_.json": "1",
    } == {
        path.name: path.read_text() for path in run.layout.rejected.iterdir() if not path.name.endswith(".report.json")
    }
    assert ["x.jsonl.report.json", "x.jsonl.report_.json.report.json"] == sorted(
        path.name for path in run.layout.rejected.glob("*.report.json")
    )


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: (path.mkdir(), (path / "mine").write_text("mine")),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to a folder": lambda path: path.symlink_to(path.parent.parent / "mine", target_is_directory=True),
    "link to a file": lambda path: path.symlink_to(path.parent.parent / "mine/file"),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.report.json", ".tmp-x.jsonl", ".tmp-x.jsonl.report.json"])
def test_what_others_put_into_rejected_blocks_no_refusal(run: Run, name: str, kind: str) -> None:
    """Whatever lies in `rejected/` under a name of a refused file stays; the file and its report get other names."""
    mine = run.layout.root / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    way = run.layout.rejected / name
    IN_THE_WAY[kind](way)
    before = way.lstat()
    (run.layout.inbox / "x.jsonl").write_text("{}\n")
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "x.jsonl")
        assert Intake(run.layout, ledger).check_next()
        assert {"x.jsonl": "rejected"} == states(ledger)
    kept = next(path for path in run.layout.rejected.iterdir() if path != way and not path.name.endswith("report.json"))
    assert "{}\n" == kept.read_text()
    assert "x.jsonl" == json.loads(kept.with_name(f"{kept.name}.report.json").read_text())["file"]
    assert (before.st_ino, before.st_mode) == (way.lstat().st_ino, way.lstat().st_mode)
    assert ["file"] == [path.name for path in mine.iterdir()]
    assert "mine" == (mine / "file").read_text()


def test_a_folder_in_the_archive_is_left_alone(run: Run, tmp_path: Path) -> None:
    """A start removes copies that were never recorded, and nothing else that has a name like theirs."""
    folder = run.layout.archive / ".tmp-mine"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    (run.layout.archive / ".tmp-a.jsonl").write_text("half of a copy")
    (run.layout.archive / ".tmp-link").symlink_to(folder / "mine")
    run.add(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(3)))
    assert [".tmp-link", ".tmp-mine", "a.jsonl"] == sorted(path.name for path in run.layout.archive.iterdir())
    assert "mine" == (folder / "mine").read_text()


def test_a_command_that_was_killed_before_it_read_its_files_is_finished(run: Run, tmp_path: Path) -> None:
    """Its files are taken in by the next process; what is gone by then, or has no file's name, is a refusal."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(3))
    nowhere = ["gone.jsonl", "zero\0byte.jsonl", "half\ud800.jsonl", f"{'long' * 99}.jsonl"]
    with Ledger(run.layout.ledger) as ledger:
        ledger.add_intent([file], again=False, priority=0)
        for name in nowhere:
            ledger.add_intent([tmp_path / name], again=False, priority=0)
        own = ledger.add_intent([file], again=False, priority=0)
        refused = Intake(run.layout, ledger).finish_left_over(own)
        assert ["there is no such file"] * len(nowhere) == [refusal.what for refusal in refused]
        assert {"a.jsonl": "queued"} == states(ledger)
        assert [own] == [intent.id for intent in ledger.intents()]
        Intake(run.layout, ledger).take([file], intent=own)
        assert [] == ledger.intents()


FULL = """
import errno, os, resource, sys
from pathlib import Path
from onward.layout import RunLayout
from onward.service.intake.arrivals import Arrivals
from onward.service.intake.budget import Spending
from onward.service.intake.inbox import Inbox
from onward.store.ledger import Ledger
layout = RunLayout(Path(sys.argv[1]))
with Ledger(layout.ledger) as ledger:
    arrivals = Arrivals(layout, ledger)
    arrivals.announce([(layout.inbox / "a.jsonl", 0)], "c")
    rows = ledger.announced()
    inbox = Inbox(layout.inbox, 0.0)
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for act in (inbox.scan, lambda: arrivals.bring_in(rows, Spending())):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            act()
        except OSError as error:
            print(errno.errorcode[error.errno], file=sys.stdout)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ledger.announced() == rows
"""


def test_too_many_open_files_refuse_nobody(run: Run) -> None:
    """A machine that cannot open files is an error that is raised: the file keeps its place, nothing is rejected."""
    path = tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(3))
    done = subprocess.run([sys.executable, "-c", FULL, run.layout.root], capture_output=True, text=True, check=False)
    assert ("EMFILE\nEMFILE\n", "") == (done.stdout, done.stderr)
    assert path.is_file()
    assert [] == list(run.layout.rejected.iterdir())


def test_what_the_run_may_not_read_refuses_nobody(run: Run) -> None:
    """A cache or a library that this user may not read says nothing of the file, which keeps its place."""

    def fail(row: FileRow) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(run.layout.tokens / "x"))

    tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "a.jsonl")
        with pytest.raises(PermissionError):
            Intake(run.layout, ledger, begun=fail).check_next()
        (row,) = ledger.files("arriving")
        assert 0 == row.attempts


def test_occurrence_counts_the_same_content(run: Run, tmp_path: Path) -> None:
    """The first file with a content has occurrence 0, each further one that is asked for the next number."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        intake = Intake(run.layout, ledger)
        intake.take([file])
        intake.take([file, file], again=True)
        assert [0, 1, 2] == [row.occurrence for row in ledger.files("queued")]


def test_waiting_for_the_intake_lock_sees_a_stop(run: Run, tmp_path: Path) -> None:
    """A command that waits while others take files in ends when it is asked to."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(3))
    asked = threading.Event()

    def stop() -> None:
        if asked.is_set():
            raise InterruptedError

    with Ledger(run.layout.ledger) as ledger, Ledger(run.layout.ledger) as other:
        holding = Intake(run.layout, other, begun=lambda _: _wait_in_vain(run, ledger, file, asked, stop))
        holding.take([file])
        assert {"a.jsonl": "queued"} == states(ledger)


def _wait_in_vain(run: Run, ledger: Ledger, file: Path, asked: threading.Event, stop: Callable[[], None]) -> None:
    polls: list[None] = []

    def poll() -> None:
        polls.append(None)
        if len(polls) > 2:
            asked.set()
        stop()

    with pytest.raises(InterruptedError):
        Intake(run.layout, ledger, stop=poll).take([file])


def test_a_checker_that_fails_is_started_again_with_growing_pauses(run: Run) -> None:
    """Each failure is reported as a problem; the pauses double; a process that succeeds clears the problem."""
    clock = [0.0]
    started: list[float] = []
    status = [3]

    def start() -> subprocess.Popen[bytes]:
        started.append(clock[0])
        if len(started) == 1:
            raise BlockingIOError(11, "no more processes")
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status[0]})"])
        process.wait()
        return process

    with Ledger(run.layout.ledger) as ledger:
        checker = Checker(ledger, start, monotonic=lambda: clock[0])
        for _ in range(15):
            checker.start()
            assert not checker.is_running()
            assert checker.problem is not None
            clock[0] += 1.0
        assert [0.0, 2.0, 6.0, 14.0] == started
        assert "ended with status 3; tried again in 16 s (failure 4 in a row)" in str(checker.problem)
        status[0], clock[0] = 0, 100.0
        checker.start()
        assert not checker.is_running()
        assert checker.problem is None


PROBE = """
import sys
from onward.service.intake.writers import is_being_written
print([is_being_written(sys.argv[1]) for _ in range(20_000)][-1])
"""
WRITER = "import sys\nwhile True:\n    open(sys.argv[1], 'a').close()\n"


def test_a_writer_that_opens_the_file_meanwhile_does_not_end_the_process(tmp_path: Path) -> None:
    """While a file is probed 20,000 times another process opens it for writing without a pause: no signal kills."""
    path = tmp_path / "a.jsonl"
    path.touch()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path])
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE, path], capture_output=True, text=True, check=False)
    finally:
        writer.kill()
        writer.wait()
    assert (0, "") == (probe.returncode, probe.stderr)
    assert not is_being_written(str(path))


NO_TORCH = """
import sys
from onward import Run
from onward.service.intake.checker import check_arrived
Run(sys.argv[1]).add(sys.argv[2])
Run(sys.argv[1]).check_arrived()
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_add_and_check_load_neither_torch_nor_transformers(run: Run, tmp_path: Path) -> None:
    """Once the tokenizer of a run is stored, files are checked without the libraries that training needs."""
    run.add(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(3)))
    second = tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(4))
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, run.layout.root, second], capture_output=True, text=True, check=False
    )
    assert ("[]\n", "") == (done.stdout, done.stderr)


def test_a_token_beyond_the_embedding_is_a_refusal(tmp_path: Path) -> None:
    """A row with a token that the model has no embedding for is named with both numbers; other rows are accepted.

    So is one in a file of `evaluation.files`, before the first step.
    """
    folder = tiny.save_tiny_model(tmp_path / "model", layers=1)
    tokenizer = tiny.byte_tokenizer(extra=("<|new|>",))
    tokenizer.save_pretrained(folder)
    run = Run.create(tmp_path / "run", str(folder), **SETTINGS)
    run.add(tiny.write_jsonl(tmp_path / "good.jsonl", tiny.chat_rows(3)))
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "fine"}, {"text": "a <|new|> token"}])
    with pytest.raises(FileRejected, match=r"bad.jsonl, line 2: token id 259, the model has 259 embedding rows"):
        run.add(bad)
    settings: dict[str, Any] = {**SETTINGS, "evaluation": {"files": [str(bad)]}}
    asking = Run.create(tmp_path / "asking", str(folder), **settings)
    with pytest.raises(ConfigError, match="line 2: token id 259, the model has 259 embedding rows"):
        asking.train(tmp_path / "good.jsonl")
    assert 0 == asking.status()["global_step"]


@pytest.mark.slow
def test_train_prints_a_refusal_of_every_poison(run: Run, tmp_path: Path) -> None:
    """`onward train` on all poisoned files at once names each in words and ends with status 3."""
    files = [tmp_path / name for name in POISONS]
    for file in files:
        file.write_bytes(POISONS[file.name])
    outcome = onward_process("train", *files, "--run", run.layout.root)
    assert 3 == outcome.status
    assert "Traceback" not in outcome.err
    assert [] == [name for name in POISONS if name not in outcome.err]
