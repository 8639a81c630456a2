"""The command line's contract: what commands print, where, and what they cost."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from commands import make_run, onward, onward_process

from onward import cli
from onward.profiling import table_of

HISTORY_KEYS = [
    "position", "name", "state", "sha256", "rows", "rows_trained", "rows_held_out", "rows_replayed",
    "truncated", "dropped", "split", "tokens",
    "lost_tokens", "bad_rows", "steps", "first_step", "last_step", "first_loss", "last_loss", "first_learning_rate",
    "last_learning_rate", "handover", "note", "seconds",
]  # fmt: skip
STATUS_KEYS = [
    "run", "state", "doing", "global_step", "file", "file_step", "file_steps", "lost_tokens", "queue",
    "learning_rate", "loss",
    "tokens_per_second", "eta_seconds", "checkpoint", "disk_free_bytes", "heartbeat_seconds",
    "hangs", "problem",
]  # fmt: skip
COMMANDS = ["init", "train", "add", "status", "history", "verify", "rollback", "adopt", "reset", "doctor"]
LARGE = ("torch", "transformers", "peft")
HEAVY = (*LARGE, "numpy")
PROBE = """
import sys
from onward import cli
sys.argv = ["onward", *sys.argv[1:]]
try:
    cli.main()
finally:
    print([name for name in %r if name in sys.modules], file=sys.stderr)
"""
PUBLIC = """
import onward, sys
values = [getattr(onward, name) for name in onward.__all__]
print([name for name in %r if name in sys.modules])
"""


def light(script: str, *arguments: str, run: Path = Path()) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own that has this package and a run."""
    environment = {**os.environ, "ONWARD_RUN": str(run), "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run with two files trained; tests that change a run copy it."""
    folder = tmp_path_factory.mktemp("cli")
    run = make_run(folder / "run", model)
    files = [tiny.write_jsonl(folder / f"{name}.jsonl", tiny.chat_rows(8, name)) for name in (1, 2)]
    outcome = onward("train", *files, "--run", run)
    assert 0 == outcome.status, outcome.err
    return run


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["status"], ["history"], ["status", "--json"]]
)
def test_looking_is_light(arguments: list[str], trained: Path) -> None:
    """Help, status and history load neither torch nor transformers, whatever the state of the run."""
    done = light(PROBE % (HEAVY,), *arguments, run=trained)
    assert 0 == done.returncode, done.stderr
    assert "[]" == done.stderr.splitlines()[-1]
    assert done.stdout


def test_the_first_add_is_light(model: Path, tmp_path: Path) -> None:
    """`init` leaves the tokenizer as plain values, so that not even the first `add` loads torch or transformers."""
    run = make_run(tmp_path / "run", model)
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4))
    done = light(PROBE % (LARGE,), "add", str(file), run=run)
    assert ["accepted", "[]"] == [line.partition(" ")[0] for line in done.stderr.splitlines()]


def test_the_public_names_are_light() -> None:
    """What `import onward` offers loads no torch, whatever of it is used."""
    done = light(PUBLIC % (HEAVY,))
    assert "[]\n" == done.stdout, done.stderr


@pytest.mark.parametrize(
    "fails", ["ImportError('libx.so: no such file')", "OSError('libx.so')", "AttributeError('get')"]
)
def test_a_library_that_cannot_be_imported_is_named(fails: str, tmp_path: Path) -> None:
    """Whatever it raises, a person reads a line and what to type, no traceback."""
    (tmp_path / "torch.py").write_text(f"raise {fails}\n")
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])
    outcome = onward_process("doctor", PYTHONPATH=path)
    assert (1, "") == (outcome.status, outcome.out)
    what, hint = outcome.err.splitlines()
    kind, _, words = fails.partition("(")
    assert f"onward: torch cannot be imported: {kind}: {words[1:-2]}" == what
    assert hint.endswith("pip install --force-reinstall torch")


def test_help_names_every_command() -> None:
    """`onward --help` lists the commands and the exit statuses; each command has a help of its own.

    On a terminal of 80 columns no summary is cut.
    """
    shown = onward("--help")
    assert (0, False) == (shown.status, "..." in shown.out.split("Commands:")[1])
    assert [] == [command for command in COMMANDS if command not in shown.out]
    assert "Exit status: 0 done, 1 failed, 2 wrong usage or config, 3 a file was" in shown.out
    for command in COMMANDS:
        assert "--json" in onward(command, "--help").out


def test_history_has_the_contract_keys(trained: Path) -> None:
    """`history --json` is a list with one object per file, in stream order, with exactly these keys."""
    entries = onward("history", "--run", trained, "--json").json
    assert [HISTORY_KEYS, HISTORY_KEYS] == [list(entry) for entry in entries]
    assert [(1, "1.jsonl", "done", 8, 8, 2, 1, 2), (2, "2.jsonl", "done", 8, 8, 2, 3, 4)] == [
        (
            entry["position"], entry["name"], entry["state"], entry["rows"], entry["rows_trained"], entry["steps"],
            entry["first_step"], entry["last_step"],
        )
        for entry in entries
    ]  # fmt: skip
    assert ["bitwise", "bitwise"] == [entry["handover"] for entry in entries]


