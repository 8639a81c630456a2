"""The page on a very long run: what it costs to open it, address by address and in a browser.

`python bench/page.py [FILES STEPS]`. The run is synthetic: its ledger has that many files and steps, with handovers,
events and a grid as training writes them. Each figure is given for a page that was just started, the worst case, and
for one that has added up the run. Bytes read are those that the page read from files: the cost of a request on any
machine. The browser is Debian's chromium, driven by playwright; without them those figures are left out.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from measuring import environment, held_against, python, spread

from onward.layout import RunLayout
from onward.store.ledger import Ledger, make_ledger

SECONDS_GOAL = 1.0
TOKEN = "a-token-for-this-measurement"
ADDRESSES = ("/", "/api/status", "/api/curve?points=2000", "/api/history", "/api/overview", "/api/metrics")
MEASURED = 12
"""How many files each boundary measures: a sample, as the share for evaluation allows."""
ROUNDS = 3
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
DRAWN = """
    window.drawn = {};
    new MutationObserver(() => {
      const now = performance.now(), curve = document.getElementById("curve");
      if (!drawn.curve && document.querySelector("#chart-loss canvas")) drawn.curve = now;
      if (!drawn.all && curve && curve.hasAttribute("data-ready")) drawn.all = now;
    }).observe(document, { subtree: true, childList: true, attributes: true });
"""
STEPS = """
    INSERT INTO steps WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
    SELECT ?, ? + i, i, 0, 8, 'd41d8cd98f00b204', 900 + i % 97, 500, 2.0 + (i * 7919 % 1000) / 1000.0, 1e-4,
        0.5 + (i * 104729 % 1000) / 1000.0, 0.4, 0, NULL FROM n
"""
TIMES = "INSERT INTO step_times SELECT file_id, step, 1.7e9 + step * 0.4 FROM steps WHERE file_id = ?"


def make_run(root: Path, files: int, steps: int) -> RunLayout:
    """Make a run of `files` finished files with `steps` steps in all, as its ledger would have it."""
    layout = RunLayout(root)
    root.mkdir()
    layout.make()
    layout.config.write_text("model: smollm2-135m\n", encoding="utf-8")
    make_ledger(layout.ledger)
    each = steps // files
    with Ledger(layout.ledger, clock=lambda: 1.7e9) as ledger, ledger.transaction():
        for position in range(1, files + 1):
            _add_file(ledger, position, each)
    return layout


def _add_file(ledger: Ledger, position: int, steps: int) -> None:
    """Record one finished file with everything that training records about it."""
    before = (position - 1) * steps
    name = f"day-{position:05}.jsonl"
    file_id = ledger.insert_file(
        command="c", name=name, sha256=_sha256(position), bytes=1 << 20, format="jsonl", copy=f"archive/{name}",
        state="done", position=position, rows=8 * steps, tokens=900 * steps, target_tokens=500 * steps,
        start_step=before, planned_steps=steps, finished=1.7e9 + position,
    )  # fmt: skip
    ledger.write(STEPS, steps, file_id, before)
    ledger.write(TIMES, file_id)
    measured = {"weights": "0" * 64, "optimizer": "0" * 64, "adam_step": before, "probe_loss": 2.5, "lr": 1e-4}
    text = json.dumps(measured)
    ledger.add_handover(
        kind="boundary", step=before, file_id=file_id, name="bitwise", before=text, after=text, difference=0.0
    )
    number = ledger.begin_checkpoint(step=before + steps, file_id=file_id, boundary=1, state_digest="0", basis="0")
    ledger.commit_checkpoint(number, size=1 << 20, seconds=0.1)
    for word in ("accepted", "begins", "is done"):
        ledger.add_event("info", f"{name} {word}", before)
    scores = {
        _sha256(max(1, position - place)): {"loss": 2.0, "accuracy": 0.5, "rows": 8, "trained": False}
        for place in range(MEASURED)
    }
    grid = {"model": scores, "base": scores, "anchor": None, "names": {}, "cost": 9000}
    ledger.keep_boundary_results(file_id, before + steps, {"grid": grid})


def _sha256(position: int) -> str:
    return f"{position:064x}"


@dataclass(frozen=True)
class Served:
    """A page in a process of its own."""

    process: subprocess.Popen[str]
    link: str

    def ask(self, path: str) -> dict[str, float]:
        """Make one request; return its wall and CPU seconds, the bytes that were read and those of the answer."""
        address = urlsplit(self.link)
        cpu, read, begun = self._cpu(), self._read(), time.perf_counter()
        connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 0), timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        size = len(answer.read())
        wall = time.perf_counter() - begun
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}")
        return {"seconds": wall, "cpu": self._cpu() - cpu, "read": self._read() - read, "bytes": size}

    def settle(self) -> None:
        """Wait until the page has added up the run and no longer reads anything."""
        before = -1
        while before != (now := self._read()):
            before = now
            time.sleep(0.5)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        return int(lines[0].removeprefix("rchar: "))


@contextlib.contextmanager
def served(root: Path) -> Generator[Served]:
    """Start `onward page` on a run; it ends with the body."""
    command = python("-m", "onward", "page", "--port", "0", "--run", root)
    process = subprocess.Popen(
        command, env={**environment(), "ONWARD_PAGE_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield Served(process, process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait()


def addresses(root: Path) -> dict[str, Any]:
    """Return what each address costs, right after the start and once the run is added up."""
    found: dict[str, Any] = {}
    for path in ADDRESSES:
        with served(root) as page:
            first = page.ask(path)
            page.settle()
            found[path] = {"first": first, "later": page.ask(path)}
    return found


def in_browser(root: Path) -> dict[str, list[float]] | None:
    """Return the seconds until the curve is drawn and until everything is shown, each with a page just started."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        return None
    if chromium is None:
        return None
    found: dict[str, list[float]] = {"curve": [], "all": [], "curve_later": [], "all_later": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for _ in range(ROUNDS):
            with served(root) as page:
                for later in ("", "_later"):
                    if later:
                        page.settle()
                    context = browser.new_context(viewport={"width": 1440, "height": 900})
                    context.add_init_script(DRAWN)
                    tab = context.new_page()
                    tab.goto(page.link)
                    tab.wait_for_selector("#curve[data-ready]")  # the page does not allow text to be evaluated
                    drawn = tab.evaluate("drawn")
                    found[f"curve{later}"].append(drawn["curve"] / 1000)
                    found[f"all{later}"].append(drawn["all"] / 1000)
                    context.close()
        browser.close()
    return found


def measure(files: int = 1000, steps: int = 1_000_000) -> dict[str, Any]:
    """Return what it costs to open the page on a run of this size."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = make_run(Path(scratch) / "run", files, steps)
        size = layout.ledger.stat().st_size
        drawn = in_browser(layout.root)
        found = addresses(layout.root)
    seconds = {} if drawn is None else {name: spread(values) for name, values in drawn.items()}
    if drawn is not None:
        seconds["opens"] = held_against(SECONDS_GOAL, spread(drawn["curve"])["median"], at_most=True)
    return {"files": files, "steps": steps, "ledger_bytes": size, "browser_seconds": seconds, "addresses": found}


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
