"""`onward evaluate --tasks`: a file of lm-evaluation-harness is asked for by the name that stands in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from onward.errors import UsageError
from onward.views.evaluate import task_in


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
