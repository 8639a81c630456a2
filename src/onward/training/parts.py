"""The parts of an optimizer step: what is computed at once, and with which seed."""

from __future__ import annotations

from dataclasses import dataclass

from onward.config import MICRO_BATCH_TOKENS, Config
from onward.data.loader import Batch
from onward.training.seeds import fold

SEED_OF_RANK_0 = 0
"""Seeds once depended on the rank. Now each part has its own, so that bits do not depend on who computes it."""


@dataclass(frozen=True)
class Part:
    """Some rows of a step's batch, and the seed of their dropout."""

    batch: Batch
    seed: int


def parts_of(batch: Batch, config: Config, step: int) -> list[Part]:
    """Cut a batch into its parts, a function of the batch, the config and the steps taken before this one."""
    parts = config.gradient_accumulation
    batches = batch.split_by_tokens(MICRO_BATCH_TOKENS) if parts == "auto" else batch.split(parts)
    return [Part(part, fold(config.seed, "step", step, number, SEED_OF_RANK_0)) for number, part in enumerate(batches)]
