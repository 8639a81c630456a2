"""Estimates for models of other sizes on cards that are not available here: `cards.py`. Nothing is measured.

Models have the shapes of public ones and no weights (`onward.training.model.outline`), so this runs anywhere. A card is
assumed to be empty except for CUDA's own context.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent / "gpu"))

CONTEXT = 600_000_000
"""Bytes that CUDA's context takes."""
LENGTH = 2048
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in nf4: half a byte, a scale of 8 bits for 64, and one of 32 for 256 of those."""


@dataclass(frozen=True)
class Case:
    """A model on a card.

    Args:
        shape: name in `gpu/shapes.py`.
        gigabytes: memory of the card, in units of 2^30 bytes.
        settings: config keys.
    """

    shape: str
    gigabytes: int
    settings: dict[str, Any]


LORA: dict[str, Any] = {"lora": {"rank": 16}}
CASES = (
    Case("Llama-3.1-8B", 24, LORA),
    Case("Llama-3.1-8B", 12, {**LORA, "method": "qlora"}),
    Case("Qwen3-1.7B", 24, {"method": "full", "optimizer": "adamw_8bit"}),
    Case("Qwen3-1.7B", 24, {"method": "full"}),
    Case("Qwen3-1.7B", 12, LORA),
    Case("Qwen3-0.6B", 12, {"method": "full", "optimizer": "adamw_8bit"}),
)


def profile(case: Case) -> Any:
    """Return what a model takes, counted without its weights, with the type and the kernels' memory of a GPU."""
    from shapes import config_of

    from onward.config import Config
    from onward.training.model.outline import outlined
    from onward.training.model.treatment import Treatment
    from onward.training.optimizers import optimizer_method
    from onward.training.steps.loss import TargetLoss
    from onward.training.steps.model_memory import profile_of

    config = Config.model_validate({"max_length": LENGTH, **case.settings})
    four_bit = config.method == "qlora"
    outline = outlined(config_of(case.shape), config, torch.bfloat16, Treatment(end_to_end=True), fuse=not four_bit)
    with outline as model:
        loss = TargetLoss(model, torch.device("cpu"), torch.bfloat16)
        found = profile_of(model, optimizer_method(config), loss, config, "cuda")
        linear = [part.base_layer.weight for part in model.modules() if hasattr(part, "lora_A") and four_bit]
    saved = sum(weight.numel() * (2 - FOUR_BIT) for weight in linear)
    return replace(found, base=int(found.base - saved))


def main() -> None:
    """Print the table."""
    from onward.training.steps.memory import USABLE, part_tokens

    print(
        "| model | card | settings | estimate | tokens of a part | layers computed again |\n|---|---|---|---|---|---|"
    )
    for case in CASES:
        found, card = profile(case), case.gigabytes << 30
        room = int(USABLE * (card - CONTEXT))
        tokens = part_tokens(found, room, LENGTH)
        rows = [LENGTH] * max(1, tokens // LENGTH)
        whole, again = found.estimate(rows), found.estimate(rows, recompute=True)
        used = whole if whole.total <= room else again
        fits = f"{used}" if used.total <= room else f"does not fit: {used}"
        words = ", ".join(f"{key} {value}" for key, value in case.settings.items() if key != "lora") or "LoRA rank 16"
        print(
            f"| {case.shape} | {card / 1e9:.1f} GB | {words} | {fits} | {tokens} | {'yes' if used is again else 'no'} |"
        )


if __name__ == "__main__":
    main()
