"""The tokenized form of an accepted file: opened from the cache, or made again from the archived original."""

from __future__ import annotations

from collections.abc import Callable

from filelock import FileLock

from onward.atomic import remove_tree
from onward.config import Config, stored_config
from onward.data.limits import NO_LIMITS
from onward.data.tokenize import RowTokenizer, TokenizedFile, cache_key, tokenize_file
from onward.errors import DamagedState, FileRejected
from onward.layout import step_of
from onward.service.intake.archive import require_original
from onward.service.session import Session
from onward.store.rows import FileRow

LATELY = 8
"""Finished files looked at when tokens are forgotten; a boundary frees one file's, as a rule."""


def open_tokens(session: Session, row: FileRow, config: Config, stop: Callable[[], None]) -> TokenizedFile:
    """Open the tokens of an accepted file.

    Raises:
        DamagedState: the cache is damaged and the archived original is not the file that was accepted.
        FileRejected: the config changed so that rows of the file are refused now.
    """
    folder = session.layout.tokens / _key(session, row, config)
    if folder.is_dir():
        try:
            return TokenizedFile.open(folder)
        except DamagedState as error:
            session.ledger.add_event("warning", f"the tokens of {row.name} are made again: {error.what}")
            remove_tree(folder)
    original = require_original(session.layout.root, row)
    row_tokenizer = RowTokenizer(session.tokenizer_state, config.max_length, config.over_length)
    with FileLock(session.layout.intake_lock):  # intake removes what an interrupted one left half written
        report = tokenize_file(original, folder, row.sha256, row_tokenizer, stop=stop, limits=NO_LIMITS)
    if not report.ok:
        first = report.problems[0]
        raise FileRejected(
            f"{row.name}, {report.unit} {first.line}: {first.reason}",
            where="max_length, over_length",
            hint="The file was accepted under another config. Put it back, then: onward train",
        )
    return TokenizedFile.open(folder)


def forget_tokens(session: Session) -> None:
    """Remove tokens of finished files that no kept restore point would train again; `archive/` has the originals."""
    points = session.layout.restore_points()
    oldest = step_of(points[-1]) if points else 0
    rows = session.ledger.done_before(oldest, LATELY)
    for row in rows:
        config = stored_config(session.ledger.config_of(row))
        remove_tree(session.layout.tokens / _key(session, row, config))


def _key(session: Session, row: FileRow, config: Config) -> str:
    return cache_key(row.sha256, session.tokenizer_digest, config.max_length, config.over_length)
