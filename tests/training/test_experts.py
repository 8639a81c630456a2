"""Experts on a GPU are computed in a way that repeats."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch

from onward.training.layers.experts import ONE_BY_ONE, let_experts_repeat


@pytest.mark.parametrize(("kind", "changes"), [("cpu", False), ("cuda", True)])
def test_experts_one_by_one_on_a_gpu(kind: str, changes: bool) -> None:
    """Only there are they set, and what they compute is the same up to rounding; others have nothing to set."""
    model: Any = small.small_model("olmoe").eval()
    plain: Any = small.small_model("llama")
    ids, before = torch.arange(12)[None], model.config._experts_implementation
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        let_experts_repeat(model, torch.device(kind))
        let_experts_repeat(plain, torch.device(kind))
        actual = model(input_ids=ids).logits
    assert before != ONE_BY_ONE
    assert (ONE_BY_ONE if changes else before) == model.config._experts_implementation
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
