"""What tests of adoption share: a checkpoint of a stock Trainer, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import stock


@pytest.fixture(scope="session")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> stock.Saved:
    """A stock LoRA checkpoint, in the middle of a linear schedule."""
    return stock.save_lora(model, tmp_path_factory.mktemp("stock"))


@pytest.fixture
def checkpoint(saved: stock.Saved, tmp_path: Path) -> Path:
    """A copy of the stock checkpoint, to be changed."""
    return shutil.copytree(saved.folder, tmp_path / saved.folder.name)
