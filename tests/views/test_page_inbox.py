"""Files that are sent to the page: into the inbox or refused, whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from commands import snapshot
from ledgers import made_up_run

from onward.layout import RunLayout

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from page_runs import falling, files_in
from pages import Page, serve

from onward.views.page.upload import remove_dead_parts, require_name


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_file_is_sent_into_the_inbox(page: Page, made: RunLayout, in_chunks: bool) -> None:
    """A file of any size arrives whole under its name, announced or not, and nothing else stays."""
    data = os.urandom(5 << 20)
    pieces = (data[start : start + 99_999] for start in range(0, len(data), 99_999))
    name = f"zwölf rows {in_chunks}.jsonl"
    answer = page.put(f"/api/inbox/{name.replace(' ', '%20').replace('ö', '%C3%B6')}", pieces if in_chunks else data)
    assert (201, {"name": name, "bytes": len(data)}) == (answer.status, answer.json)
    assert [name] == files_in(made)
    assert data == (made.inbox / name).read_bytes()
    again = page.put(f"/api/inbox/{name.replace(' ', '%20').replace('ö', '%C3%B6')}", b"other")
    assert (409, data) == (again.status, (made.inbox / name).read_bytes())
    (made.inbox / name).unlink()


@pytest.mark.parametrize(
    "path",
    [
        "..%2Fonward.yaml", "..%2f..%2fetc%2fpasswd", "%2e%2e", "%2Fetc%2Fpasswd", "high%2Fx.jsonl", "a%2F..%2F..%2Fx",
        "..%5Cx.jsonl", "a%00.jsonl", ".hidden", "x.part", "x.TMP", "x~", "high", "low", "%E2%80%AEtxt.jsonl",
        "a%0Ab.jsonl", "x" * 256, "../onward.yaml", "",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused(page: Page, made: RunLayout, path: str) -> None:
    """Tricks with paths and names that the inbox would pass over put nothing anywhere."""
    before = snapshot(made.root)
    head = f"PUT /api/inbox/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {page.key.token}\r\n"
    status = page.raw(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode()).split(b" ")[1]
    assert status in (b"400", b"404", b"405")
    assert before == snapshot(made.root)
    assert [] == files_in(made)


@pytest.mark.parametrize("character", ["%0A", "%0D", "%09", "%E2%80%A8", "%C2%A0"])
def test_a_name_that_cannot_be_printed_is_said_to_be_that(page: Page, made: RunLayout, character: str) -> None:
    """Every name of a file is an address that the page knows, and is refused for what it is, with the way out."""
    for name in (f"a{character}b.jsonl", f"{character}.jsonl", f"a.jsonl{character}"):
        answer = page.put(f"/api/inbox/{name}", b"{}")
        assert (400, "the name has characters that cannot be printed") == (answer.status, answer.json["error"])
        assert "plain name" in answer.json["hint"]
    assert [] == files_in(made)


def test_a_part_of_a_file_is_refused(page: Page, made: RunLayout) -> None:
    """Whoever goes on with an upload, as `curl -C 100 -T`, sends the rest of a file: it is never trained as a file."""
    answer = page.put("/api/inbox/rest.jsonl", b'{"text": "x"}\n', **{"Content-Range": "bytes 100-113/114"})
    assert (400, "a part of a file cannot be sent") == (answer.status, answer.json["error"])
    assert [] == files_in(made)


def test_a_file_that_does_not_fit_is_refused_before_it_is_sent(page: Page, made: RunLayout) -> None:
    """A size above the free disk is refused at once: nothing of 10 TB is read."""
    head = f"PUT /api/inbox/large.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n"
    answer = page.raw(f"{head}Content-Length: {10 << 40}\r\n\r\n".encode())
    assert b"507" == answer.split(b" ")[1]
    assert [] == files_in(made)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_an_upload_leaves_the_margin_of_the_disk_free(tmp_path: Path, in_chunks: bool) -> None:
    """What training needs of the disk stays free, whether a size is announced or not, and nothing half stays."""
    layout = made_up_run(tmp_path / "run", [], falling)
    layout.config.write_text(f"model: m\ndisk_margin_mb: {1 << 30}\n")
    with serve([layout.root]) as page:
        answer = page.put("/api/inbox/x.jsonl", iter([b"x"] * 3) if in_chunks else b"xxx")
    assert 507 == answer.status
    assert "no room" in answer.json["error"]
    assert [] == files_in(layout)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/inbox/x.part", {}, 400), ("/api/nothing", {}, 404),
        ("/api/inbox/x.jsonl", {"Host": "evil.example"}, 403),
        ("/api/inbox/x.jsonl", {"Authorization": "Bearer wrong"}, 401),
    ],
)  # fmt: skip
def test_a_sender_sees_why_a_file_is_refused(page: Page, path: str, headers: dict[str, str], status: int) -> None:
    """Whoever sends all of a large file before reading the answer gets the answer, not a broken connection."""
    assert status == page.put(path, b"x" * (64 << 20), Connection="close", **headers).status


def test_an_upload_that_breaks_off_leaves_nothing(
    page: Page, made: RunLayout, caplog: pytest.LogCaptureFixture
) -> None:
    """While a file is sent it lies next to the inbox's files as .part; when its sender goes away it is gone, and
    nothing is printed where the page was started.
    """
    head = f"PUT /api/inbox/half.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n"
    with socket.create_connection(("127.0.0.1", page.port)) as sender:
        sender.sendall(f"{head}Content-Length: 9000000\r\n\r\n".encode() + b"x" * (5 << 20))
        while not files_in(made):
            pass
        (name,) = files_in(made)
        assert name.endswith(".part")
    while files_in(made):
        pass
    assert 200 == page.ask("GET", "/api/status", headers=page.bearer).status
    assert [] == caplog.records


@pytest.mark.parametrize(
    ("lie", "body"),
    [
        ("Content-Length: -1", b"{}"), ("Content-Length: 1e3", b"{}"), ("Content-Length : 2", b"{}"),
        (f"Content-Length: {'9' * 30}", b"{}"), (f"Content-Length: {'9' * 5000}", b"{}"),
        ("Transfer-Encoding: chunked", b"ffffffffffffffffffffff\r\n{}"),
        ("Transfer-Encoding: chunked", b"-2\r\n{}\r\n"), ("Transfer-Encoding: gzip", b"{}"),
        ("Content-Length: 2\r\nContent-Length: 3", b"{}"),
    ],
)  # fmt: skip
def test_a_length_that_makes_no_sense_puts_nothing_into_the_inbox(
    page: Page, made: RunLayout, lie: str, body: bytes
) -> None:
    """Lies about the size of an upload are refused, and its bytes are never taken for another request."""
    head = f"PUT /api/inbox/lie.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n{lie}"
    follows = f"POST /api/pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n\r\n"
    answer = page.raw(f"{head}\r\n\r\n".encode() + body + follows.encode())
    assert (b"HTTP/1.1", True) == (answer[:8], answer.split(b" ")[1] in (b"400", b"501", b"507"))
    while found := files_in(made):  # a partial file may come late, and goes when the server sees that nobody sends
        assert all(name.endswith(".part") for name in found)
    assert "idle" == page.get("/api/status")["state"]


def test_an_upload_is_as_long_as_it_says(page: Page, made: RunLayout) -> None:
    """What comes after the announced bytes belongs to no file."""
    head = f"PUT /api/inbox/short.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n"
    answer = page.raw(f"{head}Content-Length: 2\r\n\r\n".encode() + b"{}" + b"x" * 10_000)
    assert (b"201", b"{}") == (answer.split(b" ")[1], (made.inbox / "short.jsonl").read_bytes())
    (made.inbox / "short.jsonl").unlink()


def test_parts_of_a_dead_page_are_removed(tmp_path: Path) -> None:
    """What a killed page left is removed by the next; what others keep in the inbox is theirs."""
    for name in ("upload-0123456789abcdef.part", "upload-mine.part", "other.part"):
        (tmp_path / name).write_text("x")
    remove_dead_parts(tmp_path)
    assert ["other.part", "upload-mine.part"] == sorted(path.name for path in tmp_path.iterdir())
    assert "a.jsonl" == require_name("a.jsonl")
