"""What tests of the training share: a model with layers that may differ, or share what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of two layers with a byte-level tokenizer."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)
