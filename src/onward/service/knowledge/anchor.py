"""The anchor: texts that the base wrote once for this run, stored and hashed; no data from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import xxhash
from safetensors.torch import load, save

from onward.atomic import remove_tree, replace_file
from onward.config import Config
from onward.data.tokenized import Row, TokenizedFile, TokenizedWriter, pack
from onward.digest import sha256_json, xxh3_file
from onward.errors import ConfigError, DamagedState
from onward.layout import RunLayout
from onward.service.session import Session
from onward.stated import read_if_there
from onward.store.ledger import Ledger
from onward.training.measuring.scores import Meter
from onward.training.model.capacity import anchor_excess
from onward.training.steps.anchor import TOP, AnchorTerm, top_of

Kept = TypeVar("Kept")
FACT = "anchor"
"""The ledger's fact: hashes of the texts, by their count and length, and of the base's distributions on them."""
TOP_MARK = f"-top{TOP}"


def anchor_rows(session: Session, config: Config, base: Callable[[], Meter]) -> list[Row]:
    """Return the anchor texts of a run as rows, which the base writes now if they are not there, or are damaged.

    All tokens of a row but the first are targets.

    Args:
        base: makes the meter of the base; called if the texts have to be written.

    Raises:
        DamagedState: they were written before, and written again they are other texts.
        ConfigError: they are longer than the rows that the model has positions for.
    """
    folder = session.layout.anchor / _name(session, config)

    def write() -> None:
        what = anchor_excess(session.capacity, config)
        if what:  # on a GPU the process could not go on after the attempt
            hint = "Set fewer in the config, and take out the file that has begun with it: onward skip"
            raise ConfigError(what, where="anchor.tokens", hint=hint)
        _keep(folder, base().write((config.anchor.rows, config.anchor.tokens), _first_token(session)))

    texts = _ensured(session, folder, _texts, write)
    return [texts.row(place) for place in range(texts.rows)]


def changed_anchors(layout: RunLayout, ledger: Ledger) -> list[str]:
    """Return the names of texts and distributions of a run's base that are missing, or are not what was written."""
    known: dict[str, str] = ledger.get(FACT, {})
    wrong: list[str] = []
    for name, digest in known.items():
        path = layout.anchor / (f"{name}.safetensors" if name.endswith(TOP_MARK) else f"{name}/tokens.bin")
        if not path.is_file() or xxh3_file(path) != digest:
            wrong.append(str(path.relative_to(layout.root)))
    return wrong


def anchor_term(session: Session, config: Config, base: Callable[[], Meter]) -> AnchorTerm | None:
    """Return the anchor's term in the loss under a config; None if it has no weight.

    Args:
        base: makes the meter of the base; called if texts or distributions have to be made.

    Raises:
        DamagedState: what was made before is gone or damaged, and made again it is something else.
    """
    if not (config.anchor.weight and config.anchor.rows):
        return None
    texts = anchor_rows(session, config, base)
    path = session.layout.anchor / f"{_name(session, config)}{TOP_MARK}.safetensors"
    kept = load(_ensured(session, path, _content, lambda: replace_file(path, save(_distributions(texts, base())))))
    return AnchorTerm(texts, kept["ids"].long(), kept["logs"], config.anchor.weight)


def _name(session: Session, config: Config) -> str:
    """Return the name of the texts: their count and length, and what they are a function of (a reset may change it)."""
    source = sha256_json([session.base_digest, session.tokenizer_digest, config.seed])
    return f"{config.anchor.rows}x{config.anchor.tokens}-{source[:8]}"


def _distributions(texts: list[Row], base: Meter) -> dict[str, torch.Tensor]:
    ids: list[torch.Tensor] = []
    logs: list[torch.Tensor] = []
    for text in texts:
        found = [top_of(logits) for batch in base.batches([text]) for logits, _ in base.logits(batch)]
        ids.append(torch.cat([each[0] for each in found]).int().cpu())
        logs.append(torch.cat([each[1] for each in found]).cpu())
    return {"ids": torch.stack(ids), "logs": torch.stack(logs)}


def _ensured(
    session: Session, path: Path, read: Callable[[Path], tuple[str, Kept] | None], make: Callable[[], None]
) -> Kept:
    """Return what is at a path, which is made first if it is not there, is damaged or is not what the ledger knows.

    Args:
        read: returns the hash and what is there; None if it is not there or damaged.

    Raises:
        DamagedState: what was made again is not what was made for this run.
    """
    known: dict[str, str] = session.ledger.get(FACT, {})
    name, found = path.stem, read(path)
    if found is None or known.get(name, found[0]) != found[0]:
        make()
        found = read(path)
    if found is None or known.get(name, found[0]) != found[0]:
        what = "the anchor texts are gone or damaged, and the base writes other ones here than it wrote for this run"
        hint = (
            f"Put {path.name} back from a copy of the run. Or set another anchor.rows in the config, and train "
            "without the file that has begun: onward skip"
        )
        raise DamagedState(what, where=path, hint=hint)
    if name not in known:
        session.ledger.put(**{FACT: {**known, name: found[0]}})
    return found[1]


def _texts(folder: Path) -> tuple[str, TokenizedFile] | None:
    try:
        texts = TokenizedFile.open(folder)
    except DamagedState:
        return None
    return texts.meta["files"]["tokens.bin"]["xxh3"], texts


def _content(path: Path) -> tuple[str, bytes] | None:
    content = read_if_there(path)
    return None if content is None else (xxhash.xxh3_128_hexdigest(content), content)


def _first_token(session: Session) -> int:
    """Return the token that a text begins with: the start token or, without one, the end token between texts."""
    tokenizer = session.tokenizer_state
    return next((token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None), session.pad_id)


def _keep(folder: Path, ids: list[list[int]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = TokenizedWriter(folder)
    try:
        if TokenizedWriter.left(folder):  # damaged ones
            remove_tree(folder)
        targets = np.arange(len(ids[0])) > 0
        writer.append([pack(np.array(text, dtype=np.int64), targets) for text in ids], list(range(len(ids))))
        writer.publish({"written_by": "the base"})
    finally:
        writer.discard()
