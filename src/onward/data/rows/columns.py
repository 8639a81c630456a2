"""Which columns of a row are meant: the config's `columns`, and the usual names of a question and its answer.

A row that has the keys of a row format is never read as anything else. A row without them is a question with its answer
if it has one key for each, by any of the usual names; that is a chat, as Alpaca's `instruction` and `output` are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from onward.data.row_types import RowError
from onward.text import printable

FORMATS = tuple(
    map(frozenset, (["messages"], ["text"], ["conversations"], ["prompt", "completion"], ["instruction", "output"]))
)
"""The keys of each row format."""
QUESTIONS = ("question", "query", "instruction", "prompt")
"""Names of a question; `input` is one too if there is no other, and otherwise belongs to the question."""
ANSWERS = ("answer", "response", "output", "completion")
BESIDES = ("input", "context")
"""Names of what belongs to a question: it follows after a blank line, as Alpaca's `input` does."""

KNOWN = frozenset((*(key for keys in FORMATS for key in keys), *QUESTIONS, *ANSWERS, *BESIDES))
"""All names by which a row is recognized."""

BY_COLUMNS = RowError(
    "the file is a table stored by columns",
    "write it by rows; with pandas: to_json(FILE, orient='records', lines=True)",
)


class Columns:
    """Maps rows to the keys of the row formats.

    Args:
        columns: `(key, column)` pairs of the config's `columns`.
    """

    def __init__(self, columns: tuple[tuple[str, str], ...] = ()) -> None:
        self._columns = dict(columns)
        self._sources = frozenset(self._columns.values())
        self._pairs: dict[tuple[str, str], None] = {}
        self._cased: dict[str, None] = {}
        self._replaced: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        """Return what the user should know: names that were taken for a question and its answer."""
        cased = [f"keys are read in lower case: {', '.join(map(printable, self._cased))}"] if self._cased else []
        named = ", ".join(map(printable, self._replaced))
        replaced = [f"not read, because of columns: {named}"] if named else []
        return [*(f"{question} and {answer} are read as a chat" for question, answer in self._pairs), *cased, *replaced]

    def mapped(self, value: Any) -> Any:
        """Return a row with the keys of its format; anything but an object is returned as it is.

        Raises:
            RowError: it is unclear which key is the question or the answer.
        """
        if not isinstance(value, dict) or (_has_format(value) and not self._sources):
            return value
        row: dict[Any, Any] = {key: item for key, item in value.items() if item is not None}
        if self._sources & row.keys():
            value = row = self._by_config(row)
        return value if _has_format(row) else self._by_name(row) or self._in_lower_case(row) or value

    def _by_config(self, row: dict[Any, Any]) -> dict[Any, Any]:
        """Map the columns that the config names; if they make a whole format, keys of other formats do not count."""
        named = {key: row[column] for key, column in self._columns.items() if column in row}
        aside = {key for keys in FORMATS for key in keys} if _has_format(named) else set[str]()
        others = {key: item for key, item in row.items() if key not in self._sources}
        replaced = [key for key in others if key in aside or key in named]
        self._replaced.update(dict.fromkeys(replaced))  # keys of the config and of formats: few
        return {**{key: item for key, item in others.items() if key not in replaced}, **named}

    def _in_lower_case(self, row: dict[Any, Any]) -> dict[Any, Any] | None:
        """Map keys that are those of a format, or of a question and its answer, apart from capitals and white space."""
        names = {key: key.strip().lower() if isinstance(key, str) else key for key in row}
        others = [key for key, name in names.items() if key != name and name in KNOWN]
        lowered = {names[key] if key in others else key: item for key, item in row.items()}
        if not others or len(lowered) < len(row):
            return None
        found = lowered if _has_format(lowered) else self._by_name(lowered)
        if found is not None:
            self._cased.update(dict.fromkeys(others))
        return found

    def _by_name(self, row: dict[Any, Any]) -> dict[Any, Any] | None:
        questions = [name for name in QUESTIONS if name in row]
        answers = [name for name in ANSWERS if name in row]
        besides = [name for name in BESIDES if name in row]
        if not questions and "input" in besides:
            questions = ["input"]
            besides.remove("input")
        if not questions or not answers:
            return None
        for names, what in ((questions, "question"), (answers, "answer"), (besides, "context")):
            if len(names) > 1:
                raise _ambiguous(names, what, questions[0], answers[0])
        (question,), (answer,) = questions, answers
        refuse_by_columns(row)
        odd = next((name for name in (question, answer) if not isinstance(row[name], str)), None)
        if odd is not None:
            raise RowError(f'"{odd}" is not a string', f'write "{odd}" as a string')
        self._pairs[question, answer] = None
        used = {question, answer, *besides}
        rest = {key: item for key, item in row.items() if key not in used}
        context = {"input": row[besides[0]]} if besides else {}
        return {**rest, "instruction": row[question], **context, "output": row[answer]}


def refuse_by_columns(row: dict[Any, Any]) -> None:
    """Refuse a row with a known key if each of its values is a column: texts keyed by row number, or in a list.

    Raises:
        RowError: as many texts are in each.
    """
    if not KNOWN.isdisjoint(row) and _is_by_columns(row.values()):
        raise BY_COLUMNS


def _is_by_columns(values: Collection[Any]) -> bool:
    if all(isinstance(value, dict) and value for value in values):
        numbers = [tuple(value) for value in values]
        return all(keys == numbers[0] for keys in numbers) and all(str(key).isdecimal() for key in numbers[0])
    are_lists = all(isinstance(value, list) and value and isinstance(value[0], str) for value in values)
    return are_lists and len({len(value) for value in values}) == 1


def _has_format(row: dict[Any, Any]) -> bool:
    for keys in FORMATS:
        for key in keys:
            if row.get(key) is None:
                break
        else:
            return True
    return False


def _ambiguous(names: list[str], what: str, question: str, answer: str) -> RowError:
    shown = " and ".join(f'"{name}"' for name in names)
    way = f"{{instruction: {question}, output: {answer}}}"
    return RowError(
        f"the row has {shown}, and one of them is the {what}", f"say which one: set columns to {way} or similar"
    )
