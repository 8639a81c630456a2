"""Places that a machine lacks: for models, for temporary files, where a command is typed."""

from __future__ import annotations

import errno
import os
import shlex
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import assert_refused, onward

import onward as onward_package
from onward import status
from onward.cli import entry


@pytest.mark.parametrize("command", [("status",), ("init", "new")])
def test_a_current_directory_that_was_removed_is_said(command: tuple[str, ...], tmp_path: Path) -> None:
    """As by `rm -r` in another terminal; MKL would end the process with an error of its own."""
    words = shlex.join([sys.executable, "-m", "onward", *command])
    script = f"cd {shlex.quote(str(tmp_path))}; mkdir a; cd a; rmdir ../a; {words}"
    environment = {**os.environ, "PYTHONPATH": str(Path(onward_package.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert 2 == done.returncode
    assert "the current directory was removed" in done.stderr


def test_no_place_for_models_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the default model cannot be kept, or no home directory is known, as in a container with any user."""
    monkeypatch.setenv("ONWARD_CACHE", "/proc/nowhere")
    assert_refused(onward("init", tmp_path / "new"), 1, "[/proc/nowhere", "Set ONWARD_CACHE")
    with pytest.raises(RuntimeError) as raised:
        Path("~nobody-of-this-name").expanduser()
    words = entry._about_machine(raised.value)
    assert words is not None
    assert (2, True) == (words.exit_status, str(words.hint).startswith("Set HOME"))


def test_no_place_for_temporary_files_names_the_variable(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose file systems are read-only but for the run, as in a hardened container."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert_refused(onward("verify", "--deep", "--run", untouched), 1, "No usable temporary directory", "Set TMPDIR")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "Free some space, then repeat the command"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "Free some space, then repeat the command"),
        (sqlite3.OperationalError("database or disk is full"), "Free some space, then repeat the command"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "x"), "onward doctor says more"),
        (sqlite3.OperationalError("disk I/O error"), "onward doctor says more"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_said(error: Exception, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever command meets it; `doctor` cannot tell more of a full disk."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(status, "read_history", fail)
    assert_refused(onward("history"), 1, str(error.args[-1]), hint)
