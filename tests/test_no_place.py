"""Places that a machine lacks: for models, for temporary files, where a command is typed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import assert_refused, onward

import onward as onward_package
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
