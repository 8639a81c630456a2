"""Debian's Chromium, without a screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SECONDS = 240_000
"""Milliseconds that the browser waits for what is to come, on a machine that does other things too."""


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Open a browser, whose `wrong` lists whatever a page's script got wrong; skip the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install -y chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        context = opened.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(SECONDS)
        wrong: list[str] = []
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        context.wrong = wrong
        yield context
        opened.close()
