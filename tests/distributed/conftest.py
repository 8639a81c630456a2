"""What runs on several ranks train."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from onward.errors import ConfigError
from onward.training.sharding.needs import require_fsdp


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what shards a model where PyTorch is too old for it, before any fixture does so."""
    if item.get_closest_marker("shards"):
        try:
            require_fsdp()
        except ConfigError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files, the last steps of which have fewer rows than others."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{rows}.jsonl", tiny.chat_rows(rows, seed=rows)) for rows in (20, 15)]
