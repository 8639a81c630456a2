"""What observers cost training: the page in a browser, a tracker, and a chat alongside it.

`python bench/beside.py [STEPS ROUNDS]`. The same steps are trained alone, with page and tracker, with an open chat too,
and with a chat that is asked every few seconds, in turn. The time lost is that of the steps, each at its median over
the rounds. On a machine with other work, that says little; the processor seconds of what runs alongside training, as a
share of those of training itself, show how much can be lost if training has all cores. The page is followed by Debian's
chromium with playwright, or else by a plain reader of its events, and the tracker is TensorBoard if it is installed.
The server's own cost is reported separately from that of the browser, which is often on another machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import measuring
from page import FLAGS, TOKEN, served

from onward import Run
from onward.store.ledger import Ledger

SHARES = ("all", "server", "started")
SIDES = ("alone", "page", "open chat", "asked chat")
GOALS = {"page": 0.01, "open chat": 0.03}
ASK_SECONDS, LOOK_SECONDS = 10.0, 0.2
BATCH, WARM = 8, 5
"""Rows per step, and initial steps that are not counted."""


class Watched:
    """Repeatedly samples the processor seconds of processes and all that they start."""

    def __init__(self, *roots: int) -> None:
        self._roots = roots
        self._seen: list[tuple[float, dict[int, float]]] = [(time.time(), self._seconds())]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> dict[int, float]:
        """Return the seconds that each process took between two moments; for one that ended, as far as it was seen."""
        before: dict[int, float] = {}
        found: dict[int, float] = {}
        for moment, seconds in self._seen:
            if moment <= begin:
                before |= seconds
            if moment <= end:
                found |= seconds
        return {pid: seconds - before.get(pid, 0.0) for pid, seconds in found.items()}

    def _work(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._seen.append((time.time(), self._seconds()))

    def _seconds(self) -> dict[int, float]:
        everything = _processes()
        ours = {*self._roots, *(pid for root in self._roots for pid in _descendants(root, everything))}
        return {pid: everything[pid][1] for pid in ours if pid in everything}


def _processes() -> dict[int, tuple[int, float]]:
    """Return every process with its parent and its processor seconds so far."""
    found: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(path.parent.name)] = int(fields[1]), seconds
    return found


def _descendants(root: int, processes: dict[int, tuple[int, float]]) -> set[int]:
    found: set[int] = set()
    new = {root}
    while new:
        new = {pid for pid, (parent, _) in processes.items() if parent in new} - found
        found |= new
    return found


@contextlib.contextmanager
def looking(run: Path) -> Iterator[list[int]]:
    """Serve the page to a browser that follows it; yield the processes involved."""
    with served(run) as page:
        pids = [page.process.pid]
        chromium = shutil.which("chromium")
        if chromium is None or importlib.util.find_spec("playwright") is None:
            with _reading(page.link):
                yield pids
            return
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            before = _descendants(os.getpid(), _processes())
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            tab.goto(page.link)
            tab.wait_for_selector("#curve[data-ready]")
            yield [*pids, *(_descendants(os.getpid(), _processes()) - before)]
            browser.close()


@contextlib.contextmanager
def _reading(link: str) -> Generator[None]:
    address = link.partition("?")[0] + "api/events"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request) as events:
        threading.Thread(target=_drain, args=(events,), daemon=True).start()
        yield


def _drain(events: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed while it is read
        for _ in events:
            pass


@contextlib.contextmanager
def talking(run: Path, *, is_asked: bool) -> Iterator[list[int]]:
    """Chat with the run: one question before it trains and, with `is_asked`, more; yield the process."""
    words = measuring.python("-m", "onward", "chat", "--refresh", "--max-tokens", 32, "--run", run)
    chat = subprocess.Popen(
        words, env=measuring.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"What does it return?\n")
    chat.stdin.flush()
    chat.stdout.readline()  # now it is loaded and answers
    threading.Thread(target=chat.stdout.read, daemon=True).start()
    ended = threading.Event()

    def ask() -> None:
        assert chat.stdin is not None
        with contextlib.suppress(OSError):
            while not ended.wait(ASK_SECONDS if is_asked else None):
                chat.stdin.write(b"What does it return?\n")
                chat.stdin.flush()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield [chat.pid]
    finally:
        ended.set()
        asking.join()
        chat.terminate()
        chat.wait()


def one(side: str, made: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Train the rows once with a side's observers; return step seconds and the processor seconds of the observers."""
    run = folder / side
    shutil.copytree(made, run)
    has_tracker = side != "alone" and importlib.util.find_spec("tensorboard") is not None
    settings = ["track: [tensorboard]"] if has_tracker else []
    config = run / "onward.yaml"
    config.write_text("\n".join([config.read_text(encoding="utf-8"), *settings, ""]), encoding="utf-8")
    with contextlib.ExitStack() as open_:
        pids: list[int] = []
        if side != "alone":
            pids += open_.enter_context(looking(run))
        if "chat" in side:
            pids += open_.enter_context(talking(run, is_asked=side == "asked chat"))
        words = measuring.python("-m", "onward", "train", rows, "--run", run)
        training = subprocess.Popen(words, env=measuring.environment(), stderr=subprocess.PIPE, text=True)
        watched = Watched(*pids, training.pid)
        said = training.communicate()[1]
        watched.end()
    if training.returncode:
        raise RuntimeError(said[-2000:])
    with Ledger(run / "ledger.sqlite3", read_only=True) as ledger:
        steps = ledger.steps(ledger.files("done")[-1].id)
        first, last = (ledger.step_time(step) for step in (steps[WARM], steps[-1]))
    shutil.rmtree(run)
    spent = watched.between(first or 0.0, last or 0.0)
    known = {*pids, training.pid}
    beside = {
        "all": sum(spent.values()) - spent[training.pid],
        "server": spent.get(pids[0], 0.0) if pids else 0.0,
        "started": sum(seconds for pid, seconds in spent.items() if pid not in known),
    }
    shares = {name: seconds / spent[training.pid] for name, seconds in beside.items()}
    return {"seconds": [step.seconds for step in steps[WARM:]], "shares": shares, "tracker": has_tracker}


def measure(steps: int = 60, rounds: int = 2) -> dict[str, Any]:
    """Return the cost of each side."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = measuring.small_llama(work / "model")
        first = measuring.write_rows(work / "first.jsonl", 4 * BATCH, longest=600)
        rows = measuring.write_rows(work / "rows.jsonl", steps * BATCH, skip=4 * BATCH, longest=600)
        run = Run.create(work / "made", str(model), batch_size=BATCH, save_steps=20, warmup_steps=0, max_length=256)
        run.train(first)
        found = measuring.interleaved(SIDES, rounds, lambda side: one(side, run.layout.root, rows, work))
    usual = {
        side: sum(statistics.median(step) for step in zip(*(entry["seconds"] for entry in entries), strict=True))
        for side, entries in found.items()
    }
    shares = {
        side: {name: statistics.median(entry["shares"][name] for entry in entries) for name in SHARES}
        for side, entries in found.items()
    }
    figures: dict[str, Any] = {"steps": steps, "rounds": rounds, "tracker": found["page"][0]["tracker"]}
    for side in SIDES[1:]:  # training starts processes of its own even when alone
        share = shares[side]["all"] - shares["alone"]["all"]
        figures[side] = {
            "time_lost": usual[side] / usual["alone"] - 1,
            "processor_share": measuring.held_against(GOALS[side], share, at_most=True) if side in GOALS else share,
            "of_the_page_server": shares[side]["server"],
            "of_the_tracker": shares[side]["started"] - shares["alone"]["started"],
        }
    return figures


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
