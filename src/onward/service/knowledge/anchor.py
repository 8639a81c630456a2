"""The anchor: texts that the base wrote once for this run, stored and hashed; no data from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onward.config import Config
from onward.data.tokenized import Row, TokenizedFile, TokenizedWriter, pack
from onward.errors import DamagedState
from onward.service.session import Session
from onward.training.scores import Meter

FACT = "anchor"
"""Fact of the ledger: the hash of the texts by their count and length."""


def anchor_rows(session: Session, config: Config, base: Callable[[], Meter]) -> list[Row]:
    """Return the anchor texts of a run as rows whose tokens but the first are all targets; written now if they are not.

    Args:
        base: makes what measures the base; called where the texts have to be written.

    Raises:
        DamagedState: they were written before, are gone or damaged, and written again they are others.
    """
    if not config.anchor.rows:
        return []
    name = f"{config.anchor.rows}x{config.anchor.tokens}"
    folder = session.layout.anchor / name
    known: dict[str, str] = session.ledger.get(FACT, {})
    texts = TokenizedFile.open(folder) if folder.is_dir() else None
    if texts is None:
        ids = base().write((config.anchor.rows, config.anchor.tokens), _first_token(session))
        _keep(folder, ids)
        texts = TokenizedFile.open(folder)
    digest: str = texts.meta["files"]["tokens.bin"]["xxh3"]
    if known.get(name, digest) != digest:
        raise DamagedState(
            "the anchor texts are not those that the base wrote for this run",
            where=folder, hint=f"Put {folder.name}/ back from a copy, or set other anchor.rows in the config.",
        )  # fmt: skip
    if name not in known:
        session.ledger.put(**{FACT: {**known, name: digest}})
    return [texts.row(place) for place in range(texts.rows)]


def _first_token(session: Session) -> int:
    """The token that a text begins with: the tokenizer's beginning, else its end, between two texts."""
    tokenizer: Any = session.tokenizer
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in found if isinstance(token, int)), session.pad_id)


def _keep(folder: Any, ids: list[list[int]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = TokenizedWriter(folder)
    try:
        targets = np.arange(len(ids[0])) > 0
        writer.append([pack(np.array(text, dtype=np.int64), targets) for text in ids], list(range(len(ids))))
        writer.publish({"written_by": "the base"})
    finally:
        writer.discard()
