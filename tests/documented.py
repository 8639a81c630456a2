"""The commands of the documentation, run as written.

A block is run where a comment before it says so: `<!-- run -->`, with the exit statuses that the page allows where they
are others than 0 (`<!-- run: 0 3 -->`), or by a test of its own (`<!-- run in test_push -->`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

import onward

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = Path(onward.__file__).parent
BLOCK = re.compile(
    r"^(?:(?P<run><!-- run(?P<statuses>:[ \d]+)?(?: in (?P<test>test_\w+))? -->)\n)?"
    r"```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$",
    re.M | re.S,
)
SECONDS = 300
"""Seconds that one block may take."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        runnable: whether the page says that it can be run.
        test: the module whose test runs it; None for `test_docs`.
        statuses: exit statuses that the page allows.
    """

    page: Path
    language: str
    body: str
    runnable: bool
    test: str | None
    statuses: frozenset[int]

    def script(self) -> str:
        """Return what a shell runs: the lines after `$` of a console block, or all of it."""
        if self.language != "console":
            return self.body
        return "".join(f"{line[2:]}\n" for line in self.body.splitlines() if line.startswith("$ "))

    def run(self) -> None:
        """Run it in the working directory; it has to end as the page says."""
        if self.language == "python":
            with _same_environment():
                exec(compile(self.body, self.page.name, "exec"), {"__name__": self.page.stem})
        else:
            assert run(self.script()) in self.statuses, self.body


@contextlib.contextmanager
def _same_environment() -> Generator[None]:
    """Have the environment after the body that was there before: other tests run in this process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [
        Block(
            page=page,
            language=match["language"],
            body=match["body"],
            runnable=match["run"] is not None,
            test=match["test"],
            statuses=frozenset(int(word) for word in (match["statuses"] or ": 0").strip(": ").split()),
        )
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def blocks_for(test: str | None, *pages: Path) -> list[Block]:
    """Return the blocks of pages that a test has to run, in order; None is `test_docs`. Every page has one."""
    found = [block for page in pages for block in blocks(page) if block.runnable and block.test == test]
    assert set(pages) == {block.page for block in found}
    return found


def run(script: str) -> int:
    """Run a script in bash; a command that fails ends it. Returns the status as a shell would: 137 for a kill.

    bash is replaced by the last command, and `timeout --signal=KILL` kills itself too.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            ["bash", "-e", "-c", script], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            status = process.wait(SECONDS)
        finally:  # what it left in the background would otherwise go on for ever
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        print(script, said.read())
    return status if status >= 0 else 128 - status


def prepare(program: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `folder` the working directory, `program` the command `onward`, and a tiny model the default one."""
    cache, programs = folder / "cache", folder / "bin"
    default = cache / "models" / "smollm2-135m"
    default.parent.mkdir(parents=True)
    default.symlink_to(model)
    (model / "ORIGIN.json").write_text("{}")
    programs.mkdir()
    (programs / "onward").symlink_to(program)
    (programs / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python3").chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("ONWARD_RUN", raising=False)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{PACKAGE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("ONWARD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
