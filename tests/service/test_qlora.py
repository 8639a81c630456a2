"""Quantized LoRA, seen working: on a CPU, with bitsandbytes from `make qlora`."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest
from seen import seen_by

ROOT = Path(__file__).parents[2]
APART = ROOT / ".qlora"


@pytest.mark.slow
def test_quantized_runs_are_exact_and_load_in_stock_peft(tmp_path: Path) -> None:
    """Two equal runs, one of them killed, have equal bits; an evaluation changes no weight; PEFT loads the adapter."""
    if importlib.util.find_spec("bitsandbytes") is None and not (APART / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not installed: make qlora")
    seen, _ = seen_by("qlora.py", tmp_path, beside=[APART])
    assert [0, -signal.SIGKILL, 0, 0] == seen["statuses"]
    assert seen["measured"][0] == seen["measured"][1]
    assert not seen["changed by evaluation"]
    assert [] == seen["checks that fail"]
    assert 14 == seen["four-bit weights"]
    assert 1e-5 > seen["difference to stock"]
