"""The checks for a GPU are started before their turn, and nothing of that changes what becomes of them."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_gpu_page import GPU, load

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(GPU)}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the suite; its processes find `turns` as they do in `make gpu`."""
    monkeypatch.syspath_prepend(GPU)
    return importlib.import_module("suite")


def script(path: Path, text: str) -> str:
    """Write a script of a check."""
    path.write_text(f"from turns import wait\n{text}\n")
    return str(path)


def test_a_process_waits_for_its_turn(tmp_path: Path) -> None:
    """What a script does after `wait` happens in its turn; what it imports, before."""
    went_on = tmp_path / "went on"
    code = f"import sys, turns; turns.wait('json'); print('json' in sys.modules); open({str(went_on)!r}, 'w').close()"
    process = load("turns").Prepared([sys.executable, "-c", code], ENVIRONMENT)
    process.wait_until_ready(60)
    assert not went_on.exists()
    assert 0 == process.take_turn(60)
    assert went_on.exists()
    assert "True\n" == process.said()


def test_a_script_called_by_hand_does_not_wait() -> None:
    """Nothing is imported ahead and nothing is read if no suite started the process."""
    done = subprocess.run(
        [sys.executable, "-c", "import turns; turns.wait('there_is_no_such'); print('went on')"],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "went on\n" == done.stdout


def test_what_became_of_a_check_is_told_in_its_turn(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies while it waits has failed, a package that it lacks is named, a slow one is ended."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # with which Python colours a traceback, from 3.13 on
    scripts = {
        "good": "wait('json')",
        "dies": "raise SystemExit('it died')",
        "lacks": "wait('there_is_no_such')",
        "slow": "wait(); import time; time.sleep(60)",
        "last": "wait()",
    }
    chosen = [
        suite.Check(
            name, (script(tmp_path / f"{name}.py", text),), 1.0 if name == "slow" else 60.0, quiet=name == "last"
        )
        for name, text in scripts.items()
    ]
    suite.Suite(tmp_path, time.monotonic() + 300, "").run(chosen)
    found = {each["check"]: each["status"] for each in load("record").read(tmp_path / "results.jsonl")}
    expected = {
        "good": "done", "dies": "failed: it died", "lacks": "not run: there_is_no_such missing",
        "slow": "not finished in 1 s", "last": "done",
    }  # fmt: skip
    assert expected == found


def test_a_waiting_process_ends_with_the_suite(tmp_path: Path) -> None:
    """A process whose turn never comes ends by itself when the one that started it is gone."""
    ended = tmp_path / "ended"
    waiting = f"import turns\ntry:\n    turns.wait()\nexcept SystemExit:\n    open({str(ended)!r}, 'w').close()"
    starting = (
        "import os, sys, turns\n"
        f"turns.Prepared([sys.executable, '-c', {waiting!r}], os.environ, apart=True).wait_until_ready(60)\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", starting], env=ENVIRONMENT, check=True)
    patience = time.monotonic() + 60
    while not ended.exists() and time.monotonic() < patience:
        time.sleep(0.05)
    assert ended.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_suite_ends_its_checks_and_shows_what_it_has(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM: no process of a check stays on the GPU, and the page has what was found before."""
    began = tmp_path / "began"
    scripts = [
        script(tmp_path / "first.py", "wait(); import record; record.emit('verify --deep', equal=True)"),
        script(
            tmp_path / "second.py",
            f"import os, time; wait(); print(os.getpid(), file=open({str(began)!r}, 'w'), flush=True); time.sleep(99)",
        ),
    ]
    code = (
        "import signal, sys, suite\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup, it is inherited as ignored\n"
        f"sys.argv = ['suite', '--tiny', '--out', {str(tmp_path / 'out')!r}]\n"
        f"suite.checks = lambda _: [suite.Check(path, (path,)) for path in {scripts!r}]\nsuite.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    patience = time.monotonic() + 60
    while not (began.exists() and began.read_text()) and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert 0 != process.returncode
    assert "| verify --deep | - | == | - |" in said
    assert said.strip() == (tmp_path / "out" / "RESULTS-GPU.md").read_text().strip()
    with pytest.raises(ProcessLookupError):
        os.kill(int(began.read_text()), 0)
