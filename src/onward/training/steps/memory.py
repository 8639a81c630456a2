"""How much of the device's memory a step takes: what was measured of the model, extrapolated to the parts of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from onward.config import Config
from onward.config.keys import MICRO_BATCH_TOKENS
from onward.training.device.memory import Usage
from onward.training.layers.cross_entropy import CHUNK_BYTES, LOGITS_BYTES, TILE_BYTES
from onward.training.steps.anchor import texts_of_step

FACT = "memory"
"""The ledger's fact in which a run keeps what was measured of its model."""
USABLE = 0.92
"""The share of the available memory that a step may take."""
HOLES = {"full": (1.10, 3.0), "adapter": (1.33, 2.3), "4-bit": (1.75, 8.5)}
"""Memory of a process on a CPU per byte that the backward pass keeps, without and with recomputation. Its heap keeps
holes: small tensors that stay, such as those of an adapter, lie among large ones that are freed, such as recomputed
layers and weights that are expanded from 4 bits. Checked with parts of 64 to 4,096 tokens of a model of 135 million
weights (`bench/memory.py`). In memory that CUDA's allocator reports as allocated there are no holes."""
LIBRARIES = {"full": 60_000_000, "adapter": 60_000_000, "4-bit": 110_000_000}
"""What libraries take on first use on a CPU, and what is left of loading."""
DIVERGENCE = 4
"""Logits of the anchor's texts, their logarithms, and the gradients of both."""


