"""The HTML pages. Scripts insert everything about a run, as text."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from onward.version import __version__

HERE = Path(__file__).parent
STATIC = HERE / "static"
OF_LIST = "runs.js"
"""The script of the list of runs; all others are those of a run's page."""
_PAGES = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)


def run_page(title: str, *, home: bool, read_only: bool) -> HTMLResponse:
    """Return the page of a run; `home` says whether there is a list of runs to go back to."""
    root = "../../" if home else ""
    scripts = sorted(path.name for path in (STATIC / "js").glob("*.js") if path.name != OF_LIST)
    return _page(
        "run.html", title=title, root=root, home=home, read_only=read_only, scripts=scripts, version=__version__
    )


def list_page() -> HTMLResponse:
    """Return the page that lists runs."""
    return _page("runs.html", title="Runs", root="", version=__version__)


def closed_page() -> HTMLResponse:
    """Return the page for visitors without the token."""
    return _page("closed.html", status=401, title="Closed", root="/")


def enter_page(target: str) -> HTMLResponse:
    """Return a page that forwards to `target` by itself."""
    return _page("enter.html", title="Opening", root="/", target=target)


def _page(name: str, status: int = 200, **values: object) -> HTMLResponse:
    return HTMLResponse(_PAGES.get_template(name).render(**values), status)
