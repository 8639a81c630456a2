"""The systemd unit: who runs it, and paths that arrive as they are."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import NAMES

from onward.errors import UsageError
from onward.service.outside.unit import Host, systemd_unit

NOBODY = 65534


def host(run: Path, uid: int | None = None, **environment: str) -> Host:
    """A place with a Python inside the run's directory, so that its path is as hard to write."""
    python = run / "python"
    if not python.exists():
        python.symlink_to(sys.executable)
    return Host(os.geteuid() if uid is None else uid, 0o077, str(python), environment)


def values(unit: str, key: str) -> list[str]:
    """Return the values of a key."""
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{key}=")]


@pytest.mark.parametrize("name", NAMES)
def test_paths_arrive_as_they_are(name: str, tmp_path: Path) -> None:
    """Read by the rules of systemd.syntax(7), each command and path names the run, whatever characters it has."""
    run = tmp_path / name
    run.mkdir()
    unit = systemd_unit(run, host=host(run, ONWARD_CACHE=f"{run}/cache"))
    for command, verb in ((values(unit, "ExecStart"), "watch"), (values(unit, "ExecStop"), "stop")):
        words = [word.replace("%%", "%") for word in shlex.split(command[0])]
        *program, safe, module, onward, action, option, place = words
        assert ["-P", "-m", "onward", verb, "--run"] == [safe, module, onward, action, option]
        assert str(run) == place.replace("$$", "$")
        assert f"{run}/python" == (program[-1].replace("$$", "$") if len(program) > 1 else program[0])
        assert len(program) == 1 or "/usr/bin/env" == program[0]
    assert [str(run)] == [value.replace("%%", "%").removesuffix("/") for value in values(unit, "WorkingDirectory")]
    writable = [shlex.split(value)[0].replace("%%", "%") for value in values(unit, "ReadWritePaths")]
    assert [str(run), f"-{run}/cache"] == writable[:2]
    assert [f"ONWARD_CACHE={run}/cache"] == [
        shlex.split(value)[0].replace("%%", "%") for value in values(unit, "Environment")
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("name", NAMES)
def test_systemd_takes_it(name: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` finds the program at its path and reports nothing."""
    run = tmp_path / name
    run.mkdir()
    unit = tmp_path / "onward-test.service"
    unit.write_text(systemd_unit(run, host=host(run)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert [] == [line for line in done.stderr.splitlines() if str(tmp_path) in line or "onward" in line]


def test_root_prints_it_for_the_owner(tmp_path: Path) -> None:
    """Printed by root it runs as the owner of the directory; as root only where that is root's, and then it says so."""
    own = systemd_unit(tmp_path, host=host(tmp_path, uid=os.getuid() or NOBODY))
    assert 1 == len(values(own, "User"))
    if os.getuid() == 0:
        assert ["root"] == values(systemd_unit(tmp_path, host=host(tmp_path, uid=0)), "User")
        assert "# Runs as root, since the run's directory belongs to root." in systemd_unit(tmp_path)
        os.chown(tmp_path, NOBODY, NOBODY)
    unit = systemd_unit(tmp_path, host=host(tmp_path, uid=0))
    assert "root" not in values(unit, "User")
    assert "Runs as root" not in unit


def test_a_user_can_be_named(tmp_path: Path) -> None:
    """`--user` names who runs it; one that is not there is refused."""
    assert ["nobody"] == values(systemd_unit(tmp_path, "nobody", host(tmp_path)), "User")
    with pytest.raises(UsageError, match="no such user"):
        systemd_unit(tmp_path, "nobody-of-that-name", host(tmp_path))


def test_it_may_write_to_the_run_and_little_else(tmp_path: Path) -> None:
    """The system is read-only but for run, inbox and caches; privileges are dropped; the umask is the printer's."""
    run, inbox = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    inbox.mkdir()
    (run / "inbox").symlink_to(inbox)
    unit = systemd_unit(run, "nobody", host(run, XDG_CACHE_HOME="/var/cache/x"))
    writable = [str(run), f"-{inbox}", "-/var/cache/x/onward", "-/var/cache/x/huggingface"]
    assert writable == values(unit, "ReadWritePaths")
    expected = {
        "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "ProtectSystem": "strict", "ProtectHome": "read-only",
        "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6", "UMask": "0077",
    }  # fmt: skip
    assert expected == {key: values(unit, key)[0] for key in expected}
    assert [] == values(unit, "MemoryDenyWriteExecute")
    several = systemd_unit(run, "nobody", host(run), devices="2:8")
    expected = {"NotifyAccess": "all", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK"}
    assert expected == {key: values(several, key)[0] for key in expected}
    assert ["main"] == values(unit, "NotifyAccess")
    places = {place: values(systemd_unit(Path(place), "nobody", host(run)), "PrivateTmp") for place in ("/", "/tmp")}
    assert {"/": ["yes"], "/tmp": ["no"]} == places


def test_a_path_with_control_characters_is_refused(tmp_path: Path) -> None:
    """A unit has one setting a line, so a path with a newline could smuggle in settings: it is refused."""
    run = tmp_path / "a\nUser=root"
    run.mkdir()
    with pytest.raises(UsageError, match="control characters"):
        systemd_unit(run, host=Host(1, 0o022, sys.executable, {}))
