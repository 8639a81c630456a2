"""Write the pages of docs/ that are made from the code: config.md, file-formats.md, cli.md.

python docs/generate.py           write them
python docs/generate.py --check   write nothing; exit status 1 when one is stale
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from made_pages.cli import cli_page
from made_pages.config import config_page
from made_pages.formats import formats_page

from onward.config.schema import schema_text

DOCS = Path(__file__).parent
PAGES: Mapping[str, Callable[[], str]] = {
    "config.md": config_page,
    "file-formats.md": formats_page,
    "cli.md": cli_page,
    "onward.schema.json": schema_text,
}
"""The pages by file name."""


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` say which are stale; returns the exit status."""
    os.environ.pop("ONWARD_RUN", None)
    stale: list[str] = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    if "--check" not in arguments:
        print(f"written: {', '.join(stale) or 'nothing; all pages are fresh'}")
        return 0
    if stale:
        print(f"stale: {', '.join(stale)}; python docs/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
