"""What plain transformers computes of texts, to compare with what was measured of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from onward.data.tokenized import TokenizedFile


def plain_model(point: Path, base: Path, method: str) -> Any:
    """Load a restore point as anyone would."""
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(point).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), point).eval()


def target_logits(model: Any, ids: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (targets, vocabulary), float64, and labels of the targets of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
    wanted = torch.from_numpy(targets)[1:]
    return logits[:-1][wanted], torch.from_numpy(ids)[1:][wanted]


def plain_score(model: Any, sample: TokenizedFile) -> tuple[float, float]:
    """Mean loss and accuracy over the target tokens of all rows."""
    found = [target_logits(model, row.ids, row.targets) for row in map(sample.row, range(sample.rows))]
    logits, labels = (torch.cat(each) for each in zip(*found, strict=True))
    return float(functional.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).double().mean())


def plain_divergence(base: Any, model: Any, texts: TokenizedFile) -> float:
    """KL(base || model) per token."""
    rows = [texts.row(place) for place in range(texts.rows)]
    there, here = (
        torch.cat([target_logits(each, row.ids, row.targets)[0] for row in rows]).log_softmax(-1)
        for each in (base, model)
    )
    return float(functional.kl_div(here, there, log_target=True, reduction="none").sum(-1).mean())