def test_status_has_the_contract_keys(trained: Path) -> None:
    """`status --json` is an object with exactly these keys; an idle run has no file at hand."""
    status = onward("status", "--run", trained, "--json").json
    assert STATUS_KEYS == list(status)
    idle = {"state": "idle", "global_step": 4, "file": None, "file_step": 0, "queue": 0, "checkpoint": "checkpoint-4"}
    assert idle == {key: status[key] for key in idle}
    assert 0 < status["disk_free_bytes"]
    assert 0.0002 == status["learning_rate"]


def test_a_run_without_files_has_a_status(model: Path, tmp_path: Path) -> None:
    """A new run answers every command: idle at step 0, no history, nothing waiting."""
    run = make_run(tmp_path / "run", model)
    status = onward("status", "--run", run, "--json").json
    assert ("idle", 0, 0, None) == (status["state"], status["global_step"], status["queue"], status["checkpoint"])
    assert [] == onward("history", "--run", run, "--json").json
    outcome = onward("train", "--run", run)
    assert (0, "") == (outcome.status, outcome.out)
    assert "nothing left to train" in outcome.err


def test_added_files_are_trained_later(copy: Path, tmp_path: Path) -> None:
    """`add` only puts files in the stream; `train` without files trains them, by priority and then in order."""
    files = [
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.chat_rows(4, seed)) for seed, name in enumerate("abc", 20)
    ]
    added = onward("add", *files[:2], "--run", copy, "--json")
    assert 0 == added.status, added.err
    assert ["a.jsonl", "b.jsonl"] == [entry["name"] for entry in added.json]
    assert [
        "name", "sha256", "rows", "tokens", "truncated", "dropped", "split", "lost_tokens", "bad_rows", "note"
    ] == list(added.json[0])  # fmt: skip
    assert 0 == onward("add", files[2], "--priority", "high", "--run", copy).status
    waiting = onward("status", "--run", copy, "--json").json
    assert (3, 4) == (waiting["queue"], waiting["global_step"])
    done = onward("train", "--run", copy, "--json")
    assert 0 == done.status, done.err
    assert [("c.jsonl", 3), ("a.jsonl", 4), ("b.jsonl", 5)] == [
        (entry["name"], entry["position"]) for entry in done.json
    ]
    assert 0 == onward("status", "--run", copy, "--json").json["queue"]


def test_a_profile_is_a_trace_and_the_top_costs(copy: Path, tmp_path: Path) -> None:
    """`train --profile` leaves a trace in Chrome's format and says what cost most; training is the same."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4, 30))
    outcome = onward("train", file, "--run", copy, "--profile", "--json")
    assert ["a.jsonl"] == [entry["name"] for entry in outcome.json]
    assert "aten::mm" in outcome.err
    trace = json.loads((copy / "logs" / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_a_profile_of_a_device_is_of_its_kernels() -> None:
    """An operation has the time of the kernels that it launched, too: counted twice, every share would be half."""
    times = (("mm", "CPU", 3e6), ("gemm", "CUDA", 3e6), ("span", "CUDA", 4e6), ("copy", "CUDA", 1e6))
    mm, kernel, span, copying = (
        SimpleNamespace(
            key=key,
            count=2,
            device_type=SimpleNamespace(name=device),
            is_user_annotation=key == "span",
            self_cpu_time_total=2e3,
            self_device_time_total=time,
        )
        for key, device, time in times
    )
    lines = [line.split() for line in table_of([mm, copying, span, kernel]).splitlines()]
    assert [["75.0%", "3000", "ms", "2", "calls", "gemm"], ["25.0%", "1000", "ms", "2", "calls", "copy"]] == lines
    assert ["100.0%", "2", "ms", "2", "calls", "mm"] == table_of([mm]).split()


def test_what_the_stream_still_owes_may_be_given_again(copy: Path, tmp_path: Path) -> None:
    """Repeating `add` or `train` while the file waits is no error: a command may be repeated after a kill.

    The same content under another name is no repetition, and is refused.
    """
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4, 30))
    assert 0 == onward("add", file, "--run", copy).status
    again = onward("add", file, "--run", copy)
    assert (0, True) == (again.status, "1 was already in the stream" in again.err)
    (tmp_path / "b.jsonl").write_bytes(file.read_bytes())
    renamed = onward("add", tmp_path / "b.jsonl", "--run", copy)
    assert (3, True) == (renamed.status, "onward add --again FILE" in renamed.err)
    done = onward("train", file, "--run", copy, "--json")
    assert ["a.jsonl"] == [entry["name"] for entry in done.json]


def test_results_go_to_stdout_and_messages_to_stderr(model: Path, tmp_path: Path) -> None:
    """Without --json `train` writes nothing to stdout; its lines tell file, step, loss, rate, speed and time left."""
    run = make_run(tmp_path / "run", model)
    outcome = onward("train", tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(8)), "--run", run)
    assert (0, "") == (outcome.status, outcome.out)
    lines = outcome.err.splitlines()
    assert "file 1: a.jsonl, 8 rows, 2 steps (handover bitwise)" == lines[0]
    for number, line in enumerate(lines[1:3], start=1):
        assert line.startswith(f"  step {number} ({number}/2)  loss ")
        assert [] == [word for word in ("lr ", " tokens/s", "ETA ") if word not in line]
    kept = "weights, optimizer, scheduler, RNG"
    assert f"committed checkpoint-2 ({kept}); removed checkpoint-0; restore point step-2" == lines[3]
    assert ["file 1 done: steps 1-2 committed"] == lines[4:]
    assert "\x1b" not in outcome.err
    for command in ("status", "history", "verify"):
        shown = onward(command, "--run", run)
        assert (0, "") == (shown.status, shown.err)
        assert shown.out


def test_json_is_all_that_stdout_holds(model: Path, tmp_path: Path) -> None:
    """With --json every reporting command prints one JSON value and nothing else."""
    run = tmp_path / "run"
    made = onward("init", run, "--model", model, "--set", "batch_size=4", "--json")
    assert (str(run), 4) == (made.json["run"], made.json["config"]["batch_size"])
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(8))
    assert [HISTORY_KEYS] == [list(entry) for entry in onward("train", file, "--run", run, "--json").json]
    proof = onward("verify", "--run", run, "--json").json
    assert proof["ok"] is True
    back = onward("rollback", "--to", "step-0", "--yes", "--run", run, "--json").json
    assert {"global_step": 0, "undone": ["a.jsonl"]} == {key: back[key] for key in ("global_step", "undone")}
    assert 0 == onward("reset", "--yes", "--run", run, "--json").json["global_step"]
    assert isinstance(onward("doctor", "--run", run, "--json").json, list)


def test_the_run_is_found_by_option_variable_or_place(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--run` goes before ONWARD_RUN, which goes before the current directory."""
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(trained)
    monkeypatch.delenv("ONWARD_RUN", raising=False)
    assert 4 == onward("status", "--json").json["global_step"]
    monkeypatch.chdir(other)
    assert 2 == onward("status").status
    monkeypatch.setenv("ONWARD_RUN", str(trained))
    assert str(trained) == onward("status", "--json").json["run"]
    assert 2 == onward("status", "--run", other).status
    assert 4 == onward("status", "--run", os.path.relpath(trained), "--json").json["global_step"]


