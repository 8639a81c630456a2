"""The tokens of an accepted file: opened from the cache, or recreated from the archived original."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from onward.atomic import remove_tree
from onward.config import Config, stored_config
from onward.data.files.faults import SourceChanged
from onward.data.files.reading import Reading
from onward.data.report import IntakeReport
from onward.data.row_tokenizer import RowTokenizer, cache_key
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import TokenizedFile
from onward.errors import ConfigError, DamagedState
from onward.layout import step_of
from onward.service.intake.archive import require_original
from onward.service.intake.rules import RunTokenizer
from onward.service.session import Session
from onward.store.files import HELD
from onward.store.ledger import Ledger
from onward.store.lookup import typed
from onward.store.rows import FileRow

LATELY = 32
"""How many finished files are looked at when tokens are removed: a boundary frees one, older releases left more."""


def open_tokens(session: Session, row: FileRow, config: Config, stop: Callable[[], None]) -> TokenizedFile:
    """Open the tokens of an accepted file; those of one that has begun are the ones with which it began.

    Raises:
        DamagedState: the cache is damaged and the archived original is not the file that was accepted, or other tokens
            are made of it here.
        ConfigError: the config changed, and rows of the file are refused now.
    """
    folder = session.layout.tokens / _key(session, row, config)
    if folder.is_dir():
        try:
            return _as_begun(row, TokenizedFile.open(folder))
        except DamagedState as error:
            session.ledger.add_event("warning", f"the tokens of {row.name} are made again: {error.what}")
            remove_tree(folder)
    _make_again(session, row, config, folder, stop)
    return _as_begun(row, TokenizedFile.open(folder))


def _as_begun(row: FileRow, tokens: TokenizedFile) -> TokenizedFile:
    """Return the tokens if they are those with which a file began, as far as that is known.

    Raises:
        DamagedState: they are others.
    """
    if row.token_digest in (None, tokens.digest):
        return tokens
    raise DamagedState(
        f"the tokens of {row.name} are not those with which it began",
        where=tokens.directory,
        hint="Libraries that make tokens were changed: install what they were then. Or go back to before this file, "
        f"and train it and those after it again: onward rollback --to step:{row.first_step} --requeue",
    )


def _make_again(session: Session, row: FileRow, config: Config, folder: Path, stop: Callable[[], None]) -> None:
    """Make the tokens of an accepted file from its original.

    They are made apart from those of intake, whose lock is held for as long as the checking of a file takes.
    """
    made = session.layout.cache / "again" / folder.name
    remove_tree(made.parent)
    make_tokens(session, row, config, made, stop)
    session.layout.tokens.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        made.rename(folder)
    remove_tree(made.parent)


def make_tokens(session: Session, row: FileRow, config: Config, made: Path, stop: Callable[[], None]) -> None:
    """Make the tokens of an accepted file from its original, in a new folder.

    Rows that were left out when it was accepted are left out again. An earlier release may have accepted rows that are
    refused now; in a file without left-out rows, or with more of them than are known, these stay.

    Raises:
        DamagedState: the archived original is not the file that was accepted.
        ConfigError: rows of the file are refused now.
    """
    original = require_original(session.layout, row, stop)
    reading = Reading.of_accepted(config, row.bad_rows)
    report = IntakeReport(ok=False)
    try:
        for row_tokenizer in _tokenizers(session, row, config):
            report = tokenize_file(original, made, row.sha256, row_tokenizer, stop=stop, reading=reading)
            if report.ok:
                return
    except SourceChanged:
        raise DamagedState(f"the archived original of {row.name} was changed", where=original) from None
    first = report.problems[0]
    raise ConfigError(
        f"{row.name}, {report.unit} {first.line}: {first.reason}",
        where="max_length, over_length, columns, text.documents",
        hint="The file was accepted under another config, or by an earlier release that checked less. Put that "
        f"back, or leave the file out: onward skip {typed(row.name)}",
    )


def _tokenizers(session: Session, row: FileRow, config: Config) -> Iterator[RowTokenizer]:
    if row.bad_rows:
        yield RunTokenizer(session.tokenizer_state, config, session.capacity.embedding_rows)
    yield RowTokenizer(session.tokenizer_state, config.max_length, config.over_length)


def forget_tokens(session: Session, sources: Collection[str] = ()) -> None:
    """Remove tokens of finished files that nothing needs; they can be recreated from the originals in `archive/`.

    They may be needed by the queue, by the file in training, and to replay the newest boundary from the restore point
    before it.

    Args:
        sources: content that a current plan takes rows from.
    """
    steps = [step_of(point) for point in session.layout.restore_points()]
    newest = session.ledger.committed_step()
    first = max((step for step in steps if step < newest), default=0)
    configs: dict[str, Config] = {}
    for row in session.ledger.done_before(first, LATELY):
        if row.sha256 in sources or _is_needed(session.ledger, row, first):
            continue
        assert row.config is not None
        config = configs.get(row.config) or stored_config(session.ledger.config_of(row))
        configs[row.config] = config
        remove_tree(session.layout.tokens / _key(session, row, config))


def _is_needed(ledger: Ledger, row: FileRow, first: int) -> bool:
    """Whether another file with the same content waits, or would be replayed from a step on."""
    others = [other for other in ledger.with_content(row.sha256) if other.state in HELD]
    return any(other.state != "done" or other.first_step >= first for other in others)


def _key(session: Session, row: FileRow, config: Config) -> str:
    return cache_key(row.sha256, session.tokenizer_state.key, config)
