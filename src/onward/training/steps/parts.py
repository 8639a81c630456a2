"""The parts of an optimizer step: which rows are computed at once, and with which seed."""

from __future__ import annotations

from dataclasses import dataclass

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.training.layers.rope import CONSTANT, Angles
from onward.training.seeds import fold

SEED_OF_RANK_0 = 0
"""Seeds once depended on the rank. Now each part has its own, so that bits do not depend on who computes it."""


@dataclass(frozen=True)
class RowLayout:
    """How a model takes rows.

    Args:
        padded: whether shorter rows are padded to the longest of their part; otherwise rows are laid end to end.
        angles: which rows have the same angles of RoPE, so that they may be computed together.
    """

    padded: bool = False
    angles: Angles = CONSTANT


END_TO_END = RowLayout()


@dataclass(frozen=True)
class Part:
    """Rows of a step's batch that are computed at once, the seed of their dropout, and the share they belong to.

    Shares are what is distributed over devices: `parts` of the config. No seed depends on which device computes a part.
    """

    batch: Batch
    seed: int
    share: int = 0


def parts_of(batch: Batch, config: Config, step: int, layout: RowLayout = END_TO_END) -> list[Part]:
    """Split a batch into parts, as a function of the batch, the config, the row layout and the number of steps before.

    Rows of a part have the same angles. Padded rows are taken longest first, and a part has at most
    `micro_batch_tokens` tokens including padding under `gradient_accumulation: auto`, or one row. Parts of a share
    follow each other.
    """
    pieces = [
        (piece, number)
        for number, share in enumerate(shares_of(batch, config.parts))
        for group in _by_angles(share, layout.angles)
        for piece in _cut(group, batch, config, layout)
    ]
    return [
        Part(piece, fold(config.seed, "step", step, place, SEED_OF_RANK_0), share)
        for place, (piece, share) in enumerate(pieces)
    ]


def shares_of(batch: Batch, count: int) -> list[Batch]:
    """Distribute the rows of a batch over at most `count` shares, with the same number of rows and about as many
    tokens.

    They are dealt longest first, back and forth. Within a share they keep their order.
    """
    if count == 1 or len(batch) <= 1:
        return [batch]
    dealt: list[list[int]] = [[] for _ in range(min(count, len(batch)))]
    for place, row in enumerate(sorted(range(len(batch)), key=lambda place: -len(batch.rows[place].ids))):
        turn, within = divmod(place, len(dealt))
        dealt[within if turn % 2 == 0 else -1 - within].append(row)
    return [batch.take(sorted(rows)) for rows in dealt]


def _by_angles(batch: Batch, angles: Angles) -> list[Batch]:
    """Return the rows of each regime of angles, in the order in which the regimes first occur."""
    if angles.are_constant:
        return [batch]
    places: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(batch.rows):
        places.setdefault(angles.regime(len(row.ids)), []).append(place)
    return [batch.take(own) for own in places.values()]


def _cut(group: Batch, batch: Batch, config: Config, layout: RowLayout) -> list[Batch]:
    if layout.padded:
        group = group.longest_first()
    parts = config.gradient_accumulation
    if parts != "auto":
        return group.split(-(-parts * len(group) // len(batch)))
    tokens = config.part_tokens
    return group.split_by_padded_size(tokens) if layout.padded else group.split_by_tokens(tokens)
