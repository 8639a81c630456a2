"""What all tests share: one tiny model, and one thread so that they can run side by side."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes that tests start
os.environ.pop("PYTHONUNBUFFERED", None)  # they keep what they print in buffers, as they do for users
for name in ("ONWARD_RUN", "ONWARD_API_KEY", "ONWARD_PAGE_TOKEN", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
    os.environ.pop(name, None)  # of the shell, or of the CI, in which the tests run

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("exploring", deadline=None, print_blob=True)
settings.load_profile("exploring" if os.environ.get("ONWARD_SOAK") else "repeatable")


MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory."""


def pytest_configure(config: pytest.Config) -> None:
    """Compute with one thread. The process that only hands out tests to workers needs no torch, nor its seconds.

    Where memory allows, files are kept in it: the suite forces tens of thousands of them to the disk, and no test cuts
    the power.
    """
    if MEMORY.is_mount() and shutil.disk_usage(MEMORY).free >= 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Put what was imported out of the collector's way: going through it takes a third of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of one layer with a byte-level tokenizer."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run that has trained one file; every test here must leave it as it is."""
    from commands import make_run, onward

    directory = make_run(tmp_path_factory.mktemp("refusals") / "run", model)
    outcome = onward("train", tiny.write_jsonl(directory.parent / "good.jsonl", tiny.chat_rows(8)), "--run", directory)
    assert 0 == outcome.status, outcome.err
    return directory


@pytest.fixture
def untouched(run: Path) -> Iterator[Path]:
    """The run; the test fails if anything of it has changed at its end."""
    from commands import snapshot

    before = snapshot(run)
    yield run
    assert before == snapshot(run)


@pytest.fixture(scope="session")
def program() -> Iterator[Path]:
    """The program `onward` for shells, which is forked and so starts at once."""
    from launcher import make_program

    with tempfile.TemporaryDirectory(prefix="onward-") as folder:
        yield make_program(Path(folder))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let each worker begin with a part of its own, whose fixtures it makes alone, and end with what another has left.

    What xdist does by itself, handing out tests in turn, makes every fixture of a module in every worker.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes never name a test: compressed ones contain the time, and workers must collect the same names."""
    del config
    return argname if isinstance(val, bytes) else None
