"""What a file or one of its rows is to blame for, and what neither is."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_state, chat_rows, write_jsonl

from onward.data.files.faults import refusal_of
from onward.data.report import Problem
from onward.data.row_tokenizer import OverLength, RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file
from onward.errors import ModelError

PANIC = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})  # what Rust's panics look like
NO_POOL = PANIC("The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError }")
ERRORS = {"index": IndexError("list index out of range"), "overflow": OverflowError(), "panic": PANIC("rust")}


class GivesUp(RowTokenizer):
    """A tokenizer that raises at some rows, as a library may."""

    def prepare(self, record: Any, stop: Callable[[], None] = lambda: None) -> Any:
        """Raise what the row asks for, before it is tokenized."""
        text = super().prepare(record, stop)
        if text.text.startswith("prepare "):
            raise ERRORS[text.text.split()[1]]
        return text

    def tokenize(self, rows: Any) -> list[Any]:
        """Raise what a row asks for, while its chunk is tokenized."""
        for row in rows:
            if row.text.startswith("tokenize "):
                raise ERRORS[row.text.split()[1]]
        return super().tokenize(rows)


def test_the_row_at_which_a_library_gives_up_is_named(tmp_path: Path) -> None:
    """Whatever rendering and tokenizing raise is a problem of the row that caused it, in a chunk of good ones."""
    words = ["a", "prepare index", "b", "prepare panic", "tokenize overflow", "c", "tokenize panic"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in words])
    tokenizer = GivesUp(byte_state(), 200)
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), tokenizer)
    remedy = "correct or remove it, then add the file again"
    expected = [
        Problem(2, "it cannot be used (IndexError: list index out of range)", remedy),
        Problem(4, "it cannot be used (PanicException: rust)", remedy),
        Problem(5, "it cannot be used (OverflowError)", remedy),
        Problem(7, "it cannot be used (PanicException: rust)", remedy),
    ]
    assert expected == report.problems


class WithoutThreads:
    """A tokenizer whose library found no threads, as where memory or processes are limited."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def encode_batch(self, *_: Any, **__: Any) -> Any:
        """Fail as it does whenever it would use them."""
        raise NO_POOL

    encode_batch_fast = encode_batch


@pytest.mark.parametrize("over_length", ["truncate", "auto"])
def test_rows_become_the_same_tokens_where_the_library_has_no_threads(over_length: OverLength, tmp_path: Path) -> None:
    """They are encoded one by one; nothing is refused."""
    rows = [{"text": "abc " * count} for count in range(1, 40)] + chat_rows(5)
    path, made = write_jsonl(tmp_path / "a.jsonl", rows), list[bytes]()
    for name in ("plain", "alone"):
        tokenizer = RowTokenizer(byte_state(), 100, over_length)
        if name == "alone":
            tokenizer._backend = WithoutThreads(tokenizer._backend)
        assert tokenize_file(path, tmp_path / name, sha256_file(path), tokenizer).ok
        made.append(b"".join(file.read_bytes() for file in sorted((tmp_path / name).iterdir())))
    assert made[0] == made[1]


MACHINE = [OSError(getattr(errno, name), name) for name in ("EIO", "EMFILE", "ENFILE", "ESTALE", "ENOSPC", "EDQUOT")]
NO_THREAD = RuntimeError("can't start new thread")
NOT_OF_THE_FILE = [
    *MACHINE,
    MemoryError(),
    NO_THREAD,
    NO_POOL,
    ModelError("no template"),
    KeyboardInterrupt(),
    SystemExit(),
]
OF_THE_FILE = [OSError(getattr(errno, name), name) for name in ("ENOENT", "EACCES", "EISDIR", "ELOOP")]


@pytest.mark.parametrize("error", NOT_OF_THE_FILE, ids=repr)
def test_what_no_file_is_to_blame_for_is_raised(error: BaseException) -> None:
    """Errors of the disk, memory, descriptors, threads and the model, and interrupts, refuse no file."""
    with pytest.raises(type(error)) as raised:
        refusal_of(error)
    assert error is raised.value


@pytest.mark.parametrize("error", [*OF_THE_FILE, OSError("damaged"), ValueError("\x1b[2Jx"), SystemError()], ids=repr)
def test_what_a_file_is_to_blame_for_is_a_refusal(error: Exception) -> None:
    """Everything else becomes a reason that can be printed, with a remedy."""
    refusal = refusal_of(error)
    assert refusal.reason.isprintable()
    assert refusal.remedy
