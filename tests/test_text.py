import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.cli.tables import status_lines
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.store.rows import EventRow
from onward.text import duration, how_many, printable, quoted, size

ORDINARY = "Grüße, 日本語\u3000\u00a0\U0001f468\u200d\U0001f469 \\n 'x' $HOME"


def test_ordinary_unicode_stays() -> None:
    """Letters of any script, spaces, emoji and the joiners inside them are printed unchanged."""
    assert ORDINARY == printable(ORDINARY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[2Jx\x07\x7f\x9b", "\\x1b[2Jx\\x07\\x7f\\x9b"),
        ("a\u202etxt.exe", "a\\u202etxt.exe"),
        ("\u2066\u2028\ufeff", "\\u2066\\u2028\\ufeff"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_a_terminal_obeys_or_hides_becomes_an_escape(text: str, expected: str) -> None:
    """Control characters, escape sequences, bidi marks, lone surrogates and invisible tags become visible."""
    assert expected == printable(text)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("my rows.jsonl", "'my rows.jsonl'"),
        ("", "''"),
        ("it's", "'it'\"'\"'s'"),
        ("$(reboot)", "'$(reboot)'"),
        ("a'\x1b[2J\\", "$'a\\'\\033[2J\\\\'"),
        (os.fsdecode(b"caf\xe9"), "$'caf\\351'"),
        ("a\u202eb", "$'a\\342\\200\\256b'"),
        (Path("-rf"), "./-rf"),
        ("-rf", "-rf"),
        (Path("/data/a b"), "'/data/a b'"),
    ],
)
def test_names_are_quoted_for_a_shell(word: object, expected: str) -> None:
    """A name is one word of a command: bare where it needs no quotes, `$'...'` where it cannot be printed."""
    assert expected == quoted(word)


@given(st.lists(st.binary(min_size=1, max_size=20).map(lambda name: os.fsdecode(name.replace(b"\0", b"\1")))))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_shell_reads_every_quoted_name_back(names: list[str]) -> None:
    """bash gets exactly the bytes of every name back, and what is printed holds nothing that a terminal obeys."""
    words = [quoted(name) for name in names]
    assert words == [printable(word) for word in words]
    command = "printf '%s\\0' " + " ".join(words) if words else ""
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert [os.fsencode(name) for name in names] == done.stdout.split(b"\0")[:-1]


def test_one_of_something_takes_no_s() -> None:
    """Zero and two do."""
    assert ["0 rows", "1 row", "2 rows"] == [how_many(count, "row") for count in range(3)]


def test_durations_have_their_two_largest_units() -> None:
    """Rounded to seconds first, so that no minute has 60 of them."""
    day = 86_400.0
    expected = {
        0.4: "0 s", 59.4: "59 s", 59.6: "1 min 0 s", 3599.0: "59 min 59 s", 3600.0: "1 h 0 min",
        day - 1: "23 h 59 min", day: "1 d 0 h", 2 * day - 1: "1 d 23 h", 400 * day: "400 d 0 h",
    }  # fmt: skip
    assert expected == {seconds: duration(seconds) for seconds in expected}


def test_sizes_have_at_most_three_digits() -> None:
    """A number that would round to a fourth one gets the next unit, as long as there is one."""
    expected = {
        0: "0 B", 999: "999 B", 999.5: "1.0 kB", 1000: "1.0 kB", 99_949: "99.9 kB", 99_950: "100 kB",
        150_000_000: "150 MB", 999_499_999: "999 MB", 999_500_000: "1.0 GB", 5 * 10**15: "5000 TB",
    }  # fmt: skip
    assert expected == {count: size(count) for count in expected}


def test_a_hint_can_be_pasted(tmp_path: Path) -> None:
    """A hint that names a path is one command with that path as one word, whatever characters the path has."""
    root = tmp_path / "x';touch pwned;'"
    with pytest.raises(UsageError) as refused:
        RunLayout(root).require()
    command = str(refused.value.hint).partition(" makes one")[0]
    assert ["onward", "init", str(root)] == shlex.split(command)


def test_people_read_units() -> None:
    """Bytes, seconds and speed have units for people; `--json` keeps the plain numbers."""
    assert ["0 B", "999 B", "1.0 kB", "77.0 GB", "100 MB", "1.0 GB"] == [
        size(count) for count in (0, 999, 1000, 76981612544, 1e8, 999.6e6)
    ]
    assert ["0 s", "42 s", "1 min 1 s", "2 h 5 min", "3 d 4 h"] == [
        duration(seconds) for seconds in (0.2, 42, 61, 7500, 3 * 86400 + 4 * 3600)
    ]
    lines = status_lines({"disk_free_bytes": 80212254720, "tokens_per_second": 148.2, "problem": None}, [])
    assert ["disk free          80.2 GB", "speed              148 tokens/s"] == lines
    assert [] == status_lines({}, list[EventRow]())
