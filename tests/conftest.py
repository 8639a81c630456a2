"""What all tests share: one tiny model, and one thread so that they can run side by side."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes that tests start


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer model with a byte-level tokenizer."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"))
