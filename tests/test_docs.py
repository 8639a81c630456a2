"""The documentation is true: generated pages are fresh, its commands run, its links and lists are complete."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from commands import onward as onward_command
from ledgers import made_up_run

import onward
from onward.data.rows.records import parse_record
from onward.training.checkpoint import Manifest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(onward.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- run(?P<statuses>:[ \d]+)? -->\n(?P<run>))?```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$", re.M | re.S
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECONDS = 300
"""Seconds that one block may take."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `statuses` are the exit statuses that the page allows."""

    page: Path
    language: str
    body: str
    runnable: bool
    statuses: frozenset[int]

    def script(self) -> str:
        """Return what a shell runs: the lines after `$` of a console block, or all of it."""
        if self.language != "console":
            return self.body
        return "".join(f"{line[2:]}\n" for line in self.body.splitlines() if line.startswith("$ "))


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [
        Block(
            page=page,
            language=match["language"],
            body=match["body"],
            runnable=match["run"] is not None,
            statuses=frozenset(int(word) for word in (match["statuses"] or ": 0").strip(": ").split()),
        )
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def load_generator() -> ModuleType:
    """Import docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: Path, title: str) -> str:
    """Return the text of a page between a heading of the second level and the next one."""
    text = page.read_text(encoding="utf-8")
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def anchors(page: Path) -> set[str]:
    """Return what links may name inside a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["cli.md", "config.md", "file-formats.md", "onward.schema.json"])
def test_generated_pages_are_fresh(name: str) -> None:
    """A page made from the code says what the code says now; `python docs/generate.py` mends it."""
    assert load_generator().PAGES[name]() == (DOCS / name).read_text(encoding="utf-8")


def test_check_says_which_page_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` writes nothing, names the stale pages and returns 1; without it they are written."""
    generator = load_generator()
    monkeypatch.setattr(generator, "DOCS", tmp_path)
    assert 1 == generator.main(["--check"])
    assert "stale: config.md, file-formats.md, cli.md" in capsys.readouterr().err
    assert [] == list(tmp_path.iterdir())
    assert 0 == generator.main([])
    assert 0 == generator.main(["--check"])


def test_example_rows_are_accepted() -> None:
    """Each row format's example on the page is one that the parser takes, and no format lacks one."""
    rows = [json.loads(block.body) for block in blocks(DOCS / "file-formats.md") if block.language == "json"]
    assert [row for _, _, row in load_generator().EXAMPLES] == rows
    assert ["Chat", "Chat", "Completion", "Chat", "Text"] == [type(parse_record(row)).__name__ for row in rows]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link of a page to a file or a heading of this repository is good."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_module_is_in_the_house() -> None:
    """The picture of the house names every module of the package, and none that is not there."""
    picture = section(DOCS / "architecture.md", "The house").split("```text", 1)[1].split("```", 1)[0]
    modules = {path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert modules == set(re.findall(r"\w+\.py\b", picture))


def test_every_dependency_has_a_reason() -> None:
    """The table of dependencies is that of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in declared} - {"onward"}
    table = section(DOCS / "architecture.md", "Dependencies")
    assert names == set(re.findall(r"^\| ([\w-]+) \|", table, re.M)) - {"package"}


def test_every_key_of_the_manifest_is_explained() -> None:
    """The checkpoint format names each key that `onward.json` has."""
    table = section(DOCS / "checkpoint-format.md", "onward.json")
    assert set(Manifest.model_fields) == {
        key.partition(".")[0] for key in re.findall(r"^\| `([\w.]+)` \|", table, re.M)
    }


@pytest.mark.slow
def test_quickstart_and_readme_run(program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the Python that the pages mark work as written, in order, and end as the page says.

    A tiny model stands in for the default one. A block of the README whose commands are all in the quickstart
    is not run twice.
    """
    prepare(program, model, tmp_path, monkeypatch)
    commands: set[str] = set()
    pages = (DOCS / "quickstart.md", ROOT / "README.md", DOCS / "checkpoint-format.md")
    for block in [block for page in pages for block in blocks(page) if block.runnable]:
        script = block.script()
        if block.language == "python":
            exec(compile(block.body, block.page.name, "exec"), {"__name__": block.page.stem})
        elif not commands.issuperset(script.splitlines()):
            assert run(script) in block.statuses, script
            commands.update(script.splitlines())


def test_pages_about_a_made_run_run(
    program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands and Python of the pages on figures, trackers, agents and install, on a run that was made up."""
    prepare(program, model, tmp_path, monkeypatch)
    made_up_run(tmp_path / "made-run", [("monday.jsonl", 3), ("tuesday.jsonl", 4)], lambda step: 1 / step)
    tracked = made_up_run(tmp_path / "tracked-run", [("monday.jsonl", 3)], lambda step: 1 / step)
    tracked.config.write_text("model: smollm2-135m\ntrack: [nobody]\n")
    pages = [DOCS / name for name in ("figures.md", "trackers.md", "agents.md", "install.md", "launch.md")]
    ran = [block for page in pages for block in blocks(page) if block.runnable]
    assert {page.name for page in pages} == {block.page.name for block in ran}
    for block in ran:
        if block.language == "python":
            exec(compile(block.body, block.page.name, "exec"), {"__name__": block.page.stem})
        else:
            assert run(block.script()) in block.statuses, block.body


def test_the_page_shows_what_metrics_prints(tmp_path: Path) -> None:
    """The CSV on the page is the command's own output."""
    layout = made_up_run(tmp_path / "made-run", [("monday.jsonl", 3)], lambda step: 1 / step)
    shown = next(block for block in blocks(DOCS / "figures.md") if block.language == "console").body
    printed = onward_command("metrics", "--run", layout.root).out
    assert shown.splitlines()[1:] == printed.splitlines()[:3]


def run(script: str) -> int:
    """Run a script in bash; a command that fails ends it. Returns the status as a shell would: 137 for a kill.

    bash is replaced by the last command, and `timeout --signal=KILL` kills itself too.
    """
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, timeout=SECONDS, check=False)
    print(script, done.stdout, done.stderr)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


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


def test_tests_that_the_docs_name_exist() -> None:
    """Every test that a page names exists."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {name for page in pages for name in re.findall(r"(tests/[a-z_/]+\.py)::(\w+)", page.read_text())}
    assert 10 < len(named)
    assert [] == [name for name in sorted(named) if f"def {name[1]}(" not in (ROOT / name[0]).read_text()]