def test_init_makes_a_run_where_one_stands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` without a directory uses --run, ONWARD_RUN or the current directory, and says what to type next."""
    monkeypatch.delenv("ONWARD_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    here = onward("init", "--model", model)
    assert (0, "") == (here.status, here.out)
    assert "onward train FILE..." in here.err
    assert (tmp_path / "onward.yaml").is_file()
    assert 0 == onward("init", "below", "--model", model).status
    assert 0 == onward("init", "--run", "beside", "--model", model).status
    assert all((tmp_path / name / "ledger.sqlite3").is_file() for name in ("below", "beside"))


def test_one_run_in_two_processes(trained: Path, copy: Path, program: Path, tmp_path: Path) -> None:
    """A file trained by `onward` in a process of its own continues the run, bit for bit handed over."""
    file = tiny.write_jsonl(tmp_path / "3.jsonl", tiny.chat_rows(8, 3))
    environment = {**os.environ, "ONWARD_RUN": str(copy)}
    command = [program, "train", file, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    assert [(3, 5, 6, "bitwise")] == [
        (entry["position"], entry["first_step"], entry["last_step"], entry["handover"])
        for entry in json.loads(done.stdout)
    ]
    assert 4 == onward("status", "--run", trained, "--json").json["global_step"]


def test_a_reader_that_leaves_early_is_no_failure(trained: Path) -> None:
    """`onward history | head -0` ends quietly: nothing on stderr, no traceback."""
    program = f"{shlex.quote(sys.executable)} -m onward"
    command = f"{program} history | true; {program} status | true"
    environment = {**os.environ, "ONWARD_RUN": str(trained), "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert "" == done.stderr


def test_a_terminal_of_another_encoding_gets_its_answer(model: Path, tmp_path: Path) -> None:
    """Names that the terminal's encoding lacks are shown escaped; they crash nothing."""
    run = make_run(tmp_path / "run", model)
    assert 0 == onward("add", tiny.write_jsonl(tmp_path / "中.jsonl", tiny.chat_rows(2)), "--run", run).status
    for arguments in (["history"], ["history", "--json"], ["status"]):
        shown = onward_process(*arguments, "--run", run, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert (0, "") == (shown.status, shown.err)
    assert "queued" in onward_process("history", "--run", run, PYTHONIOENCODING="ascii").out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file here that refuses every write")
def test_a_refusal_that_cannot_be_written_keeps_its_status(tmp_path: Path) -> None:
    """Where stderr is a file on a full disk, the exit status still says what happened."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "onward", "status", "--run", tmp_path], stderr=full, check=False)
    assert 2 == done.returncode
