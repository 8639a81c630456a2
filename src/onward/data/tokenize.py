"""One training file to tokens: every row is checked, and all of them are published or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from onward.data.containers import SourceFile
from onward.data.faults import FileError, SourceChanged, refusal_of
from onward.data.limits import DEFAULT_LIMITS, Limits
from onward.data.records import RowError, parse_row
from onward.data.row_tokenizer import Fitted, OverLength, RowText, RowTokenizer, cache_key
from onward.data.sources import SourceRow, file_format, row_unit, rows_of
from onward.data.tokenized import PackedRow, Row, RowCount, TokenizedFile, TokenizedWriter

CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1 << 19  # a chunk of long rows ends earlier: the work cannot be stopped inside a chunk
PROBLEMS_SHOWN = 20

_Chunk: TypeAlias = list[tuple[int, RowText]]
_Ahead: TypeAlias = tuple[_Chunk, Future[list[Any]]]

__all__ = [
    "IntakeReport", "Limits", "OverLength", "Problem", "Row", "RowTokenizer", "SourceChanged", "TokenizedFile",
    "cache_key", "check_rows", "tokenize_file",
]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Why a file is refused: the line (or row) concerned, None for the whole file, and what to do about it."""

    line: int | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class IntakeReport:
    """The outcome of reading one file.

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
        """Return the report as plain values, as `rejected/` keeps it."""
        return asdict(self)


def tokenize_file(
    source: Path,
    directory: Path,
    sha256: str,
    row_tokenizer: RowTokenizer,
    *,
    stop: Callable[[], None] = lambda: None,
    limits: Limits = DEFAULT_LIMITS,
) -> IntakeReport:
    """Check every row of `source` and publish its tokens as `directory`, or publish nothing and say why.

    The file is opened once, and its bytes are hashed while they are read: what is published has the hash `sha256`.
    Any error that the content causes in reading, parsing, rendering or tokenizing becomes a problem in the report.

    Args:
        source: the training file.
        directory: where the tokens go; must not exist yet.
        sha256: the hash of the file's bytes, or of what they unpack to; kept in meta.json.
        row_tokenizer: the tokenizer and the length policy.
        stop: called for every row, good or bad; may raise to give up, and then nothing is left behind.
        limits: what the file and its rows may grow to.

    Raises:
        FileExistsError: `directory` exists.
        SourceChanged: the content that was read is not the one that has the hash `sha256`.
        OSError: the machine cannot read the file or write the tokens; trying again may help.
        MemoryError: there is too little memory.
    """
    if directory.exists():
        raise FileExistsError(directory)
    writer = TokenizedWriter(directory)
    try:
        intake = _Intake(row_tokenizer, writer, limits, _Stop(stop))
        intake.read(source, sha256)
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


def check_rows(
    source: Path,
    row_tokenizer: RowTokenizer,
    observe: Callable[[int, Fitted], None],
    *,
    stop: Callable[[], None] = lambda: None,
    limits: Limits = DEFAULT_LIMITS,
) -> IntakeReport:
    """Check every row of `source` as `tokenize_file` does, which has the same arguments and errors; write nothing.

    Links are followed, and nothing notices if the file changes meanwhile: it is its owner's still.

    Args:
        observe: receives the line and the tokens of every row that is not refused, in order.
    """
    intake = _Intake(row_tokenizer, RowCount(), limits, _Stop(stop), observe)
    intake.read(source, None)
    return intake.report(_unit(source))


class _Stop:
    """The caller's request to stop; remembers what it raised, since no file is to blame for that."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.raised: BaseException | None = None

    def __call__(self) -> None:
        try:
            self._stop()
        except BaseException as error:
            self.raised = error
            raise


