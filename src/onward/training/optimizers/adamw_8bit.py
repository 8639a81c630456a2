"""AdamW with 8-bit moments as a method: a quarter of the memory, in the file format of `adamw_bnb_8bit`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from onward.config import Config
from onward.errors import ModelError, first_line
from onward.training.device.errors import is_of_the_device
from onward.training.optimizers.adamw import AdamW
from onward.training.optimizers.blockwise import (
    CODEBOOKS,
    LEAST,
    BlockwiseAdamW,
    blocks_of,
    codebooks,
    is_rounded,
)
from onward.training.optimizers.method import Entry

WRAPPED = "__bnb_optimizer_quant_state__"
"""The key under which bitsandbytes since 0.49 puts its tensors."""
SCALES = ("absmax1", "absmax2")
EXPANDED = 5
"""How many tensors in 32 bits, of the size of a weight, the kernels for CPUs have at a time: counted by measuring."""


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments for weights of 4,096 numbers or more; the groups are those of `adamw`.

    If a file has 32-bit moments for such a weight, as the Trainer keeps them for embeddings, they stay so.
    """

    name = "adamw_8bit"
    slots = ("state1", "state2")

    def require(self, device: torch.device) -> None:
        """Refuse to compute if bitsandbytes is missing or has no kernel for the device; this is tried on one small
        weight.

        Raises:
            ModelError: steps cannot be taken here.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise _missing("optimizer adamw_8bit needs bitsandbytes")
        weight = nn.Parameter(torch.ones(LEAST, device=device))
        weight.grad = torch.ones_like(weight)
        try:
            BlockwiseAdamW([{"params": [weight]}], lr=1e-3, eps=1e-8).step()
        except Exception as error:  # each release of bitsandbytes says it in its own way
            if is_of_the_device(error):
                raise
            what = f"the installed bitsandbytes has no 8-bit AdamW for {device.type}: {first_line(error)}"
            raise _missing(what, upgrade=True) from None

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """Return the optimizer over two groups like the Trainer's."""
        self.require(next(model.parameters()).device)
        groups = [{"params": [parameter for _, parameter in group]} for group in self.groups(model)]
        optimizer = BlockwiseAdamW(groups, lr=config.learning_rate, eps=config.eps)
        self.configure(optimizer, config)
        return optimizer

    def bytes(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return the bytes of initial moments: one per number and four per block, or four per number."""
        each = (
            weight.numel() + 4 * blocks_of(weight) if is_rounded(weight) else 4 * weight.numel()
            for weight in weights.values()
        )
        return len(self.slots) * sum(each)

    def workspace(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return what it takes to expand the moments of the largest weight, as the kernels for CPUs do."""
        return EXPANDED * max((4 * weight.numel() for weight in weights.values() if is_rounded(weight)), default=0)

    def problem(self, parameter: torch.Tensor, entry: Entry | None) -> str | None:
        """Return what is missing, or which tensor has another shape or type than it must have."""
        wanted = {self.counter: torch.float32, **dict.fromkeys(self.slots, torch.float32)}
        shapes = dict.fromkeys(self.slots, tuple(parameter.shape))
        if entry is not None and any(slot in entry for slot in SCALES):
            wanted |= {**dict.fromkeys(self.slots, torch.uint8), **dict.fromkeys(SCALES, torch.float32)}
            shapes |= dict.fromkeys(SCALES, (blocks_of(parameter),))
        if entry is None or set(entry) != set(wanted):
            return "the optimizer has no adamw_8bit moments for it"
        for slot, shape in shapes.items():
            found = tuple(entry[slot].shape), entry[slot].dtype
            if found != (shape, wanted[slot]):
                return f"its {slot} has shape {found[0]} and type {found[1]} instead of {shape} and {wanted[slot]}"
        return None

    def to_file(self, entry: Entry) -> dict[str, Any]:
        """Return the entry as bitsandbytes saves it, in the form that all its releases load, with the codebooks."""
        saved = {**entry, self.counter: int(entry[self.counter])}
        return {**saved, **codebooks()} if SCALES[0] in entry else saved

    def from_file(self, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the entry without the codebooks, which must be those of the kernels."""
        flat = {**entry, **cast(Mapping[str, Any], entry.get(WRAPPED, {}))}
        flat.pop(WRAPPED, None)
        own: Mapping[str, torch.Tensor] = codebooks() if any(name in flat for name in CODEBOOKS) else {}
        for name, codebook in own.items():
            if not torch.equal(codebook, cast(torch.Tensor, flat.pop(name))):
                raise ValueError("they are rounded to values that are not in bitsandbytes' dynamic map")
        if self.counter in flat:
            flat[self.counter] = torch.as_tensor(flat[self.counter], dtype=torch.float32).reshape(())
        return flat


def _missing(what: str, *, upgrade: bool = False) -> ModelError:
    return ModelError(what, where="optimizer", hint=f'pip install {"-U " if upgrade else ""}"onward[qlora]"')


ADAMW_8BIT = AdamW8bit()
