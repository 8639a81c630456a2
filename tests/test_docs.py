"""The documentation is true: generated pages are fresh, its commands run, its links and lists are complete."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from commands import onward as onward_command
from documented import DOCS, PACKAGE, blocks, blocks_for, prepare
from ledgers import made_up_run
from runs import new_run

import onward
from onward.data.rows.records import parse_record
from onward.training.checkpoints.checkpoint import Manifest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
DAYS = ("monday", "tuesday")
FIRST_SESSION = (DOCS / "quickstart.md", ROOT / "README.md", DOCS / "checkpoint-format.md")
UNATTENDED = (DOCS / "operations.md",)
WITH_A_RUN = tuple(
    DOCS / f"{name}.md"
    for name in ("figures", "trackers", "agents", "install", "chat", "export", "serve", "launch", "python")
)
"""Pages whose marked blocks the tests below run, by what they begin with."""
LINK = re.compile(r"\]\(([^)\s]+)\)")


def load_generator() -> ModuleType:
    """Import docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(DOCS))  # the last one: it has a site.py
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
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
    load_generator()
    assert [row for _, _, row in sys.modules["made_pages.examples"].EXAMPLES] == rows
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_of_tables_have_the_columns_of_their_head(page: Path) -> None:
    """A row with more cells than its table has columns loses the last ones where the page is rendered."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        head, *rows = [len(re.findall(r"(?<!\\)\|", line.strip())) for line in table.splitlines()]
        assert [head] * len(rows) == rows, table


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


def test_quickstart_and_readme_run(program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the Python that the pages mark work as written, in order, and end as the page says.

    A tiny model stands in for the default one. A block of the README whose commands are all in the quickstart
    is not run twice.
    """
    prepare(program, model, tmp_path, monkeypatch)
    commands: set[str] = set()
    for block in blocks_for(None, *FIRST_SESSION):
        script = block.script()
        if block.language == "python" or not commands.issuperset(script.splitlines()):
            block.run()
            commands.update(script.splitlines())


def test_commands_of_the_pages_run(program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and Python of the pages on what is done with a run: one that was trained, and others made up."""
    pytest.importorskip("uvicorn", reason="docs/serve.md needs onward[serve]")
    if shutil.which("curl") is None:
        pytest.skip("docs/serve.md uses curl")
    prepare(program, model, tmp_path, monkeypatch)
    made_up_run(tmp_path / "made-run", [("monday.jsonl", 3), ("tuesday.jsonl", 4)], lambda step: 1 / step)
    tracked = made_up_run(tmp_path / "tracked-run", [("monday.jsonl", 3)], lambda step: 1 / step)
    tracked.config.write_text("model: smollm2-135m\ntrack: [nobody]\n")
    files = [tiny.write_jsonl(tmp_path / f"{day}.jsonl", tiny.chat_rows(4, seed=len(day))) for day in DAYS]
    run = new_run(tmp_path / "my-run", model, batch_size=4, warmup_steps=0, lora={"rank": 2})
    run.train(*files)
    for block in blocks_for(None, *WITH_A_RUN):
        block.run()


@pytest.mark.slow
def test_the_page_on_unattended_runs_runs(
    program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of docs/operations.md works as written, on the files that the quickstart makes."""
    prepare(program, model, tmp_path, monkeypatch)
    blocks_for(None, DOCS / "quickstart.md")[0].run()
    for block in blocks_for(None, *UNATTENDED):
        block.run()
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert ["rejected"] == [entry["kind"] for entry in told][:1]


def test_the_page_on_python_names_what_is_public() -> None:
    """Every public name of the package is in the page's table, and no other."""
    tables = (section(DOCS / "python.md", title) for title in ("What is public", "Errors"))
    cells = [cell for table in tables for cell in re.findall(r"^\| (.*?) \|", table, re.M)]
    assert set(onward.__all__) == set(re.findall(r"`(\w+)`", "".join(cells)))


def test_every_page_that_promises_to_be_run_is() -> None:
    """A block that is marked for `test_docs` stands on a page that one of the tests above runs."""
    marked = {page for page in PAGES if any(block.runnable and block.test is None for block in blocks(page))}
    assert {*FIRST_SESSION, *UNATTENDED, *WITH_A_RUN} == marked


def test_every_extra_is_explained() -> None:
    """The page on installing says what each extra is for; those for work on Onward itself are no user's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = re.findall(r"^\| ((?:`[a-z]+`(?:, )?)+) \|", (DOCS / "install.md").read_text(encoding="utf-8"), re.M)
    explained = {name for row in rows for name in re.findall(r"[a-z]+", row)}
    assert set(project["optional-dependencies"]) - {"dev", "bench", "browser", "image"} == explained


def test_every_variable_is_explained() -> None:
    """The page on installing names each variable of Onward's own, but those that it sets for its own processes."""
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"^\| `(ONWARD_\w+)`", (DOCS / "install.md").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"ONWARD_[A-Z_]+", sources)) - {"ONWARD_FIRST_NODE"} == named


def test_blocks_that_other_tests_run_are_run() -> None:
    """A page that says that a test runs a block names a module of tests which runs those of this page."""
    modules = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")}
    named = {(block.test, block.page.name) for page in PAGES for block in blocks(page) if block.test}
    assert {"test_page_api", "test_push"} <= {test for test, _ in named}
    wanted = {(test, page): f'blocks_for("{test}", DOCS / "{page}")' for test, page in named}
    assert [] == [pair for pair, words in wanted.items() if words not in modules.get(pair[0], "")]


def test_the_page_shows_what_metrics_prints(tmp_path: Path) -> None:
    """The CSV on the page is the command's own output."""
    layout = made_up_run(tmp_path / "made-run", [("monday.jsonl", 3)], lambda step: 1 / step)
    shown = next(block for block in blocks(DOCS / "figures.md") if block.language == "console").body
    printed = onward_command("metrics", "--run", layout.root).out
    assert shown.splitlines()[1:] == printed.splitlines()[:3]


def test_tests_that_the_docs_name_exist() -> None:
    """Every test that a page names exists."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {name for page in pages for name in re.findall(r"(tests/[a-z_/]+\.py)::(\w+)", page.read_text())}
    assert 10 < len(named)
    assert [] == [name for name in sorted(named) if f"def {name[1]}(" not in (ROOT / name[0]).read_text()]
