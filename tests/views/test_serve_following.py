"""A server that follows switches to the newest commit by itself, and says what keeps it from that."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from faults import copy_run
from torch import nn

from onward import Run
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.views.chat.engine import Engine
from onward.views.loaded import load
from onward.views.points import hold, state_mark

pytest.importorskip("uvicorn", reason="onward[serve] is not installed")
pytest.importorskip("starlette", reason="onward[serve] is not installed")

from onward.views.serve.server import Following


def test_a_server_looks_by_itself_and_gives_way_to_who_trains(stream: Path, tmp_path: Path) -> None:
    """Another commit answers without a request for it; before it is loaded, the server gives way to the run's owner."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with hold(layout, "b.jsonl") as point, Engine(load(layout, point)) as engine:
        with RunLock(layout.lock), Following(layout, engine, "another", said.put, lambda: said.put("gives way")):
            found = [said.get(timeout=60), said.get(timeout=60)]
        assert ["gives way", "step 5, after file 3 (c.jsonl) answers"] == found
        assert "onward-follow" not in [thread.name for thread in threading.enumerate()]
        following = Following(layout, engine, "another", said.put, lambda: said.put("gives way"))
        following.look()
        following.look()
    assert ("step 5, after file 3 (c.jsonl) answers", True) == (said.get(timeout=60), said.empty())  # nobody trains


@pytest.mark.parametrize("name", [".lock", "onward.yaml"])
def test_a_disk_that_fails_is_said_once_and_looked_at_again(stream: Path, tmp_path: Path, name: str) -> None:
    """What fails now is no reason to stop looking: when the disk is back, the newest commit answers."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    said: list[str] = []
    with hold(layout, "b.jsonl") as point, Engine(load(layout, point)) as engine:
        following = Following(layout, engine, "another", said.append, lambda: None)
        place, aside = layout.root / name, tmp_path / "aside"
        if place.exists():
            place.rename(aside)
        place.symlink_to(place)  # nothing at this name can be opened
        for _ in range(3):
            following.try_to_look()
        (problem,) = said
        assert problem.startswith("the newest commit cannot be loaded: ")
        assert "Too many levels of symbolic links" in problem
        place.unlink()
        if aside.exists():
            aside.rename(place)
        following.try_to_look()
    assert [problem, "step 5, after file 3 (c.jsonl) answers"] == said


class Full(nn.Module):
    """A model on a device that has no memory left for another one."""

    @property
    def device(self) -> torch.device:
        raise RuntimeError("CUDA out of memory")


def test_a_run_without_a_commit_is_said_once_and_the_old_one_answers(stream: Path, tmp_path: Path) -> None:
    """Whoever resets a run that is served reads one line in its log, not one every second; so does whoever serves it
    where there is no memory for the next commit."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    said: list[str] = []
    with hold(layout) as point, Engine(load(layout, point)) as engine:
        with Engine(replace(engine.loaded, model=Full())) as full:
            following = Following(layout, full, "another", said.append, lambda: None)
            following.try_to_look()
            following.try_to_look()
        no_memory = "the newest commit cannot be loaded: the state cannot be loaded: CUDA out of memory"
        assert [no_memory] == [line.partition(" [")[0] for line in said]
        said.clear()
        following = Following(layout, engine, state_mark(layout), said.append, lambda: None)
        Run(layout.root).reset()
        for _ in range(3):
            following.try_to_look()
        assert ["the newest commit cannot be loaded: nothing has been committed yet"] == [
            line.partition(" [")[0] for line in said
        ]
        assert "step 5, after file 3 (c.jsonl)" == engine.loaded.label
        Run(layout.root).train(tiny.write_jsonl(tmp_path / "new.jsonl", tiny.chat_rows(2, 9)))
        following.try_to_look()
    assert "after file 1 (new.jsonl) answers" in said[-1]
