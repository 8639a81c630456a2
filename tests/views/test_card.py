"""What a model card says of a run, and what of this machine it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from faults import copy_run
from ledgers import made_up_run

from onward import Run
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.training.model.base import digest_base
from onward.training.model.embedded import EMBEDDED
from onward.views.export.card import BaseFacts, base_facts, proof_of, verify_now, write_card
from onward.views.export.export import Wanted, export
from onward.views.points import Point, hold

BASE = BaseFacts("org/small_one", "abc", "MIT")


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """A run of two files, of two and three steps."""
    return made_up_run(tmp_path / "run", [("a|b.jsonl", 2), ("c.jsonl", 3)], float)


def card(layout: RunLayout, step: int | None, base: BaseFacts = BASE) -> str:
    """Return the card of a state; the picture lies beside it."""
    folder = layout.root.parent / "card"
    folder.mkdir(exist_ok=True)
    point = Point(folder, "step 5, after <c>", step, None)
    write_card(layout, point, base, folder, {"Format": "adapter"}, proof_of({"files": True, "hashes": True}))
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(("step", "files", "drawn"), [(1, 1, 1), (2, 1, 2), (3, 2, 3), (5, 2, 5), (None, 2, 5)])
def test_a_card_tells_of_a_state_what_led_to_it(layout: RunLayout, step: int | None, files: int, drawn: int) -> None:
    """Files that were begun by then, and steps up to it, also if their file has gone on since; of a release that does
    not say its step, all."""
    text = card(layout, step)
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert files == len(rows)
    assert rows[0].startswith(r"| 1 | a\|b.jsonl | ``")
    last, begun = min(5 if step is None else step, 2 if files == 1 else 5), 1 if files == 1 else 3
    assert f"| {begun} to {last} | {begun} to {last} |" in rows[-1]
    picture = (layout.root.parent / "card" / "loss.svg").read_text()
    assert drawn == len(re.findall(r"points=\"([^\"]+)\"", picture)[0].split())


def test_a_card_begins_with_what_a_hub_reads(layout: RunLayout) -> None:
    """The base under its public name, and its licence; what is not known is left out. Nothing in it is markup."""
    text = card(layout, 5)
    front = {"tags": ["onward"], "pipeline_tag": "text-generation"}
    assert {**front, "base_model": "org/small_one", "license": "mit"} == yaml.safe_load(text.split("---")[1])
    assert r"# small\_one, fine-tuned" in text
    assert "The state of step 5, after &lt;c&gt; of a run of Onward" in text
    assert "| Digest of the base | `abc` |" in text
    assert "`onward verify` when this was written: everything holds (files, hashes)." in text
    unknown = card(layout, 5, BaseFacts("model", "abc", "unknown"))
    assert front == yaml.safe_load(unknown.split("---")[1])


def test_a_card_names_no_folder_and_no_secret_of_this_machine(layout: RunLayout) -> None:
    """Config keys that are about it are left out, and a file is named by its last part."""
    layout.config.write_text(
        f"model: {layout.root}\nchat_template: {layout.root}/mine.jinja\nseed: 7\n"
        f"evaluation: {{files: [{layout.root}/mine.jsonl, beside.jsonl]}}\n"
        "notify: {url: 'https://example.org/secret', command: secret}\n"
    )
    text = card(layout, 5)
    shown: dict[str, Any] = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (7, ["mine.jsonl", "beside.jsonl"]) == (shown["seed"], shown["evaluation"]["files"])
    assert not {"model", "adapter", "chat_template", "notify"} & shown.keys()
    assert [] == [word for word in ("secret", str(layout.root), str(layout.root.parent)) if word in text]


def test_a_base_has_the_name_under_which_others_find_it(layout: RunLayout, tmp_path: Path) -> None:
    """That of a hub; of a folder, its last part; of what the run made for itself, the run's."""
    folder = tmp_path / "snapshots" / "0a1b"
    folder.mkdir(parents=True)

    def name(model: object, base: Path = folder) -> str:
        layout.config.write_text(f"model: {model}\n")
        return base_facts(layout, base, "digest").name

    embedded = EMBEDDED["smollm2-135m"]
    assert [embedded.model, "org/name-1.5_b", "0a1b"] == [*map(name, ("smollm2-135m", "org/name-1.5_b", folder))]
    assert ["0a1b", "0a1b", "0a1b"] == [*map(name, ("../org/name", "a/b/c", "'org/na me'"))]
    assert "run-base" == name("org/name", layout.root / "base")
    layout.config.write_text("model: smollm2-135m\n")
    assert BaseFacts(embedded.model, "digest", embedded.licence) == base_facts(layout, folder, "digest")


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: Apache-2.0\n---\n# x\n", "Apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", "unknown"),
        ("---\nlicence: mit\n---\n", "unknown"),
        ("---\n- a\n---\n", "unknown"),
        ("---\n: [\n---\n", "unknown"),
        ("---", "unknown"),
        ("# x\n---\nlicense: mit\n---\n", "unknown"),
        ("\udcff", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_is_what_the_base_s_own_card_states(
    text: str | None, licence: str, layout: RunLayout, tmp_path: Path
) -> None:
    """Whatever else is there states none."""
    if text is not None:
        (tmp_path / "README.md").write_text(text, errors="surrogateescape")
    layout.config.write_text("model: org/name\n")
    assert licence == base_facts(layout, tmp_path, "digest").licence


def test_a_proof_that_fails_is_told() -> None:
    """With what does not hold."""
    text = proof_of({"files": True, "hashes": False, "counters": False})
    assert "`onward verify` when this was written: FAILED: hashes, counters (files, hashes, counters)." == text


def test_the_card(stream: Path, model: Path, tmp_path: Path) -> None:
    """It has the base with its digest, every file with its hash, the config, the proof and a picture of every step."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    (tmp_path / "card").mkdir()
    with hold(layout) as point:
        facts = base_facts(layout, model, digest_base(model))
        write_card(layout, point, facts, tmp_path / "card", {"Format": "adapter"}, verify_now(layout))
        text = (tmp_path / "card" / "README.md").read_text()
        with RunLock(layout.lock):
            write_card(layout, point, facts, tmp_path / "card", {}, verify_now(layout))
    assert "`onward verify` was not run: another process owns this run" in (tmp_path / "card" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert {"pipeline_tag": "text-generation", "tags": ["onward"]} == front
    for entry in Run(layout.root).history():
        assert f"`{entry['sha256']}`" in text
    for words in (digest_base(model), "everything holds", "learning_rate: 0.05", "Licence of the base | unknown"):
        assert words in text
    assert "## What it knows" in text
    assert "## Measured at boundaries" not in text
    picture = (tmp_path / "card" / "loss.svg").read_text()
    assert 5 == len(re.findall(r"points=\"([^\"]+)\"", picture)[0].split())
    assert 2 == picture.count("<line")


def test_names_in_a_card_are_text(stream: Path, model: Path, tmp_path: Path) -> None:
    """A file's name with Markdown, HTML or an escape sequence in it stays a name."""
    run = Run(copy_run(stream, tmp_path / "run"))
    name = "<img src=x>|[a](b)\x1b[2J.jsonl"
    run.train(tiny.write_jsonl(tmp_path / name, tiny.chat_rows(1, seed=9)))
    export(run.layout, Wanted(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"&lt;img src=x&gt;\|\[a\](b)" in card
    assert "<img" not in card
    assert "\x1b" not in card
