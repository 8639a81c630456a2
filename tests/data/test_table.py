"""Tables: `.csv` and `.tsv` by their header, read as Python's csv module reads them, whatever a field's length."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.data.files.faults import FileError
from onward.data.files.limits import DEFAULT_LIMITS, Limits
from onward.data.files.lines import SourceRow
from onward.data.files.reading import Reading
from onward.data.files.sources import read_rows
from onward.data.files.table import table_rows

FIELD = st.text(st.sampled_from("ab,;\t|\"'\r\n \u00e9"), max_size=8)


def rows_of(data: str, form: str = "csv") -> list[SourceRow]:
    """Return the rows of a table."""
    return list(table_rows(io.BytesIO(data.encode()), form, DEFAULT_LIMITS))


@given(st.lists(st.tuples(FIELD, FIELD, FIELD), max_size=6), st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_comes_back(rows: list[tuple[str, str, str]], delimiter: str, end: str) -> None:
    """Fields with separators, quotes and line ends come back as they were, under each separator and line end."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion", "x"), *rows])
    expected = [dict(zip(("prompt", "completion", "x"), row, strict=True)) for row in rows]
    assert expected == [row.value for row in rows_of(stream.getvalue())]


@given(st.lists(st.text(st.sampled_from('ab,"\u00e9 '), max_size=12), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_quotes_are_read_as_the_csv_module_reads_them_or_refused(lines: list[str]) -> None:
    """Quotes inside a field are what Python's module makes of them, or it is not told what is meant."""
    data = "a,b\n" + "".join(f"{line}\n" for line in lines)
    expected = [row for row in csv.reader(io.StringIO(data, newline="")) if row][1:]
    try:
        found = [list(row.value.values()) if row.value else None for row in rows_of(data)]
    except FileError:  # the module takes the rest of the file for the field, or guesses
        return
    assert [row if len(row) == 2 else None for row in expected] == found


def test_places_blank_lines_and_an_index(tmp_path: Path) -> None:
    """A row is named by its first line; blank lines do not count; a column without a name is left out."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf,text\r\n\r\n0,"one\r\ntwo"\r\n\r\n1,\r\n')
    assert [SourceRow(3, {"text": "one\r\ntwo"}), SourceRow(6, {"text": ""})] == list(read_rows(path))


def test_a_field_may_be_long() -> None:
    """Beyond the 131,072 characters of Python's csv module, over many lines, in a time that follows the length."""
    text = 'say "x", then\n' * 40_000
    quoted = text.replace('"', '""')
    assert [text] == [row.value["text"] for row in rows_of(f'id,text\n1,"{quoted}"\n')]


def test_bad_rows_are_named_and_reading_goes_on() -> None:
    """Too many or too few fields, and bytes that are not UTF-8, are problems of their row."""
    data = b"prompt,completion\na,b,c\nd\n\xff,x\ne,f\n"
    rows = list(table_rows(io.BytesIO(data), "csv", DEFAULT_LIMITS))
    assert [
        "the row has 3 fields, the first line names 2",
        "the row has 1 field, the first line names 2",
        "byte 0xff is not UTF-8",
        None,
    ] == [row.problem for row in rows]
    assert {"prompt": "e", "completion": "f"} == rows[-1].value


def test_a_row_with_a_bad_byte_ends_where_its_quotes_end() -> None:
    """What follows such a line inside a quoted field is no row of its own, and the row has one problem there."""
    data = b'text\nfirst\n"one\nb\xe9d\nw\xf6rse\nthe ""tail"" of it"\nlast\n'
    rows = list(table_rows(io.BytesIO(data), "csv", DEFAULT_LIMITS))
    assert [(2, {"text": "first"}, None), (4, None, "byte 0xe9 is not UTF-8"), (7, {"text": "last"}, None)] == [
        (row.line, row.value, row.problem) for row in rows
    ]


@pytest.mark.parametrize("header", ["prompt,completion", '"prompt",completion', "\ufeffprompt, completion "])
def test_a_row_that_repeats_the_header_is_bad(header: str) -> None:
    """Tables that were joined have it in the middle; it would be trained as a question and its answer."""
    rows = rows_of(f"prompt,completion\na,b\n{header}\nc,d\nprompt,x\n")
    assert [None, "the row repeats the names of the columns", None, None] == [row.problem for row in rows]
    assert {"prompt": "prompt", "completion": "x"} == rows[-1].value


def test_names_of_columns_that_are_not_utf8_refuse_the_file() -> None:
    """Without them no row can be read: the next line is not taken for the names."""
    with pytest.raises(FileError, match="byte 0xe9 is not UTF-8") as refusal:
        list(table_rows(io.BytesIO(b"text,caf\xe9\ntext,b\nc,d\n"), "csv", DEFAULT_LIMITS))
    assert 1 == refusal.value.line


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        ("text,text\na,b\n", 1, "two columns are named text"),
        ('text\na\n"b\nc\n', 3, "a quoted field has no end"),
        ('text,b\n"say \\"x\\"",a\n', 2, "a quoted field continues after its closing quote"),
        ('text,b\na,"x" y\n', 2, "a quoted field continues after its closing quote"),
        ('text,b\n"x", "y"\n', 2, "a quoted field begins with white space"),
        ('text\na\n"' + "b\n" * 600, 3, "the quoted field without an end is larger than 1000 bytes"),
        ("text\na\n" + "," * 70, 3, "the row, its fields counted, is larger than 1000 bytes"),
    ],
)
def test_what_ends_the_reading_of_a_table(data: str, line: int, reason: str) -> None:
    """Columns of one name, a quote that is never closed and a row beyond the limit refuse the file at their line."""
    with pytest.raises(FileError) as refusal:
        list(table_rows(io.BytesIO(data.encode()), "csv", Limits(row_bytes=1000)))
    assert (line, reason) == (refusal.value.line, refusal.value.reason)
    assert refusal.value.remedy


def test_a_tab_separates_a_tsv(tmp_path: Path) -> None:
    """A .tsv is separated by tabs, whatever its header has more of."""
    path = tmp_path / "a.tsv"
    path.write_text("a,b,c\ttext\n1\tx\n")
    assert [{"a,b,c": "1", "text": "x"}] == [row.value for row in read_rows(path, Reading())]


def test_commas_in_a_tsv(tmp_path: Path) -> None:
    """A .tsv whose first line has another separator and no tab is refused; one with a single column is read."""
    path = tmp_path / "a.tsv"
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(FileError, match="no tab") as refusal:
        list(read_rows(path))
    assert "name it .csv" in refusal.value.remedy
    path.write_text("text\na, b\n")
    assert [{"text": "a, b"}] == [row.value for row in read_rows(path)]
