"""Decides which parts of a step keep less for the backward pass and recompute it, so that the step fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.errors import ConfigError
from onward.training.device.environment import deterministic
from onward.training.device.memory import ReadUsage, read_usage
from onward.training.layers.recompute import Recomputation
from onward.training.layers.recording import sharing_recorder
from onward.training.seeds import fold, seeded
from onward.training.state import TrainState
from onward.training.steps.loss import TargetLoss, add_gradients
from onward.training.steps.memory import USABLE, Polynomial, Profile, most_of
from onward.training.steps.model_memory import crude_of, profile_of
from onward.training.steps.recorded_parts import RecordedParts

ROOMY = 0.75
"""The share of free memory up to which a rough estimate suffices and nothing is measured, and the share of all memory
that recordings and the largest part may take together."""
PROOF_ROWS = (12, 5)
"""Tokens of the rows on which recomputation is proven."""


@dataclass
class Learned:
    """What a process has learned about its model and its device, and need not measure again.

    Args:
        read: returns the device's memory.
        profiles: what the model takes, by the adapter's dropout.
        exact: whether it can be recomputed with the same bits, by the adapter's dropout.
    """

    read: ReadUsage = read_usage
    profiles: dict[float, Profile] = field(default_factory=dict[float, Profile])
    exact: dict[float, bool] = field(default_factory=dict[float, bool])
    can_record: bool = False
    """Whether the model's computation can be recorded on this GPU, as far as is known."""
    lacks_memory: bool = False
    """Whether memory ran out in a step: then nothing is recorded."""
    recorded: RecordedParts | None = None
    """The recordings, once there are some."""
    loss: TargetLoss | None = None
    recomputation: Recomputation | None = None
    crude: Polynomial | None = None
    """What was found by walking through the model's modules: its loss, its layers, and what a part takes at most."""


class Economy:
    """Decides for each part of a step whether its layers are recomputed in the backward pass.

    The decision changes no bit of a step, which is proven on the model, with dropout, before the first time.

    Args:
        loss: computes the loss of a part.
        config: says when: always, never, or if a part would not fit otherwise.
        learned: what is known already; new findings are added.
    """

    def __init__(
        self, state: TrainState, loss: TargetLoss, config: Config, device: torch.device, learned: Learned
    ) -> None:
        self.recomputation = learned.recomputation = learned.recomputation or Recomputation(state.model)
        self.follow(config)
        self.always = False
        """Whether memory ran out without recomputation."""
        self.learned = learned
        self._state, self._loss, self._config = state, loss, config
        self._device = device
        self._dropout = config.lora.dropout
        self._roomy: dict[int, bool] = {}

    def follow(self, config: Config) -> None:
        """Follow the keys that may change between two steps."""
        self.setting, self._records = config.activation_checkpointing, config.cuda_graphs == "auto"

    @property
    def profile(self) -> Profile:
        """What the model takes, measured on first use, between two steps."""
        known = self.learned.profiles
        if self._dropout not in known:
            with deterministic(self._device, exact=self._config.deterministic), seeded(0, self._device):
                known[self._dropout] = self._measured()
            self._loss.forget()
        return known[self._dropout]

    def _measured(self) -> Profile:
        model, method = self._state.model, self._state.method
        return profile_of(model, method, self._loss, self._config, self._device.type)

    def recomputes(self, part: Batch, *, of_anchor: bool = False) -> bool:
        """Return whether the layers are recomputed for a part; called before anything of the step is computed.

        Args:
            of_anchor: whether the part has the anchor's texts.

        Raises:
            ConfigError: the config wants it and the model does not allow it.
        """
        if self.setting == "off":
            return False
        if self.setting == "on":
            if not self._is_exact():
                raise ConfigError(
                    "activation_checkpointing is on, but no layer of this model gives the same bits recomputed",
                    where="activation_checkpointing",
                    hint="Set activation_checkpointing: off, and a lower micro_batch_tokens if memory is short.",
                )
            return True
        return (self.always or not self._fits(part, of_anchor=of_anchor)) and self._is_exact()

    def recorded_parts(self, part: Batch) -> RecordedParts | None:
        """Return what computes parts from recordings; None if this one is not recorded."""
        learned = self.learned
        if not (self._records and learned.can_record and not learned.lacks_memory and self._config.deterministic):
            learned.recorded = None  # and what it keeps
            return None
        if not self._has_room_to_record(part):
            return None
        if learned.recorded is None:
            weights = list(self._state.parameters.values())
            learned.recorded = RecordedParts(weights, sharing_recorder(self._device))
        return learned.recorded

    def record_nothing(self) -> bool:
        """Record nothing any more, and let go of what recordings keep; return whether there were any."""
        had_some = self.learned.recorded is not None and self.learned.recorded.keeps_some
        self.learned.lacks_memory, self.learned.recorded = True, None
        return had_some

    def _has_room_to_record(self, part: Batch) -> bool:
        """Whether what the part is computed with may stay allocated beside the largest part that a step can have."""
        size = (part.tokens - 1).bit_length()
        if size not in self._roomy:
            usage = self.learned.read(self._device)
            own = self.profile.estimate([1 << size])
            beside = most_of(self.profile, self._config).total
            kept = 2 * own.gradients + own.activations + own.logits  # where they are computed, and where they are left
            self._roomy[size] = usage is not None and kept + beside <= ROOMY * usage.available
        return self._roomy[size]

    def may_recompute(self) -> bool:
        """Return whether a step that ran out of memory may be tried again with recomputation."""
        return self.setting == "auto" and self._is_exact()

    def _fits(self, part: Batch, *, of_anchor: bool) -> bool:
        lengths = [len(row.ids) for row in part.rows]
        if self._loss.layout.padded:
            lengths = [max(lengths)] * len(lengths)
        sizes = self._loss.sizes(lengths, part.target_tokens)
        if sizes is not None:
            lengths.append(sizes.tokens - sum(lengths))
        usage = self.learned.read(self._device)
        if usage is None or (not self._loss.layout.padded and self._crude(lengths) <= ROOMY * usage.free):
            return True
        return self.profile.estimate(lengths, of_anchor=of_anchor).total <= USABLE * usage.available

    def _crude(self, lengths: Sequence[int]) -> int:
        if self.learned.crude is None:
            self.learned.crude = crude_of(self._state.model)
        return self.learned.crude(lengths)

    def _is_exact(self) -> bool:
        known = self.learned.exact
        if self._dropout not in known:
            known[self._dropout] = self.recomputation.is_exact(self._gradients)
        return known[self._dropout]

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of a small part, with dropout as in training; no other effect remains."""
        model = self._state.model
        rows = [Row(np.arange(length) % _vocabulary(self._loss), np.arange(length) > 0) for length in PROOF_ROWS]
        batch = Batch(rows, [RowReference("proof", place) for place in range(len(rows))], list(range(len(rows))))
        try:
            with (
                deterministic(self._device, exact=self._config.deterministic),
                seeded(fold(0, "recomputation"), self._device),
            ):
                add_gradients(self._loss(batch))
            return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        finally:
            self._loss.forget()
            model.zero_grad(set_to_none=True)


def _vocabulary(loss: TargetLoss) -> int:
    return int(loss.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator,union-attr]
