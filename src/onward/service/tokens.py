"""The tokenized form of an accepted file: opened from the cache, or made again from the archived original."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from onward.config import Config
from onward.data.tokenize import RowTokenizer, TokenizedFile, cache_key, tokenize_file
from onward.digest import sha256_file
from onward.errors import DamagedState, FileRejected
from onward.service.session import Session
from onward.store.ledger import Row


def open_tokens(session: Session, row: Row, config: Config, stop: Callable[[], None]) -> TokenizedFile:
    """Open the tokens of an accepted file.

    Raises:
        DamagedState: the cache is damaged and the archived original is not the file that was accepted.
        FileRejected: the config changed so that rows of the file are refused now.
    """
    key = cache_key(row["sha256"], session.tokenizer_digest, config.max_length, config.over_length)
    folder = session.layout.tokens / key
    if folder.is_dir():
        try:
            return TokenizedFile.open(folder)
        except DamagedState as error:
            session.ledger.add_event("warning", f"the tokens of {row['name']} are made again: {error.what}")
            shutil.rmtree(folder)
    original = session.layout.root / row["copy"]
    if not original.is_file() or sha256_file(original) != row["sha256"]:
        raise DamagedState(
            f"the archived original of {row['name']} is missing or changed",
            where=original,
            hint=f"Put back the file with SHA-256 {row['sha256']}, then: onward train",
        )
    report = tokenize_file(
        original,
        folder,
        row["sha256"],
        RowTokenizer(session.tokenizer, config.max_length, config.over_length),
        stop=stop,
    )
    if not report.ok:
        first = report.problems[0]
        raise FileRejected(
            f"{row['name']}, {report.unit} {first.line}: {first.reason}",
            where="max_length, over_length",
            hint="The file was accepted under another config. Put it back, then: onward train",
        )
    return TokenizedFile.open(folder)
