"""Takes the pictures of docs/page.md: the page of a run in Debian's chromium, driven by playwright.

`python docs/pictures.py RUN [FOLDER]` writes `page-light.png`, `page-dark.png`, `page-narrow.png` and `page-rows.png`
next to this file, or into the folder (`make browser` brings what it needs). Take a run that trains: the page is live.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
PICTURES = {"light": (1440, 1000, "light"), "dark": (1440, 1000, "dark"), "narrow": (390, 844, "light")}
"""Width, height and colour scheme of each picture of the whole page."""
PATIENCE = 300_000
"""Milliseconds that a step may take on a machine that does other things too."""


def take(link: str, folder: Path) -> None:
    """Open the page behind a link and write its pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=list(FLAGS), timeout=PATIENCE
        )
        context = browser.new_context()
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(link)
        page.wait_for_selector("#curve[data-ready]")
        for name, (width, height, scheme) in PICTURES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(1500)  # the charts follow the width
            page.screenshot(path=folder / f"page-{name}.png", timeout=PATIENCE)
        _rows(page, folder)
        browser.close()


def _rows(page: Any, folder: Path) -> None:
    """Open the newest file and write the picture of its rows."""
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.locator("#files button.name").first.click()
    page.wait_for_selector(".row")
    page.screenshot(path=folder / "page-rows.png", timeout=PATIENCE)


def main() -> None:
    """Serve the page of the run that is named, and take its pictures."""
    run, folder = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
    words = [sys.executable, "-m", "onward", "page", "--port", "0", "--run", run]
    page = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout is not None
        take(page.stdout.readline().strip(), folder)
    finally:
        page.terminate()
        page.wait()


if __name__ == "__main__":
    main()
