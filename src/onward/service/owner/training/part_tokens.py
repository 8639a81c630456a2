"""The tokens per part of a step: chosen once for a run, since its bits depend on them, and kept on every machine."""

from __future__ import annotations

from onward.config import Config
from onward.config.keys import MICRO_BATCH_TOKENS
from onward.service.session import Session
from onward.training.state import TrainState
from onward.training.steps.economy import Economy, Learned
from onward.training.steps.loss import TargetLoss
from onward.training.steps.memory import USABLE, part_tokens

FACT = "micro_batch_tokens"
"""The ledger's fact in which a run keeps its number."""


def with_part_tokens(
    session: Session, state: TrainState, config: Config, learned: Learned, *, keep: bool = True
) -> Config:
    """Return the config with the run's own number in place of `micro_batch_tokens: auto`.

    The number is recorded if `keep` is true. It follows from the memory of the device that the run begins on. Runs
    that trained before there was a number, and those that began on a CPU, have the number of earlier releases, which is
    not written out.
    """
    if config.micro_batch_tokens != "auto" or config.gradient_accumulation != "auto":
        return config
    number = session.ledger.get(FACT)
    if number is None:
        number = _choose(session, state, config, learned) if state.step == 0 else MICRO_BATCH_TOKENS
        if keep:
            session.ledger.put(**{FACT: number})
    return config if number == MICRO_BATCH_TOKENS else config.model_copy(update={FACT: number})


def _choose(session: Session, state: TrainState, config: Config, learned: Learned) -> int:
    measures = session.device.type == "cuda" and not session.in_shards
    usage = learned.read(session.device) if measures else None
    if usage is None:
        return MICRO_BATCH_TOKENS
    loss = TargetLoss(state.model, session.device, session.dtype, session.pad_id)
    profile = Economy(state, loss, config, session.device, learned).profile
    return part_tokens(profile, int(USABLE * usage.available), config.max_length)
