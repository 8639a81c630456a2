"""`onward evaluate`: what a kept state is measured on, and the tasks of lm-evaluation-harness, asked for by name."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from faults import copy_run

from onward.errors import UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.views.evaluate import lines_of, measure, measure_tasks, task_in


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task: capitals\ndoc_to_text: '{{q}}'\n", "capitals"),
        ("task: capitals\nprocess_docs: !function utils.process\nlist: [!x 1]\n", "capitals"),
        ("group: geography\ntask: [capitals, rivers]\n", "geography"),
    ],
)
def test_a_task_has_the_name_in_its_file(text: str, name: str, tmp_path: Path) -> None:
    """The file may be called otherwise; tags that name code are not followed."""
    (tmp_path / "mine.yaml").write_text(text)
    assert name == task_in(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "reason"), [("doc_to_text: x\n", "names no task"), ("[1, 2]", "names no task"), ("a: [", "not YAML")]
)
def test_a_file_that_names_no_task_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    """With the file and what is wrong with it."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=reason) as refused:
        task_in(tmp_path / "mine.yaml")
    assert str(tmp_path / "mine.yaml") == refused.value.where


HARNESS = {
    "__init__.py": """
def simple_evaluate(model, tasks, limit, task_manager, log_samples):
    assert not log_samples and 8 == model.batch_size
    taken = float(sum(1 for _ in model.pretrained.parameters()))
    values = {"alias": "words", "acc,none": 0.5, "limit": limit or 0, "parts": taken}
    return {"results": {task: {**values, "folders": len(task_manager.folders)} for task in tasks}}
""",
    "models/__init__.py": "",
    "models/huggingface.py": """
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size):
        assert tokenizer.decode is not None and not pretrained.training
        self.pretrained, self.batch_size = pretrained, batch_size
""",
    "tasks.py": """
class TaskManager:
    def __init__(self, include_path):
        self.folders = include_path or ()
        self.all_tasks = ["known", *(["mine"] if self.folders else [])]
""",
}
"""What is called of lm-evaluation-harness, in a few lines."""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `lm_eval`, found before one that is installed."""
    for name, text in HARNESS.items():
        file = tmp_path / "packages" / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "packages")


@pytest.mark.usefixtures("harness")
def test_tasks_are_measured_on_the_state_that_is_named(stream: Path, tmp_path: Path) -> None:
    """Those of the harness and those of one's own files, whose folders it is told; each number under its name."""
    layout = RunLayout(stream)
    own = tmp_path / "mine.yaml"
    own.write_text("task: mine\n")
    found = measure_tasks(layout, "step:3", ["known", str(own)], 7, lambda _: None)
    assert (3, 2) == (found["step"], found["after"])
    assert ["known", "mine"] == list(found["tasks"])
    values = found["tasks"]["mine"]
    assert {"acc,none": 0.5, "limit": 7.0, "parts": values["parts"], "folders": 1.0} == values
    assert values["parts"] > 0
    (line,) = lines_of(found)[1:2]
    assert line.startswith("known: acc,none 0.5000, limit 7.0000")
    for tasks, reason in ((["nothing"], "knows no task 'nothing'"), ([str(tmp_path / "no.yaml")], "no such file")):
        with pytest.raises(UsageError, match=reason):
            measure_tasks(layout, None, tasks, None, lambda _: None)


def test_what_was_measured_in_lines() -> None:
    """The place of a file that has one, a mark on rows that were trained, nothing where nothing was measured."""
    score = {"loss": 1.25, "accuracy": 0.5}
    files = [
        {"position": 2, "name": "b\x1b.jsonl", "trained": True, **score},
        {"position": None, "name": "q.jsonl", "trained": False, **score},
    ]
    assert [
        "step 9, after file 2",
        "2 b\\x1b.jsonl: loss 1.2500, accuracy 0.5000 (trained rows)",
        "q.jsonl: loss 1.2500, accuracy 0.5000",
        "anchor: 0.000000 nats per token from the base",
    ] == lines_of({"at": "step 9, after file 2", "files": files, "anchor": 0.0})
    assert ["step 9, after file 2"] == lines_of({"at": "step 9, after file 2", "files": [], "anchor": None})


def test_a_state_that_is_not_the_run_s_is_not_measured(stream: Path, tmp_path: Path) -> None:
    """A release has what was measured when it was made; before the first file there is nothing to measure on."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    shutil.copytree(layout.boundary(3), layout.releases / "v1")
    (layout.releases / "v1" / "onward.json").unlink()
    with pytest.raises(UsageError, match="release v1 is not a state of the run"):
        measure(layout, "v1")
    with Ledger(layout.ledger) as ledger:
        ledger.write("UPDATE files SET position = position + 10")
    with pytest.raises(UsageError, match="nothing was trained in that state"):
        measure(layout, None)
