"""Only models whose steps are computed otherwise than by earlier releases get another number in their environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from onward.config import Config
from onward.training.device.environment import NUMERICS, describe_environment
from onward.training.steps.numerics import FILLED, IN_HALF, ON_GPU, PROVEN_APART, numerics_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 128}


def number(folder: Path, family: str, *, method: str = "lora", device: torch.device = CPU, **settings: Any) -> int:
    """Return the number of a base of a family."""
    asked = {name: settings.pop(name) for name in ("end_to_end",) if name in settings}
    AutoConfig.for_model(family, **SIZES, **settings).save_pretrained(folder)
    return numerics_of(folder, Config.model_validate({"method": method}), device, **asked)


def test_as_before(tmp_path: Path) -> None:
    """Models whose rows lie end to end with constant angles, as ever; a base that cannot be read is for the loader."""
    assert (
        NUMERICS == number(tmp_path, "llama") == number(tmp_path, "phi3") == number(tmp_path, "llama", end_to_end=True)
    )
    assert NUMERICS == numerics_of(tmp_path / "nowhere", Config(), CPU)
    assert NUMERICS == describe_environment(CPU, torch.float32)["numerics"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("granite", {}),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"end_to_end": False}),
        ("llama", {"method": "qlora"}),
    ],
    ids=["padded", "longrope", "dynamic", "found to be padded", "packed weights"],
)
def test_otherwise(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Padded models, angles that depend on the length, and 4-bit weights on a CPU have a later one."""
    assert PROVEN_APART == number(tmp_path, family, **settings)
    assert PROVEN_APART > NUMERICS


def test_on_a_gpu(tmp_path: Path) -> None:
    """Kernels of its own compute there, whatever the method and the type."""
    assert ON_GPU == number(tmp_path, "llama", device=GPU) == number(tmp_path, "llama", method="qlora", device=GPU)
    half = [numerics_of(tmp_path, Config(), GPU, dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert [FILLED, FILLED] == half
    assert FILLED > ON_GPU > IN_HALF
