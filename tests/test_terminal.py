"""What the user sees: on any terminal, in order, and safe from closed streams and hostile names."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shlex
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, cast

import pytest
import tiny
from commands import make_run, onward_process
from rich.console import Console
from rich.progress import Progress

from onward import cli
from onward.cli.tables import print_history, status_lines
from onward.errors import UsageError
from onward.events import Committed, Event, FileDone, FileStarted, Note, Resumed, StepTaken
from onward.layout import RunLayout
from onward.progress import Bar, InOrder, bar_columns, describe
from onward.service.outside.reporting import NewNotes
from onward.status import read_history, read_status
from onward.store.ledger import Ledger, make_ledger
from onward.terminal import open_standard_streams, tolerant

NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e.jsonl"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}


def started(position: int, name: str = "a.jsonl", steps: int = 2) -> FileStarted:
    """Return the start of a file."""
    return FileStarted(name, position, 8, 0, 0, steps, 0, "bitwise")


def step(number: int, of: int = 2) -> StepTaken:
    """Return a step of a file."""
    return StepTaken(number, number, of, 1, 4, "", 100, 50, 2.5, 1e-3, 1.0, 0.5)


def done(position: int) -> FileDone:
    """Return the end of a file."""
    return FileDone("a.jsonl", position, 1, 2)


def ordered(*events: Event) -> list[Event]:
    """Return events in the order in which they are shown."""
    shown: list[Event] = []
    order = InOrder(shown.append)
    for event in events:
        order(event)
    order.close()
    return shown


def test_a_file_ends_before_the_next_one_begins() -> None:
    """The next file begins while the boundary before it is committed; its lines wait for the end of the one before."""
    one, two = started(1), started(2)
    commit = Committed(2, (), "step-2")
    assert [one, step(1), step(2), commit, done(1), two, step(1), step(2), done(2)] == ordered(
        one, step(1), step(2), two, step(1), commit, done(1), step(2), done(2)
    )


def test_what_begins_again_holds_nothing_back() -> None:
    """After a failed boundary the file begins again: nothing waits for an end that does not come, nothing is lost."""
    one, two, note = started(1), started(2), Note("the disk is full")
    assert [one, step(2), note, two, step(1), one, step(1)] == ordered(one, step(2), two, step(1), note, one, step(1))
    assert [one, step(1), two, step(1)] == ordered(one, step(1), two, step(1))
    assert [one, step(2), one, step(1)] == ordered(one, step(2), one, step(1))


def test_a_start_and_a_boundary_say_what_is_kept() -> None:
    """A start names what it goes on from; a boundary what was committed, removed and kept."""
    resumed = Resumed(118, "current_model/checkpoint-118", 0.001)
    line = "resuming from current_model/checkpoint-118: weights, moments, learning rate 0.001, step 118"
    assert line == describe(resumed)
    line = (
        "committed checkpoint-236 (weights, optimizer, scheduler, RNG); removed checkpoint-118; restore point step-236"
    )
    assert line == describe(Committed(236, ("checkpoint-118",), "step-236"))
    assert describe(Committed(100, ("checkpoint-50",))) is None


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_bar_fits_its_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, step and loss are shown on 40 columns too, no line is wider, and the cursor stays visible."""
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with Progress(*bar_columns(width), console=console, auto_refresh=False) as progress:
        bar = Bar(progress)
        bar(started(1, "a-name-that-is-much-too-long-for-a-terminal.jsonl", 20))
        progress.refresh()
        assert "nan" not in out.getvalue()  # before the first step there is no loss
        bar(step(7, 20))
        out.truncate(0)
        progress.refresh()
        line = out.getvalue().split("\x1b[2K")[-1].strip("\r\n")
    assert width >= len(line)
    if width >= 40:
        assert [] == [part for part in ("1 a-", "7/20", "loss 2.5000") if part not in line]


