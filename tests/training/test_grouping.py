"""How other tools divide weights into groups, written out by hand or taken from the tool itself."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from onward.training.foreign.grouping import GROUPINGS

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
BY_CLASS, BY_NAME = "ln_1.weight", "input_layernorm.weight"
"""Two RMS norms: only the class of the first shows what it is, also the name of the second."""
OTHERS = ["proj.bias", "ln_2.weight", "ln_2.bias"]


class TinyRMSNorm(nn.Module):
    """Has the weight of an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class Tiny(nn.Module):
    """Has one weight of every kind that tools tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4, 2)
        self.ln_1, self.input_layernorm = TinyRMSNorm(), TinyRMSNorm()
        self.proj = nn.Linear(2, 2)
        self.ln_2 = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.lm_head = nn.Linear(2, 4, bias=False)


def test_weights_are_divided_as_each_tool_does() -> None:
    """A file knows weights by their places in groups: in another division, some would get the moments of others."""
    whole = [EMBEDDING, BY_CLASS, BY_NAME, "proj.weight", *OTHERS, HEAD]
    transformers_5 = [[EMBEDDING, BY_CLASS, "proj.weight", HEAD], [BY_NAME, *OTHERS]]
    assert [
        transformers_5,
        [[EMBEDDING, "proj.weight", HEAD], [BY_CLASS, BY_NAME, *OTHERS]],
        [[EMBEDDING, BY_CLASS, BY_NAME, "proj.weight", HEAD], OTHERS],
        [whole],
        transformers_5[::-1],
        [[BY_CLASS, "proj.weight"], [EMBEDDING, HEAD], [BY_NAME, *OTHERS]],
    ] == [grouping(Tiny()) for grouping in GROUPINGS[:-1]]


def test_lora_plus_is_divided_as_peft_does() -> None:
    """Matrices A, those of an embedding, matrices B and biases have groups of their own, in PEFT's order."""
    adapter = LoraConfig(r=1, target_modules=["embed_tokens", "proj"], bias="all")
    model: Any = get_peft_model(Tiny(), adapter)  # type: ignore[arg-type]
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    expected = [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
    assert [1, 2, 1, 3] == [len(group) for group in expected]
    assert expected == GROUPINGS[-1](model)
