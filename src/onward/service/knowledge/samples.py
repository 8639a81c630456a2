"""The rows that a file is measured on, kept apart from its tokens, which may be removed: measuring needs few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onward.atomic import remove_tree
from onward.config import Config, stored_config
from onward.data.files.faults import SourceChanged
from onward.data.files.reading import Reading
from onward.data.plan.holdout import count_held_out, rows_in_question
from onward.data.row_tokenizer import cache_key
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import Row, TokenizedFile, TokenizedWriter, pack
from onward.digest import sha256_file
from onward.errors import ConfigError, DamagedState
from onward.hooks.evaluation import Sample
from onward.service.intake.rules import RunTokenizer
from onward.service.intake.tokens import open_tokens
from onward.service.session import Session
from onward.store.rows import FileRow

IN_MEMORY = 256
"""How many files, those read last, have their rows in memory: the stream may have any number of files."""


class Samples:
    """Reads the rows that files are measured on.

    Args:
        look: called for each row that is read again; may raise to give up.
        folder: where these rows are kept.
    """

    def __init__(self, session: Session, look: Callable[[], None], folder: Path) -> None:
        self._session = session
        self._look = look
        self._folder = folder
        self._read: dict[Path, Sample] = {}

    def of_file(self, row: FileRow, config: Config, limit: int, tokens: TokenizedFile | None = None) -> Sample:
        """Return the rows that a file of the stream is measured on: held-out ones, or trained ones if none are held
        out.

        Args:
            config: the config in force for the file.
            limit: the most rows to return.
            tokens: the tokens of the file, if available.

        Raises:
            DamagedState: the original is missing or changed.
            ConfigError: its rows are refused now.
        """
        rows = row.rows if tokens is None else tokens.rows
        held = self._held_out_always(row, rows, config)
        key = self._key(row.sha256, config)
        return self._sample(
            f"{key}-{held}-{limit}", row.sha256, limit, held or None,
            lambda: tokens or open_tokens(self._session, row, config, self._look),
        )  # fmt: skip

    def of_any_rows(self, row: FileRow, config: Config, count: int) -> Sequence[Row]:
        """Return `count` rows of a file of the stream, trained or not.

        Raises:
            DamagedState, ConfigError: as for `of_file`.
        """
        key = self._key(row.sha256, config)
        tokens = partial(open_tokens, self._session, row, config, self._look)
        return self._sample(f"{key}-any-{count}", row.sha256, count, None, tokens).rows

    def of_question_file(self, name: str, config: Config) -> tuple[str, Sample]:
        """Return the SHA-256 of a file of `evaluation.files` and the rows that the model is measured on.

        Raises:
            ConfigError: it is missing, or a row of it is refused.
        """
        where, limit = self._session.layout.root / name, config.evaluation.rows
        try:
            sha256 = sha256_file(where)
        except OSError as error:
            raise _unreadable(where, error.strerror or str(error)) from None
        key = self._key(sha256, config)
        return sha256, self._sample(
            f"{key}-q-{limit}", sha256, limit, 0, lambda: self._tokenize(where, sha256, key, config)
        )

    def _held_out_always(self, row: FileRow, rows: int, config: Config) -> int:
        """Return how many rows were held out of every file with this content, as counted at the time."""
        ledger = self._session.ledger
        held = [count_held_out(rows, config.holdout)]
        for other in ledger.with_content(row.sha256):
            if other.id != row.id and other.state in ("training", "done") and other.config is not None:
                then = stored_config(ledger.config_of(other))
                held.append(count_held_out(rows, then.holdout) if other.rows == rows else 0)
        return min(held)

    def _sample(
        self, name: str, sha256: str, limit: int, held: int | None, tokens: Callable[[], TokenizedFile]
    ) -> Sample:
        folder = self._folder / name
        if folder not in self._read:
            kept = _open(folder) or _keep(folder, tokens(), self._session.config.seed, sha256, held or limit, limit)
            rows = [kept.row(place) for place in range(kept.rows)]
            indices: Sequence[int] = kept.meta["indices"]
            self._read[folder] = Sample(rows, indices, trained=held is None)
            if len(self._read) > IN_MEMORY:
                del self._read[next(iter(self._read))]
        return self._read[folder]

    def _tokenize(self, path: Path, sha256: str, key: str, config: Config) -> TokenizedFile:
        target = self._folder / f"{key}-all"
        if (kept := _open(target)) is not None:
            return kept
        session = self._session
        row_tokenizer = RunTokenizer(session.tokenizer_state, config, session.capacity.embedding_rows)
        try:
            report = tokenize_file(path, target, sha256, row_tokenizer, stop=self._look, reading=Reading.of(config))
        except SourceChanged:
            raise _unreadable(path, "it changed while it was read") from None
        if not report.ok:
            first = report.problems[0]
            raise _unreadable(path, f"{report.unit} {first.line}: {first.reason}")
        return TokenizedFile.open(target)

    def _key(self, sha256: str, config: Config) -> str:
        return cache_key(sha256, self._session.tokenizer_state.key, config)


def _open(folder: Path) -> TokenizedFile | None:
    if not folder.is_dir():
        return None
    try:
        return TokenizedFile.open(folder)
    except DamagedState:
        remove_tree(folder)
        return None


def _keep(folder: Path, tokens: TokenizedFile, seed: int, sha256: str, count: int, limit: int) -> TokenizedFile:
    indices = rows_in_question(seed, sha256, tokens.rows, min(count, limit))
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = TokenizedWriter(folder)
    try:
        rows = [tokens.row(index) for index in indices]
        writer.append([pack(row.ids, row.targets) for row in rows], [tokens.line(index) for index in indices])
        meta: dict[str, Any] = {"indices": indices, "source_sha256": sha256}
        writer.publish(meta)
    finally:
        writer.discard()
    return TokenizedFile.open(folder)


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"a file to measure on cannot be read: {reason}", where=f"evaluation.files: {path}",
        hint="Put it there, or remove it from evaluation.files in the config.",
    )  # fmt: skip