def run_in_terminal(command: list[str], **environment: str) -> str:
    """Run a command whose stderr is a terminal, and return what it wrote there."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave, env={**ENVIRONMENT, **environment}
    ) as process:
        os.close(slave)
        written = b""
        try:
            while data := os.read(master, 65536):
                written += data
        except OSError:  # the other end is closed
            pass
        assert 0 == process.wait(), written
    os.close(master)
    return written.decode()


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_a_terminal_shows_its_lines_and_keeps_its_cursor(kind: str, program: Path, model: Path, tmp_path: Path) -> None:
    """A dumb terminal gets plain lines, another one a bar; neither loses its cursor, so a suspended run leaves it."""
    run = make_run(tmp_path / "run", model)
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(8))
    shown = run_in_terminal([str(program), "train", str(file), "--run", str(run)], TERM=kind)
    assert "file 1: a.jsonl, 8 rows, 2 steps" in shown
    assert "file 1 done: steps 1-2 committed" in shown
    assert "\x1b[?25l" not in shown
    assert (kind == "dumb") == ("\x1b" not in shown)


@pytest.mark.parametrize("redirection", [">&- 2>&-", ">&- 2>&- <&-", "2> >(true)", "2>/dev/full >/dev/null"])
def test_nobody_reads_and_training_goes_on(redirection: str, program: Path, model: Path, tmp_path: Path) -> None:
    """Closed, full and abandoned streams end nothing: files are trained, and the exit status is that of the work.

    Python begins otherwise where all streams are closed: that is tried with a process from its very start.
    """
    run = make_run(tmp_path / "run", model)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(8, n)) for n in (1, 2)]
    start = [sys.executable, "-m", "onward"] if "<&-" in redirection else [str(program)]
    words = shlex.join([*start, "train", *map(str, files), "--run", str(run)])
    assert 0 == subprocess.run(["bash", "-c", f"{words} {redirection}"], env=ENVIRONMENT, check=False).returncode
    assert ["done", "done"] == [entry["state"] for entry in read_history(RunLayout(run))]
    with Ledger(run / "ledger.sqlite3") as ledger:
        assert ("ok", []) == (ledger.quick_check(), [e.message for e in ledger.events(100) if "observer" in e.message])
        ledger.write("DELETE FROM handovers")
    words = shlex.join([str(program), "verify", "--run", str(run)])
    done = subprocess.run(["bash", "-c", f"{words} {redirection}"], env=ENVIRONMENT, capture_output=True, check=False)
    assert 5 == done.returncode


UNREAD = """
import sys
from onward import terminal

terminal.PATIENCE = 0.0
terminal.open_standard_streams()
for number in range(5000):
    terminal.say(f"line {number} {'x' * 60}")
print("all said", flush=True)
sys.stdin.readline()
terminal.say("the end")
"""
"""Says more than any reader's buffer takes, and something more when told to."""


def readers() -> dict[str, Callable[[], tuple[int, int]]]:
    """Return ways to make a stream: the descriptors of its reader and of its writer."""

    def stopped() -> tuple[int, int]:
        master, slave = pty.openpty()
        termios.tcflow(slave, termios.TCOOFF)  # as Ctrl-S does
        return master, slave

    def socket_pair() -> tuple[int, int]:
        reader, writer = socket.socketpair()
        return reader.detach(), writer.detach()

    return {"pipe": os.pipe, "terminal": pty.openpty, "stopped terminal": stopped, "socket": socket_pair}


@pytest.mark.parametrize("kind", readers())
def test_a_reader_who_stops_reading_holds_up_nothing(kind: str) -> None:
    """A pager at its first page, Ctrl-S, a stuck log: what does not fit is lost, and what comes after it arrives.

    The stream's mode, which it shares with the shell, stays.
    """
    reader, writer = readers()[kind]()
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer, env=ENVIRONMENT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"all said\n" == process.stdout.readline()
        assert os.get_blocking(writer)
        if kind == "stopped terminal":
            termios.tcflow(writer, termios.TCOON)
        while select.select([reader], [], [], 0.0)[0]:
            assert b"the end" not in os.read(reader, 65536)
        process.stdin.close()
        read = b""
        while not read.rstrip().endswith(b"the end"):
            read += os.read(reader, 65536)
    os.close(reader)
    os.close(writer)


