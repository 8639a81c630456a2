"""Tokenizes a training file: every row is checked, and either all of them are published or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from onward.data.files.containers import SourceFile
from onward.data.files.faults import FileError, refusal_of
from onward.data.files.formats import SEEKS, TABLE_FORMATS, format_of, unit_of
from onward.data.files.lines import SourceRow
from onward.data.files.reading import Reading
from onward.data.files.sources import rows_of
from onward.data.report import IgnoredKeys, IntakeReport, Problems
from onward.data.row_tokenizer import Fitted, RowTokenizer, TooLong
from onward.data.row_types import RowError
from onward.data.rows.columns import Columns
from onward.data.rows.records import parse_record
from onward.data.rows.template import RowText
from onward.data.tokenized import PackedRow, RowCount, TokenizedWriter, Weights

CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1 << 19  # a chunk of long rows ends earlier: the work cannot be stopped inside a chunk
COUNTS = ("truncated", "dropped", "split", "lost_tokens", "unit")
"""Entries of a report that are kept with the tokens."""

_Chunk: TypeAlias = list[tuple[int, RowText]]
_Ahead: TypeAlias = tuple[_Chunk, Future[list[Any]]]


def tokenize_file(
    source: Path,
    directory: Path,
    sha256: str,
    row_tokenizer: RowTokenizer,
    *,
    stop: Callable[[], None] = lambda: None,
    reading: Reading | None = None,
) -> IntakeReport:
    """Check every row of `source` and publish its tokens as `directory`, or publish nothing and say why.

    The file is opened once and its bytes are hashed while they are read, so what is published has the hash `sha256`.
    Any error that the content causes becomes a problem in the report.

    Args:
        source: the training file.
        directory: where the tokens go; must not exist yet.
        sha256: the hash of the file's bytes, or of what they unpack to; kept in meta.json.
        row_tokenizer: the tokenizer and the length policy.
        stop: called for every row, good or bad; may raise to give up, and then nothing is left behind.
        reading: how the file is read, and how many rows may be bad.

    Raises:
        FileExistsError: `directory` exists.
        SourceChanged: the content that was read does not have the hash `sha256`.
        OSError, MemoryError: the machine cannot read the file or write the tokens; trying again may help.
    """
    if directory.exists():
        raise FileExistsError(directory)
    writer = TokenizedWriter(directory)
    try:
        intake = _Intake(row_tokenizer, writer, reading or Reading(), _Stop(stop))
        intake.read(source, sha256)
        report = intake.report()
        if report.ok:
            counts = {name: getattr(report, name) for name in COUNTS}
            writer.publish(counts | {"source_sha256": sha256} | row_tokenizer.settings() | intake.weights.facts())
        return report
    finally:
        writer.discard()


def check_rows(
    source: Path,
    row_tokenizer: RowTokenizer,
    observe: Callable[[int, Fitted], None],
    *,
    stop: Callable[[], None] = lambda: None,
    reading: Reading,
) -> IntakeReport:
    """Check every row of `source` as `tokenize_file` does, with the same arguments and errors, but write nothing.

    Links are followed, and nobody notices if the file changes meanwhile: it still belongs to its owner.

    Args:
        observe: receives the line and the tokens of every row that is not refused, in order.
    """
    intake = _Intake(row_tokenizer, RowCount(), reading, _Stop(stop), observe)
    intake.read(source, None)
    return intake.report()


class _Stop:
    """The caller's request to stop; remembers what it raised, for which no file is to blame."""

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
        reading: Reading,
        stop: _Stop,
        observe: Callable[[int, Fitted], None] = lambda *_: None,
    ) -> None:
        self._row_tokenizer = row_tokenizer
        self._writer = writer
        self._reading = reading
        self._stop = stop
        self._observe = observe
        self.weights = Weights()
        self._columns = Columns(reading.columns)
        self._ignored = IgnoredKeys()
        self._problems = Problems()
        self._notes: list[str] = []
        self._unit = "line"
        self._is_table = False
        self._seen = self._truncated = self._dropped = self._split = self._lost = 0

    def read(self, path: Path, sha256: str | None) -> None:
        """Tokenize a file and compare what was read with its hash; without one, links are followed.

        Raises:
            SourceChanged: it is not the file that has this hash.
        """
        try:
            source = SourceFile(path, links=sha256 is None, stop=self._stop)
        except FileError as error:
            form = format_of(path.name)
            self._unit = unit_of(form) if form else "line"
            self._refuse(None, error, is_of_file=True)
            return
        with source:
            self._is_table = source.form in TABLE_FORMATS
            self._tokenize(_chunks(self._prepared(self._readable(source, sha256))))
            self._unit = unit_of(source.form)
            self._notes = source.notes

    def _tokenize(self, chunks: Iterable[_Chunk]) -> None:
        """Process chunks; one is tokenized in another thread while the next is read and the previous one written."""
        ahead: _Ahead | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="onward-tokenizer") as thread:
            for chunk in chunks:
                if ahead is not None and _characters(chunk) > CHUNK_CHARACTERS:
                    self._take(*ahead)  # a long row takes a lot of memory: no other chunk is kept with it
                    ahead = None
                encoding = thread.submit(self._row_tokenizer.tokenize, [text for _, text in chunk])
                if ahead is not None:
                    self._take(*ahead)
                ahead = chunk, encoding
            if ahead is not None:
                self._take(*ahead)

    def report(self) -> IntakeReport:
        writer, problems = self._writer, self._problems
        if not problems.count and not writer.rows:
            self._refuse(None, self._nothing_left(), is_of_file=True)
        can_do_without = bool(writer.rows) and problems.may_be_left_out(self._reading.bad_rows, self._seen)
        is_ok = not problems.count or (self._reading.leaves_out and can_do_without)
        return IntakeReport(
            ok=is_ok,
            rows=writer.rows,
            tokens=writer.tokens,
            target_tokens=writer.target_tokens,
            truncated=self._truncated,
            dropped=self._dropped,
            split=self._split,
            lost_tokens=self._lost,
            bad_rows=problems.count if is_ok else 0,
            longest=writer.longest,
            problems=problems.first,
            problem_count=problems.count,
            unit=self._unit,
            notes=[*self._notes, *self._columns.notes, *self._ignored.notes, *self.weights.notes],
            way_out="" if is_ok or problems.of_file else self._way_out(can_do_without),
        )

    def _readable(self, source: SourceFile, sha256: str | None) -> Iterator[SourceRow]:
        """Yield the rows of a file as far as it can be read, then check all of its bytes against its hash."""
        is_read_in_order = source.form not in SEEKS
        if sha256 is not None and not is_read_in_order:
            source.check_read(sha256)
            source.rewind()
        line = 0
        try:
            for row in rows_of(source, self._reading):
                line = row.line
                yield row
        except GeneratorExit:  # the reader of the rows stopped early
            raise
        except BaseException as error:
            known = isinstance(error, FileError)
            self._refuse(error.line if known else line + 1, error, is_of_file=True)
        if sha256 is None:
            return
        if not is_read_in_order:
            source.rewind()
        source.check_read(sha256)

    def _prepared(self, rows: Iterable[SourceRow]) -> Iterator[tuple[int, RowText]]:
        for row in rows:
            self._stop()
            self._seen += 1
            try:
                text = self._prepare(row)
            except BaseException as error:
                self._refuse(row.line, error, is_of_file=isinstance(error, FileError))  # a limit, as on reading
                continue
            yield row.line, text

    def _prepare(self, row: SourceRow) -> RowText:
        if row.problem is not None:
            raise RowError(row.problem, row.remedy or "")
        record = parse_record(self._columns.mapped(row.value), padded=self._is_table)
        prepared = self._row_tokenizer.prepare(record, self._stop)
        self._ignored.add(prepared.ignored)
        longest_character = 4  # bytes in UTF-8
        limits = self._reading.limits
        if len(prepared.text) * longest_character > limits.row_bytes < len(prepared.text.encode()):
            raise limits.row_refusal("the text of the row")
        return prepared

    def _take(self, chunk: _Chunk, encodings: Future[list[Any]]) -> None:
        kept: list[PackedRow] = []
        lines: list[int] = []
        for line, text, packed, encoding in self._packed(chunk, encodings):
            is_long = len(packed) > self._row_tokenizer.max_length
            pieces = self._row_tokenizer.split(text, packed, encoding) if is_long else (packed,)
            for piece in self._fitted(line, pieces):
                kept.append(piece)
                lines.append(line)
        self._writer.append(kept, lines)

    def _fitted(self, line: int, pieces: Sequence[PackedRow]) -> list[PackedRow]:
        """Apply the length policy to the pieces of a row and count what is lost; return what is left."""
        try:
            fitted = [self._row_tokenizer.fit(piece) for piece in pieces]
        except RowError as error:
            self._refuse(line, error, is_of_file=isinstance(error, TooLong))
            return []
        for one in fitted:
            self._observe(line, one)
        if len(fitted) == 1 and fitted[0].packed is pieces[0]:  # unchanged, like nearly every row
            return [pieces[0]]
        kept = [one.packed for one in fitted if one.packed is not None]
        self._split += len(pieces) > 1
        self._truncated += sum(one.truncated for one in fitted)
        self._dropped += len(fitted) - len(kept)
        self._lost += sum(map(len, pieces)) - sum(map(len, kept))
        return kept

    def _packed(self, chunk: _Chunk, encodings: Future[list[Any]]) -> Iterable[tuple[int, RowText, PackedRow, Any]]:
        """Return the rows of a chunk with their lines, tokens and encodings."""
        lines, texts = zip(*chunk, strict=True)
        try:
            made = encodings.result()
            packed = self._row_tokenizer.pack(texts, made, self.weights)
        except BaseException as error:
            refusal_of(error)
            return self._packed_alone(chunk)
        return zip(lines, texts, packed, made, strict=True)

    def _packed_alone(self, chunk: _Chunk) -> Iterator[tuple[int, RowText, PackedRow, Any]]:
        """Tokenize the rows of a chunk one by one, to find those that the tokenizer fails on."""
        for line, text in chunk:
            self._stop()
            try:
                (packed,) = self._row_tokenizer.encode([text], self.weights)
            except BaseException as error:
                self._refuse(line, error)
                continue
            yield line, text, packed, None

    def _refuse(self, line: int | None, error: BaseException, *, is_of_file: bool = False) -> None:
        """Record a problem of a row, or one that refuses the file; only here is it decided what is to blame."""
        if self._stop.raised is not None:
            raise self._stop.raised
        self._problems.add(line, refusal_of(error), is_of_file=is_of_file)

    def _way_out(self, can_do_without: bool) -> str:
        if can_do_without:
            return "or leave such rows out: set bad_rows: drop in the run's config"
        if not self._reading.leaves_out or not self._writer.rows:
            return ""
        share = self._reading.bad_rows.share
        return f"{self._problems.count} of {self._seen} rows exceed bad_rows_share: {share:g}, which may be raised"

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
