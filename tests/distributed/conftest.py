"""What runs on several ranks train."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files, the last steps of which have fewer rows than others."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{rows}.jsonl", tiny.chat_rows(rows, seed=rows)) for rows in (20, 15)]