def test_a_result_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    """A result that a full disk does not take is exit status 1; a reader that left early is no failure."""
    layout = RunLayout(tmp_path)
    layout.make()
    make_ledger(layout.ledger)
    words = shlex.join([sys.executable, "-m", "onward", "status", "--run", str(tmp_path)])
    done = subprocess.run(
        ["bash", "-c", f"{words} >/dev/full"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (1, True) == (done.returncode, "No space left on device [standard output]" in done.stderr)
    piped = f"{words} | true; exit ${{PIPESTATUS[0]}}"
    assert 0 == subprocess.run(["bash", "-c", piped], env=ENVIRONMENT, check=False).returncode


def test_a_stream_that_is_closed_takes_what_libraries_print() -> None:
    """A stream closed inside the process raises nothing when a library writes to it."""
    stream = io.StringIO()
    wrapped = tolerant(stream)
    assert 1 == wrapped.write("a")
    assert "a" == stream.getvalue()
    stream.close()
    assert 1 == wrapped.write("b")


def test_a_closed_standard_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads what is typed (`chat`, `mcp`, a question) finds the end, not that there is no stream."""
    monkeypatch.setattr(sys, "stdin", None)
    open_standard_streams()
    with sys.stdin as stream:
        assert ("", False) == (stream.read(), stream.isatty())


def test_closed_streams_take_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no encoding has, such as the name of a file that is not UTF-8, is printed to nobody without an error."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    open_standard_streams()
    with cast(TextIO, sys.stdout) as out, cast(TextIO, sys.stderr) as err:
        for stream in (out, err):
            print("b\udcff.jsonl", file=stream, flush=True)


def test_names_of_others_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a file is called: lines, tables, status, errors and the log show it without a control character."""
    layout = RunLayout(tmp_path)
    layout.make()
    make_ledger(layout.ledger)
    with Ledger(layout.ledger) as ledger:
        ledger.insert_file(
            command="c", name=NASTY, sha256="0" * 64, bytes=1, format="jsonl", copy="archive/a", state="queued",
            again=0, priority=0, rows=1, tokens=1, target_tokens=1, truncated=0, dropped=0,
        )  # fmt: skip
        ledger.add_event("info", f"{NASTY} accepted\nroot# ")
        events = ledger.events()
    print_history(read_history(layout))
    texts = [
        capsys.readouterr().out.replace("\n", ""),
        describe(started(1, NASTY)) or "",
        *status_lines({**read_status(layout), "file": NASTY, "problem": NASTY}, events),
        str(UsageError(NASTY, where=NASTY, hint=NASTY)).replace("\n", ""),
    ]
    assert [] == [text for text in texts if not text.isprintable()]


def test_an_event_of_several_lines_is_one_line_of_the_screen(tmp_path: Path) -> None:
    """What a refusal said row by row is shown in one line, without escapes for its line ends."""
    make_ledger(tmp_path / "ledger.sqlite3")
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        ledger.add_event("warning", "1 of 1 files rejected:\n  a.jsonl, line 1: empty\n  a.jsonl, line 2: empty")
        (line,) = status_lines({}, ledger.events())
    assert line.endswith("  warning 1 of 1 files rejected: a.jsonl, line 1: empty a.jsonl, line 2: empty")


@pytest.mark.parametrize("module", ["typer", "typing", "json", "onward"])
def test_a_run_holds_no_code(module: str, tmp_path: Path) -> None:
    """`python -m onward` in a run's directory runs no module that lies there."""
    layout = RunLayout(tmp_path)
    layout.make()
    make_ledger(layout.ledger)
    (tmp_path / f"{module}.py").write_text("open('pwned', 'w')\n")
    command = [sys.executable, *(["-P"] if module == "onward" else []), "-m", "onward", "status", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
    assert "idle" == json.loads(done.stdout)["state"]
    assert not (tmp_path / "pwned").exists()


def test_new_events_become_notes(tmp_path: Path) -> None:
    """What was refused, paused or changed since the last look is reported once, in order; other events are not."""
    make_ledger(tmp_path / "ledger.sqlite3")
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        ledger.add_event("warning", "before", kind="rejected")
        notes = NewNotes(ledger)
        ledger.add_event("warning", "x.jsonl rejected", kind="rejected")
        ledger.add_event("info", "a.jsonl done", kind="done")
        ledger.add_event("warning", "paused by an operator", kind="paused")
        assert [Note("x.jsonl rejected"), Note("paused by an operator")] == notes()
        assert [] == notes()


def test_a_shell_completes_names_that_it_takes_as_they_are(tmp_path: Path) -> None:
    """`onward skip <TAB>` offers the files that wait, but none whose name a shell would read as more than a name."""
    layout = RunLayout(tmp_path)
    layout.make()
    make_ledger(layout.ledger)
    with Ledger(layout.ledger) as ledger:
        for name in ("monday.jsonl", "more.jsonl", "mo;touch pwned.jsonl", "tuesday.jsonl"):
            ledger.insert_file(
                command="c", name=name, sha256="0" * 64, bytes=1, format="jsonl", copy="archive/a", state="queued",
                again=0, priority=0, rows=1, tokens=1, target_tokens=1, truncated=0, dropped=0,
            )  # fmt: skip
    code = "import sys; sys.argv = ['onward']; from onward.cli import main; main()"
    words = {"_ONWARD_COMPLETE": "complete_bash", "COMP_WORDS": "onward skip mo", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, **words, "ONWARD_RUN": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ["monday.jsonl", "more.jsonl"] == done.stdout.split()
    assert "--install-completion" in onward_process("--help").out
