"""Checks that PEFT loads an adapter's weights as they were saved: it silently changes some names on the way."""

from __future__ import annotations

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import nn

from onward.training.model.adapter import adapter_tensors
from onward.training.model.quiet import quiet


def not_loaded_back(model: nn.Module) -> tuple[str, ...]:
    """Return the trained weights of an adapter that loading would not set; the model is left as it was.

    Transformers renames weights of some model families on loading, and PEFT renames an adapter's along with them.
    """
    if not isinstance(model, PeftModel):
        return ()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    saved = {name: weight + 1.0 for name, weight in before.items()}
    with torch.no_grad(), quiet():
        set_peft_model_state_dict(model, adapter_tensors(model, saved))
        lost = tuple(name for name, weight in trained.items() if not torch.equal(weight, saved[name]))
        for name, weight in trained.items():
            weight.copy_(before[name])
    return lost
