"""Make the documentation a site: `make site`.

The pages link to each other as files of the repository, so that they can be read there. Here they are laid into one
folder, README.md as its first page, with their links adapted, and given to zensical, which refuses a link that leads
nowhere.

python docs/site.py TARGET   lay out the pages and build the site in TARGET/site
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md",
           "CHANGELOG.md": "changelog.md", "bench/RESULTS.md": "results.md", "bench/RESULTS-GPU.md": "results-gpu.md",
           "bench/KNOWLEDGE.md": "results-knowledge.md", "LICENSE": "license.md"}  # fmt: skip
"""Files outside docs/ that become pages, and their names there."""
SECTIONS = {
    "Begin": ("index", "quickstart", "install", "glossary"),
    "Train": ("file-formats", "config", "operations", "launch", "adopting", "python", "cli", "agents"),
    "Look": ("page", "figures", "trackers", "knowledge"),
    "Use": ("chat", "releases", "export", "serve"),
    "Models": ("families", "templates", "adapters"),
    "Machines": ("memory", "gpu", "devices", "sharding", "scale"),
    "Inside": ("architecture", "checkpoint-format", "experiments", "results", "results-gpu", "results-knowledge"),
    "Project": ("changelog", "contributing", "security", "license"),
}
"""The site's navigation: every page stands in one section, in the order in which a reader wants them."""
STYLE = """\
/* Tables of keys: no break within a key, and room for all columns. */
.md-typeset td code { overflow-wrap: break-word; word-break: normal; }
.md-typeset table:not([class]) :is(th, td) { padding: 0.6em 0.7em; }
.md-grid { max-width: 76rem; }
"""
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
SETTINGS = """\
site_name: Onward
docs_dir: pages
site_dir: site
theme:
  name: material
  font: false
  features: [navigation.sections, navigation.top, search.suggest, search.highlight, content.code.copy]
  palette:
    - {media: "(prefers-color-scheme: light)", scheme: default, toggle: {icon: lucide/sun, name: Dark}}
    - {media: "(prefers-color-scheme: dark)", scheme: slate, toggle: {icon: lucide/moon, name: Light}}
plugins: [search]
extra_css: [site.css]
markdown_extensions: [tables, fenced_code, toc, pymdownx.superfences]
"""


def lay_out(target: Path) -> list[str]:
    """Lay the pages and what they show into `target/pages`, with the settings of the site; returns the pages' names."""
    shutil.rmtree(target, ignore_errors=True)
    pages = target / "pages"
    pages.mkdir(parents=True)
    names: list[str] = []
    for source in [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in BESIDES if (ROOT / name).exists())]:
        name = BESIDES.get(source.relative_to(ROOT).as_posix(), source.name)
        (pages / name).write_text(adapted(source.read_text(encoding="utf-8"), source), encoding="utf-8")
        names.append(name)
    for source in (ROOT / "docs").rglob("*"):
        if source.suffix in (".svg", ".png", ".jpg", ".ipynb", ".json") and source.is_file():
            copy = pages / source.relative_to(ROOT / "docs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    (pages / "site.css").write_text(STYLE)
    (target / "mkdocs.yml").write_text(SETTINGS + navigation(names))
    return [f"{page}.md" for section in SECTIONS.values() for page in section]


def navigation(names: Sequence[str]) -> str:
    """Return the settings of the navigation.

    Raises:
        ValueError: a page stands in no section, or a section has one that does not exist.
    """
    placed = [f"{page}.md" for section in SECTIONS.values() for page in section]
    if sorted(placed) != sorted(names):
        raise ValueError(f"in SECTIONS or among the pages, but not in both: {sorted(set(placed) ^ set(names))}")
    lines = ["nav:"]
    for title, pages in SECTIONS.items():
        lines += [f"  - {title}:", *(f"      - {page}.md" for page in pages)]
    return "\n".join(lines) + "\n"


def adapted(text: str, source: Path) -> str:
    """Return a page whose links to files of the repository are links to pages of the site."""

    def target_of(match: re.Match[str]) -> str:
        link = match[1]
        if link.startswith(("http://", "https://", "mailto:")):
            return link
        path = (source.parent / link).resolve()
        if not path.is_relative_to(ROOT):
            return link
        name = path.relative_to(ROOT).as_posix()
        return BESIDES.get(name, name.removeprefix("docs/"))

    return LINK.sub(target_of, text)


def main(arguments: Sequence[str]) -> int:
    """Lay out and build; returns the exit status."""
    (where,) = arguments
    target = Path(where).absolute()
    pages = lay_out(target)
    done = subprocess.run([Path(sys.executable).with_name("zensical"), "build", "--strict"], cwd=target, check=False)
    if done.returncode == 0:
        print(f"{len(pages)} pages: {target / 'site' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
