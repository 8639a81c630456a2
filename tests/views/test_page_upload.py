"""A file on its way into the inbox, and what can happen there meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from onward.errors import NoSpace, NotMadeHere
from onward.views.page.upload import CHUNK, NAME_BYTES, BadName, Upload, remove_dead_parts, require_name

LARGE = os.urandom(2 * CHUNK + 1)


def send(inbox: Path, meanwhile: Callable[[], None], data: bytes = LARGE) -> int:
    """Send a file to the name `a.jsonl`; something happens when half of it has come."""

    async def chunks() -> AsyncGenerator[bytes]:
        half = len(data) // 2
        for part in range(0, half, 1 << 16):
            yield data[part : min(part + (1 << 16), half)]
        meanwhile()
        yield data[half:]

    return asyncio.run(Upload(inbox, "a.jsonl", reserve=0).receive(chunks(), None))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, len(LARGE)])
def test_a_file_of_any_size_is_whole(tmp_path: Path, size: int) -> None:
    """What is written in between, and what at the end, is all that came."""
    assert size == send(tmp_path, lambda: None, LARGE[:size])
    assert {"a.jsonl": LARGE[:size]} == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_part_that_grows_is_spared_by_a_page_that_starts(tmp_path: Path) -> None:
    """Only parts that no process holds any more are removed."""
    (tmp_path / "upload-0123456789abcdef.part").touch()
    parts: list[int] = []

    def start_another() -> None:
        remove_dead_parts(tmp_path)
        parts.extend(path.stat().st_size for path in tmp_path.iterdir())

    send(tmp_path, start_another)
    assert [CHUNK] == parts
    assert LARGE == (tmp_path / "a.jsonl").read_bytes()


def test_whoever_takes_the_name_meanwhile_keeps_it(tmp_path: Path) -> None:
    """A file that others put under the name while this one was sent is never written over, and nothing else stays."""
    with pytest.raises(NotMadeHere, match="already waiting"):
        send(tmp_path, lambda: (tmp_path / "a.jsonl").symlink_to("nowhere"), b"ab")
    assert [(tmp_path / "a.jsonl", True)] == [(path, path.is_symlink()) for path in tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, OSError), (errno.EROFS, OSError)]
)
def test_a_disk_that_is_full_all_at_once_is_said_to_be_that(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    """Others fill it, or a quota ends, while a file comes: there is no room for it; other failures are the disk's."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind):
        send(tmp_path, fail, b"ab")
    assert [] == list(tmp_path.iterdir())


def test_a_name_may_have_as_many_bytes_as_a_file_system_takes() -> None:
    """What counts is bytes, not characters; a name of the most is accepted."""
    longest = "ü" * ((NAME_BYTES - 6) // 2) + "x.jsonl"
    assert NAME_BYTES == len(longest.encode())
    assert longest == require_name(longest)
    with pytest.raises(BadName, match="longer than"):
        require_name(f"x{longest}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "not a plain file name") for name in ("", ".", "..", "a/b", "a\\b", "a\0b", "/")),
        *((name, "cannot be printed") for name in ("a\nb", "\u202ea", "\ud800")),
        *((name, "the inbox ignores") for name in (".a", "a.part", "a.TMP", "a~")),
        *((name, "name of a folder") for name in ("high", "normal", "low")),
    ],
)  # fmt: skip
def test_a_name_that_the_inbox_cannot_have_is_refused(name: str, words: str) -> None:
    """It leads elsewhere, hides something, or would lie there for ever; the words can be printed."""
    with pytest.raises(BadName) as refused:
        require_name(name)
    assert (True, True) == (words in refused.value.what, (refused.value.where or "").isprintable())
