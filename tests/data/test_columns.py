"""Columns: what the config names, the usual pairs by themselves, and what is ambiguous is refused by name."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import yaml

from onward.config.text import parse_config
from onward.data.files.reading import Reading
from onward.data.row_types import Completion, Record, RowError, Text
from onward.data.rows.columns import ANSWERS, FORMATS, QUESTIONS, Columns
from onward.data.rows.records import parse_record

CHAT = parse_record({"instruction": "Q", "output": "A"})
WITH_CONTEXT = parse_record({"instruction": "Q", "input": "C", "output": "A"})


def parsed(row: Any) -> Record:
    """Return the record that a row is, whatever else stands in the row."""
    return replace(parse_record(row), ignored=())


def mapped(row: Any, **columns: str) -> Any:
    """Return a row as the parser gets it."""
    return Columns(tuple(columns.items())).mapped(row)


@pytest.mark.parametrize(("question", "answer"), [*product((*QUESTIONS, "input"), ANSWERS)])
def test_a_question_and_its_answer_are_known_under_any_pair_of_names(question: str, answer: str) -> None:
    """Each pair is a chat of two turns, in any order and next to other keys; prompt and completion stay themselves."""
    row = {"id": 3, answer: "A", question: "Q", "category": "x", "context": None}
    if (question, answer) == ("prompt", "completion"):
        assert Completion("Q", "A") == parsed(mapped(row))
        return
    columns = Columns()
    assert CHAT == parsed(columns.mapped(row))
    known = {question, answer} == {"instruction", "output"}
    assert ([] if known else [f"{question} and {answer} are read as a chat"]) == columns.notes


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "context": "C", "response": "A", "category": "qa"},
        {"question": "Q", "context": "C", "answer": "A"},
        {"query": "Q", "input": "C", "response": "A"},
    ],
)
def test_what_belongs_to_a_question_is_kept(row: dict[str, str]) -> None:
    """A context follows the question as Alpaca's input does; an empty one is none."""
    assert WITH_CONTEXT == parsed(mapped(row))
    assert CHAT == parsed(mapped({key: "" if value == "C" else value for key, value in row.items()}))


@pytest.mark.parametrize("keys", FORMATS, ids=sorted)
def test_a_row_of_a_known_format_is_not_touched(keys: frozenset[str]) -> None:
    """Whatever other names stand next to them: keys of a format say what the row is."""
    row = {**dict.fromkeys(("question", "answer", "response", "context"), "x"), **dict.fromkeys(keys, "y")}
    assert row is mapped(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "query": "b", "response": "c"}, '"question" and "query", and one of them is the question'),
        ({"question": "a", "answer": "b", "response": "c"}, '"answer" and "response", and one of them is the answer'),
        ({"question": "a", "input": "b", "context": "c", "answer": "d"}, '"input" and "context"'),
    ],
)
def test_what_is_ambiguous_is_refused_and_read_as_told(row: dict[str, str], words: str) -> None:
    """The refusal names both keys, and the `columns` that it names make the row readable."""
    with pytest.raises(RowError, match=words) as refusal:
        mapped(row)
    said = refusal.value.remedy.removeprefix("say which one: set columns to ").removesuffix(" or similar")
    parse_record(mapped(row, **yaml.safe_load(said)))


def test_values_that_are_no_text_are_named_by_their_own_key() -> None:
    """A question that is a number is refused under its name, not under the one it is mapped to."""
    with pytest.raises(RowError, match='"question" is not a string'):
        mapped({"question": 5, "answer": "A"})


@pytest.mark.parametrize("row", ["text", None, [], {}, {"question": "Q"}, {"answer": "A"}, {"input": "x"}, {1: 2}])
def test_what_is_no_pair_is_left_to_the_parser(row: Any) -> None:
    """Its message speaks of the row as it is."""
    assert row is mapped(row)


def test_columns_of_the_config() -> None:
    """A named column is meant by its key, and a whole format leaves the keys of others aside; other rows stay."""
    config = parse_config({"columns": {"prompt": "question", "completion": "answer"}})
    columns = Columns(Reading.of(config).columns)
    row = {"question": "Q", "answer": "A", "text": "x", "messages": "y", "prompt": "z"}
    assert Completion("Q", "A") == parsed(columns.mapped(row))
    assert Text("x") == parsed(columns.mapped({"text": "x"}))
    assert ["not read, because of columns: text, messages, prompt"] == columns.notes
    assert CHAT == parsed(columns.mapped({"query": "Q", "response": "A"}))
    assert Text("x") == parsed(mapped({"content": "x", "text": "y"}, text="content"))
    assert WITH_CONTEXT == parsed(
        mapped({"task": "Q", "extra": "C", "response": "A"}, instruction="task", input="extra")
    )


def test_keys_that_columns_replace_are_named() -> None:
    """A row's own key of the same name is not left out without a word."""
    columns = Columns((("output", "answer"),))
    assert CHAT == parsed(columns.mapped({"question": "Q", "answer": "A", "output": "x"}))
    assert "not read, because of columns: output" in columns.notes
    assert [] == Columns((("output", "answer"),)).notes


def test_columns_of_a_row_without_all_of_them() -> None:
    """A column that a row lacks is missed under its key; one that is null does not count."""
    with pytest.raises(RowError, match='the row has "prompt" but no "completion"'):
        parse_record(mapped({"q": "Q", "a": None}, prompt="q", completion="a"))
    assert WITH_CONTEXT == parsed(mapped({"q": "Q", "c": "C", "a": "A"}, instruction="q", input="c", output="a"))
    assert CHAT == parsed(mapped({"q": "Q", "c": None, "a": "A"}, instruction="q", input="c", output="a"))


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"Question": "q", " Answer": "a", "Id": 1}, {"instruction": "q", "output": "a", "Id": 1}),
        ({"Text": "t"}, {"text": "t"}),
        ({"Question": "q", "question": "r"}, None),
        ({"Title": "q", "Body": "a"}, None),
    ],
)
def test_capital_letters_of_known_names_do_not_matter(row: dict[str, Any], read: dict[str, Any] | None) -> None:
    """Tables have such headers; that they were read so is said."""
    columns = Columns()
    assert (row if read is None else read) == columns.mapped(row)
    assert bool(read) == any(note.startswith("keys are read in lower case: ") for note in columns.notes)
