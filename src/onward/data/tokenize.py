"""One training file to tokens: every row is checked, and all of them are published or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from onward.data.records import RowError, parse_row
from onward.data.row_tokenizer import OverLength, RowText, RowTokenizer, cache_key
from onward.data.sources import FileError, SourceRow, read_rows, row_unit
from onward.data.tokenized import PackedRow, Row, TokenizedFile, TokenizedWriter

CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1 << 20  # a chunk of long rows ends earlier: nothing ends the work within one
PROBLEMS_SHOWN = 20

_Chunk: TypeAlias = list[tuple[int, RowText]]

__all__ = [
    "IntakeReport",
    "OverLength",
    "Problem",
    "Row",
    "RowTokenizer",
    "TokenizedFile",
    "cache_key",
    "tokenize_file",
]


@dataclass(frozen=True)
class Problem:
    """Why a file is refused: the line (or row) concerned, None for the whole file, and what to do about it."""

    line: int | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class IntakeReport:
    """What came of reading one file.

    Args:
        ok: whether the file was tokenized and published.
        rows: rows that will be trained on.
        tokens: tokens in them.
        target_tokens: tokens that the loss covers.
        truncated: rows whose end was cut off at `max_length`.
        dropped: rows left out because they are too long.
        longest: tokens of the longest row kept.
        problems: the first problems, at most 20.
        problem_count: how many there are.
        unit: what `Problem.line` counts, "line" or "row".
    """

    ok: bool
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])
    problem_count: int = 0
    unit: str = "line"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, as the report beside a rejected file holds it."""
        return asdict(self)


def tokenize_file(
    source: Path,
    directory: Path,
    sha256: str,
    row_tokenizer: RowTokenizer,
    *,
    stop: Callable[[], None] = lambda: None,
) -> IntakeReport:
    """Check every row of `source` and publish its tokens as `directory`, or publish nothing and say why.

    Args:
        source: the training file.
        directory: where the tokens go; must not exist yet.
        sha256: the hash of `source`, kept in meta.json.
        row_tokenizer: the tokenizer and the length policy.
        stop: called for every row, good or bad; may raise to give up, and then nothing is left behind.

    Raises:
        FileExistsError: `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(directory)
    writer = TokenizedWriter(directory)
    try:
        intake = _Intake(row_tokenizer, writer)
        intake.read(source, stop)
        report = intake.report(_unit(source))
        if report.ok:
            writer.publish(
                {
                    "truncated": report.truncated,
                    "dropped": report.dropped,
                    "unit": report.unit,
                    "source_sha256": sha256,
                    "tokenizer": row_tokenizer.fingerprint,
                    "max_length": row_tokenizer.max_length,
                    "over_length": row_tokenizer.over_length,
                }
            )
        return report
    finally:
        writer.discard()


class _Intake:
    """The counts and problems of one file while it is read."""

    def __init__(self, row_tokenizer: RowTokenizer, writer: TokenizedWriter) -> None:
        self._row_tokenizer = row_tokenizer
        self._writer = writer
        self._problems: list[Problem] = []
        self._problem_count = self._truncated = self._dropped = 0

    def read(self, source: Path, stop: Callable[[], None]) -> None:
        """Read the file in chunks; one is tokenized in another thread while the next is read and the last written."""
        ahead: tuple[_Chunk, Future[list[Any]]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="onward-tokenizer") as thread:
            try:
                for chunk in _chunks(self._prepared(read_rows(source), stop)):
                    encoding = thread.submit(self._row_tokenizer.tokenize, [text for _, text in chunk])
                    if ahead is not None:
                        self._take(*ahead)
                    ahead = chunk, encoding
            except FileError as error:
                self._refuse(error.line, error)
            if ahead is not None:
                self._take(*ahead)

    def report(self, unit: str) -> IntakeReport:
        if not self._problem_count and not self._writer.rows:
            self._refuse(None, self._nothing_left())
        writer = self._writer
        return IntakeReport(
            ok=not self._problem_count,
            rows=writer.rows,
            tokens=writer.tokens,
            target_tokens=writer.target_tokens,
            truncated=self._truncated,
            dropped=self._dropped,
            longest=writer.longest,
            problems=self._problems,
            problem_count=self._problem_count,
            unit=unit,
        )

    def _prepared(self, rows: Iterable[SourceRow], stop: Callable[[], None]) -> Iterator[tuple[int, RowText]]:
        for row in rows:
            stop()
            try:
                yield row.line, self._prepare(row)
            except RowError as error:
                self._refuse(row.line, error)

    def _prepare(self, row: SourceRow) -> RowText:
        if row.problem is not None:
            raise RowError(row.problem, row.remedy or "")
        try:
            return self._row_tokenizer.prepare(parse_row(row.value))
        except RecursionError:
            raise RowError("the JSON is nested too deeply", "flatten the row") from None

    def _take(self, chunk: _Chunk, encodings: Future[list[Any]]) -> None:
        kept: list[PackedRow] = []
        lines: list[int] = []
        encoded = self._row_tokenizer.pack([text for _, text in chunk], encodings.result())
        for (line, _), packed in zip(chunk, encoded, strict=True):
            try:
                fitted = self._row_tokenizer.fit(packed)
            except RowError as error:
                self._refuse(line, error)
                continue
            self._truncated += fitted.truncated
            if fitted.packed is None:
                self._dropped += 1
                continue
            kept.append(fitted.packed)
            lines.append(line)
        self._writer.append(kept, lines)

    def _refuse(self, line: int | None, error: RowError | FileError) -> None:
        self._problem_count += 1
        self._problems = sorted(
            [*self._problems, Problem(line, error.reason, error.remedy)], key=lambda problem: problem.line or 0
        )[:PROBLEMS_SHOWN]

    def _nothing_left(self) -> FileError:
        if self._dropped:
            return FileError(
                f"all {self._dropped} rows are longer than max_length = {self._row_tokenizer.max_length}",
                "raise max_length, or split the rows",
            )
        return FileError("the file has no rows", "write at least one row")


def _chunks(rows: Iterable[tuple[int, RowText]]) -> Iterator[_Chunk]:
    chunk: _Chunk = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row[1].text)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _unit(source: Path) -> str:
    try:
        return row_unit(source)
    except FileError:
        return "line"
