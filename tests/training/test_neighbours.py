"""Rows that see each other are found by a bit, whatever a tolerance would have let pass."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
from torch import nn

from onward.training.admission.inputs import LONG, MIDDLE, SHORT, rows
from onward.training.admission.neighbours import influence
from onward.training.admission.small.narrow import still
from onward.training.layers.attention import lay_end_to_end

CPU = torch.device("cpu")
VOCABULARY = range(60)


class Leak(nn.Module):
    """Lets a trace of the token before through, across the borders of rows that are laid end to end."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer returns, and a millionth of its neighbour's."""
        out = self.inner(x)
        return out + 1e-6 * out.roll(1, dims=1) if out.shape[0] == 1 else out


def laid(family: str, **settings: Any) -> Any:
    """Return a small model whose rows are laid end to end."""
    model = small.small_model(family, **settings).train()
    lay_end_to_end(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_rows_that_do_not_mix_change_no_bit_of_each_other(family: str, dtype: torch.dtype) -> None:
    """Attention end to end keeps rows apart to the last bit, in both compute types."""
    model = laid(family)
    with still(model):  # dropout would draw other numbers in every pass
        assert 0.0 == influence(model, rows([MIDDLE, SHORT, LONG], VOCABULARY), VOCABULARY, CPU, dtype)


def test_a_trace_of_a_neighbour_is_a_fault() -> None:
    """Far below any tolerance of gradients, and found: plain padded rows do not mix there."""
    model = laid("llama")
    model.model.layers[0].mlp.down_proj = Leak(model.model.layers[0].mlp.down_proj)
    assert float("inf") == influence(model, rows([MIDDLE, SHORT, LONG], VOCABULARY), VOCABULARY, CPU, torch.float32)


@pytest.mark.parametrize("seed", range(0, 18, 3))
def test_experts_are_held_to_a_tolerance(seed: int) -> None:
    """Experts multiply the tokens of all rows together; at most rounding comes of it, whichever tokens each one gets:
    that plain rows depend on each other in the same way is looked for in more than one batch.
    """
    model = laid("flex_olmo", seed=seed)
    found = influence(model, rows([MIDDLE, SHORT, LONG], VOCABULARY), VOCABULARY, CPU, torch.float32)
    assert found < 1e-5