class _Intake:
    """The counts and problems of one file while it is read; `observe` receives its rows."""

    def __init__(
        self,
        row_tokenizer: RowTokenizer,
        writer: RowCount,
        limits: Limits,
        stop: _Stop,
        observe: Callable[[int, Fitted], None] = lambda *_: None,
    ) -> None:
        self._row_tokenizer = row_tokenizer
        self._writer = writer
        self._limits = limits
        self._stop = stop
        self._observe = observe
        self._problems: list[Problem] = []
        self._problem_count = self._truncated = self._dropped = 0

    def read(self, path: Path, sha256: str | None) -> None:
        """Tokenize a file and compare what was read with its hash; without one, links are followed.

        Raises:
            SourceChanged: it is not the file that has this hash.
        """
        try:
            file_format(path)
            source = SourceFile(path, links=sha256 is None)
        except FileError as error:
            self._refuse(None, error)
            return
        with source:
            self._tokenize(_chunks(self._prepared(self._readable(source, sha256))))

    def _tokenize(self, chunks: Iterable[_Chunk]) -> None:
        """Take chunks in; one is tokenized in another thread while the next is read and the last written."""
        ahead: _Ahead | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="onward-tokenizer") as thread:
            for chunk in chunks:
                if ahead is not None and _characters(chunk) > CHUNK_CHARACTERS:
                    self._take(*ahead)  # a long row takes much memory: no other chunk is held with it
                    ahead = None
                encoding = thread.submit(self._row_tokenizer.tokenize, [text for _, text in chunk])
                if ahead is not None:
                    self._take(*ahead)
                ahead = chunk, encoding
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

    def _readable(self, source: SourceFile, sha256: str | None) -> Iterator[SourceRow]:
        """Yield the rows of a file as far as it can be read, then compare all of its bytes with its hash."""
        is_read_in_order = file_format(source.path) != "parquet"
        if sha256 is not None and not is_read_in_order:
            source.check_read(sha256, self._stop)
        line = 0
        try:
            for row in rows_of(source, self._limits, self._stop):
                line = row.line
                yield row
        except GeneratorExit:  # the reader of the rows stopped early
            raise
        except BaseException as error:
            known = isinstance(error, FileError)
            self._refuse(error.line if known else line + 1, error)
        if sha256 is None:
            return
        if not is_read_in_order:
            source.rewind()
        source.check_read(sha256, self._stop)

    def _prepared(self, rows: Iterable[SourceRow]) -> Iterator[tuple[int, RowText]]:
        for row in rows:
            self._stop()
            try:
                text = self._prepare(row)
            except BaseException as error:
                self._refuse(row.line, error)
                continue
            yield row.line, text

    def _prepare(self, row: SourceRow) -> RowText:
        if row.problem is not None:
            raise RowError(row.problem, row.remedy or "")
        prepared = self._row_tokenizer.prepare(parse_row(row.value))
        longest_character = 4  # bytes in UTF-8
        limit = self._limits.row_bytes
        if len(prepared.text) * longest_character > limit and len(prepared.text.encode()) > limit:
            raise self._limits.row_refusal("the text of the row")
        return prepared

    def _take(self, chunk: _Chunk, encodings: Future[list[Any]]) -> None:
        kept: list[PackedRow] = []
        lines: list[int] = []
        for line, packed in self._packed(chunk, encodings):
            try:
                fitted = self._row_tokenizer.fit(packed)
            except RowError as error:
                self._refuse(line, error)
                continue
            self._observe(line, fitted)
            self._truncated += fitted.truncated
            if fitted.packed is None:
                self._dropped += 1
                continue
            kept.append(fitted.packed)
            lines.append(line)
        self._writer.append(kept, lines)

    def _packed(self, chunk: _Chunk, encodings: Future[list[Any]]) -> Iterable[tuple[int, PackedRow]]:
        try:
            packed = self._row_tokenizer.pack([text for _, text in chunk], encodings.result())
        except BaseException as error:
            refusal_of(error)
            return self._packed_alone(chunk)
        return zip([line for line, _ in chunk], packed, strict=True)

    def _packed_alone(self, chunk: _Chunk) -> Iterator[tuple[int, PackedRow]]:
        """Tokenize the rows of a chunk one by one, to find those that the tokenizer fails on."""
        for line, text in chunk:
            self._stop()
            try:
                (packed,) = self._row_tokenizer.encode([text])
            except BaseException as error:
                self._refuse(line, error)
                continue
            yield line, packed

    def _refuse(self, line: int | None, error: BaseException) -> None:
        """Note why the file is refused; the one place that decides what a file is to blame for."""
        if self._stop.raised is not None:
            raise self._stop.raised
        refusal = refusal_of(error)
        self._problem_count += 1
        self._problems = sorted(
            [*self._problems, Problem(line, refusal.reason, refusal.remedy)], key=lambda problem: problem.line or 0
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
        length = len(row[1].text)
        if chunk and (len(chunk) >= CHUNK_ROWS or characters + length > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(row)
        characters += length
    if chunk:
        yield chunk


def _characters(chunk: _Chunk) -> int:
    return sum(len(text.text) for _, text in chunk)


def _unit(source: Path) -> str:
    try:
        return row_unit(source)
    except FileError:
        return "line"