@dataclass(frozen=True)
class Polynomial:
    """Bytes of a part: a constant, bytes per token, and bytes per pair of tokens of a row.

    Args:
        filled: bytes per block that a row begins, for models that fill rows up to whole blocks, as for a scan.
        block: tokens of a block.
    """

    constant: float
    token: float
    pair: float
    filled: float = 0.0
    block: int = 1

    def __call__(self, lengths: Sequence[int]) -> int:
        """Return the bytes of rows of these lengths."""
        return int(self.constant + sum(map(self._of_row, lengths)))

    def _of_row(self, length: int) -> float:
        return self.token * length + self.pair * length**2 + self.filled * -(-length // self.block)


@dataclass(frozen=True)
class Profile:
    """What a model takes, in bytes.

    Args:
        base: weights that are not trained, and buffers.
        trained: weights that are.
        moments: the optimizer's state.
        whole: what the backward pass keeps of the rows of a part.
        recomputed: the same with recomputed layers; None if they cannot be recomputed.
        layers: what all layers keep, in layers that keep as much as the largest: one at a time is recomputed.
        vocabulary: logits of a token.
        trained_head: bytes of the head's weights if they are trained.
        trained_rows: bytes of the head's gradient if some of its rows are trained: `whole` counts it once.
        device: type of the device.
        kind: what is trained, as in `HOLES`.
        workspace: what a step of the optimizer takes while it runs.
        pinned: the main memory that PyTorch takes for a copy from a GPU.
    """

    base: int
    trained: int
    moments: int
    whole: Polynomial
    recomputed: Polynomial | None
    layers: float
    vocabulary: int
    trained_head: int
    device: str
    kind: str = "adapter"
    workspace: int = 0
    pinned: int = 0
    trained_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self | None:
        """Return the profile that a ledger kept; None if there is none."""
        if values is None:
            return None
        again = values["recomputed"]
        kept: dict[str, Any] = {
            "whole": Polynomial(**values["whole"]), "recomputed": Polynomial(**again) if again else None
        }  # fmt: skip
        return cls(**{**values, **kept})

    def estimate(
        self,
        lengths: Sequence[int],
        *,
        recompute: bool = False,
        alone: bool = False,
        apart: bool = False,
        of_anchor: bool = False,
    ) -> Estimate:
        """Return what a step takes if its largest part has rows of these lengths.

        Args:
            alone: whether the step has no other part; otherwise there are gradients before its backward pass begins.
            apart: whether the gradients of several parts are added before they are added to those of others.
            of_anchor: whether the rows are the anchor's texts, whose logits are kept for some tokens at a time.
        """
        tokens, whole = sum(lengths), self.whole(lengths) - self.trained_rows
        one_layer = whole / max(1, self.layers)
        again = recompute and self.recomputed is not None
        kept = self.recomputed(lengths) - self.trained_rows + one_layer if again and self.recomputed else whole
        copies, budget = 2, (CHUNK_BYTES if self.trained_head else TILE_BYTES).get(self.device, LOGITS_BYTES)
        if of_anchor:
            copies, budget = DIVERGENCE, LOGITS_BYTES
        logits = copies * min(budget, 4 * tokens * self.vocabulary)
        logits += 3 * self.trained_head  # the head's gradient: summed, scaled, and once more
        logits += 2 * self.trained_rows  # the head with its rows, and the gradient of all
        gradients = 2 * self.trained if apart else self.trained
        if self.device == "cpu":
            plain, recomputed = HOLES[self.kind]
            activations = int(whole * plain)
            if again:
                activations = min(activations, int((kept + one_layer) * recomputed))
            if alone:  # they take the place of activations that are freed
                gradients = max(0, gradients - activations - logits)
        else:
            activations = int(kept + one_layer)
        return Estimate(
            base=self.base,
            trained=self.trained,
            gradients=gradients,
            moments=self.moments + self.workspace,
            activations=activations,
            logits=logits,
            libraries=LIBRARIES[self.kind] if self.device == "cpu" else 0,
            commit=self.copied if self.device == "cpu" else 0,
        )

    @property
    def copied(self) -> int:
        """The bytes of the copy that a commit writes in the background. It stays in main memory for the next one."""
        return self.pinned or self.trained + self.moments


@dataclass(frozen=True)
class Estimate:
    """What a step takes at its peak, in bytes, by purpose.

    Args:
        moments: with what the optimizer's step takes.
        commit: the copy of the state, on a CPU, where it lies in the same memory.
    """

    base: int
    trained: int
    gradients: int
    moments: int
    activations: int
    logits: int
    libraries: int
    commit: int

    @property
    def total(self) -> int:
        """The total."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(self).items())
        return f"{self.total / 1e9:.2f} GB at the peak of a step ({parts})"


def largest_part(config: Config) -> list[int]:
    """Return the row lengths of the largest part that a step can have if all rows have full length."""
    tokens, length = config.part_tokens, config.max_length
    if config.gradient_accumulation != "auto":
        return [length] * -(-config.batch_size // min(config.most_parts, config.batch_size))
    share = -(-config.batch_size // min(config.parts, config.batch_size))
    return [length] * max(1, min(share, tokens // length))


def largest_texts(config: Config) -> list[int]:
    """Return the lengths of the anchor's texts that are computed at once; none if they are not in the loss."""
    length = config.anchor.tokens
    if not (config.anchor.weight and config.anchor.rows):
        return []
    return [length] * max(1, min(texts_of_step(config), config.part_tokens // length))


def most_of(profile: Profile, config: Config, *, recompute: bool = False) -> Estimate:
    """Return what a step of full rows takes at most: with its largest part, or with the anchor's texts."""
    part, texts = largest_part(config), largest_texts(config)
    share = -(-config.batch_size // config.parts)
    most = profile.estimate(
        part, recompute=recompute, alone=len(part) >= config.batch_size, apart=config.parts > 1 and len(part) < share
    )
    if not texts:
        return most
    anchored = profile.estimate(texts, recompute=recompute, of_anchor=True)
    return max(most, anchored, key=lambda estimate: estimate.total)


PART_TOKENS = (32768, 16384, MICRO_BATCH_TOKENS, 4096, 2048)
"""Numbers of tokens that a part may have on a GPU, largest first; fewer leave a GPU idle."""


def part_tokens(profile: Profile, room: int, length: int) -> int:
    """Return the tokens of a part that fit into `room` bytes: without recomputation if possible, else with it."""
    for recompute in (False, True):
        for tokens in PART_TOKENS if not recompute else PART_TOKENS[2:]:
            if profile.estimate([length] * max(1, tokens // length), recompute=recompute).total <= room:
                return tokens
    return PART_TOKENS[-1]


def fits(estimate: Estimate, usage: Usage | None) -> bool:
    """Return whether a step fits into the available memory; True if that is unknown."""
    return usage is None or estimate.total <= USABLE * usage.available
