"""Who may look at a page and act on it: hosts, origins, the token and the cookie in its place."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import assert_refused, onward
from ledgers import made_up_run
from processes import start_command

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from pages import Page, serve
from starlette.datastructures import Headers

from onward.views.page.access import Key
from onward.views.web.origin import Hosts, bearer, is_foreign


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of a run without files."""
    with serve([made_up_run(tmp_path_factory.mktemp("page") / "made", [], float).root]) as served:
        yield served


def test_a_token_in_the_address_opens_pages_alone(page: Page) -> None:
    """It is taken from the link of a page; an address for programs wants it in a header, where no log keeps it."""
    answer = page.ask("GET", f"/api/status?token={page.key.token}")
    assert (401, "Bearer", False) == (answer.status, answer.headers["www-authenticate"], "set-cookie" in answer.headers)


@pytest.mark.parametrize(
    ("site", "status"), [(None, 303), ("none", 303), ("same-origin", 303), ("same-site", 200), ("cross-site", 200)]
)
def test_a_link_leads_on_in_a_way_that_carries_the_cookie(page: Page, site: str | None, status: int) -> None:
    """A browser that came from another site would send no strict cookie after a redirect, so a page leads it on."""
    said = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"} if site else {}
    answer = page.ask("GET", f"/?a=b%20c&token={page.key.token}", headers=said)
    assert (status, True) == (answer.status, "set-cookie" in answer.headers)
    assert "/?a=b+c" == answer.headers.get("location") or b'content="0; url=/?a=b+c"' in answer.body


def test_who_has_no_access_is_told_in_a_form_of_use(page: Page) -> None:
    """A browser that opens a page gets a page, with its styles; whatever else asks gets JSON."""
    kinds = [
        page.ask("GET", path, headers=headers).headers["content-type"].split(";")[0]
        for path in ("/", "/api/status")
        for headers in ({}, {"Accept": "text/html"})
    ]
    assert ["application/json", "text/html", "application/json", "application/json"] == kinds
    assert 200 == page.ask("GET", "/static/icon.svg").status


@pytest.mark.parametrize("other", ['x={"a":1}', "a@b=c", "flag", "x=\xfc", "path=x", "n=a b", "onward_page_1=0"])
def test_the_cookies_of_other_programs_keep_nobody_out(page: Page, other: str) -> None:
    """A browser sends those of every program on this machine, whatever they look like; the page's own counts."""
    own = page.cookie["Cookie"]
    statuses = [
        page.ask("HEAD", "/api/status", headers={"Cookie": cookie}).status
        for cookie in (f"{own}; {other}", f"{other}; {own}", other)
    ]
    assert [200, 200, 401] == statuses


def test_hosts() -> None:
    """Names of this machine are known at any port; a page for others also by any address, which nobody can rebind."""
    local, wide = Hosts.of("127.0.0.1", ["GPU.lan", "[fd00::1]"]), Hosts.of("0.0.0.0", any_address=True)
    ours = ("localhost", "LOCALHOST:9", "localhost.localdomain", "127.0.0.1:80", "[::1]:80", "gpu.lan", "[fd00::1]")
    for host in ours:
        assert local.know(host), host
    for host in (
        "",
        "10.0.0.5",
        "localhost.evil",
        "127.0.0.1:x",
        "a/b",
        "[::1",
        "0x7f.1",
        "localhost#",
        "localhost?a",
        "me@localhost",
    ):
        assert not local.know(host), host
    assert wide.know("10.0.0.5:8017")
    assert not wide.know("evil.example")


def test_origins() -> None:
    """A page is the same if scheme, host and port are, said or not; an origin in any other form is another site's."""
    for scheme, port in (("http", 80), ("https", 443)):
        for origin in (f"{scheme}://gpu.lan", f"{scheme}://gpu.lan:{port}"):
            for host in ("gpu.lan", f"gpu.lan:{port}"):
                assert not is_foreign(Headers({"origin": origin, "host": host})), (origin, host)
            assert is_foreign(Headers({"origin": origin, "host": "gpu.lan:81"})), origin
    for origin in (
        "ftp://gpu.lan:443", "https://evil@gpu.lan", "https://gpu.lan/a", "https://gpu.lan#", "null", "", "https://[gpu",
        "https://gpu.lan:x", "https://gpu.lan:99999", "https://evil.lan",
    ):  # fmt: skip
        assert is_foreign(Headers({"origin": origin, "host": "gpu.lan:443"})), origin
    for site in ("same-origin", "none"):
        assert not is_foreign(Headers({"sec-fetch-site": site, "sec-fetch-mode": "cors"}))


def test_a_key_is_the_token_that_is_given() -> None:
    """A token that a service sets stays the same at every start, and so does its cookie; else both are random."""
    one, same, other = Key("a" * 20), Key("a" * 20), Key()
    assert ("a" * 20, one.cookie) == (one.token, same.cookie)
    assert len({one.cookie, other.cookie, Key().cookie, other.token}) == 4
    assert "a" * 20 == bearer(Headers({"authorization": "BEARER   " + "a" * 20}))


TOKEN = "0123456789abcdef"


def _with_token() -> None:
    os.environ["ONWARD_PAGE_TOKEN"] = TOKEN


def test_a_page_that_others_can_reach_says_so(tmp_path: Path) -> None:
    """Whoever starts it is warned before the link, which has the token that was set and an address that opens here."""
    run, output = made_up_run(tmp_path / "run", [], float).root, tmp_path / "out"
    output.touch()
    process = start_command(output, "page", "--host", "0.0.0.0", "--port", 0, "--run", run, prepare=_with_token)
    while not (found := re.search(r"^http.*/\?token=.*\n", output.read_text(), re.MULTILINE)):
        process.join(0.05)
        assert process.is_alive(), output.read_text()
    port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(.*)\n", found[0]).groups()  # type: ignore[union-attr]
    assert TOKEN == token
    assert output.read_text().startswith("others can reach this page")
    opened = Page(int(port), Key(TOKEN)).ask("GET", "/api/status", headers={"Authorization": f"Bearer {TOKEN}"})
    assert 200 == opened.status
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert 0 == process.exitcode


@pytest.mark.parametrize(
    "token", [TOKEN[1:], f"{TOKEN} ", f"{TOKEN}\t", f"{TOKEN} x", f"ü{TOKEN}", f"{TOKEN}\x7f", TOKEN]
)
def test_a_token_that_no_header_can_carry_is_refused(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is long enough to guess never, and of characters that a header takes; the variable is named."""
    monkeypatch.setenv("ONWARD_PAGE_TOKEN", token)
    words = ("cannot listen",) if token == TOKEN else ("ONWARD_PAGE_TOKEN", "openssl rand")
    run = made_up_run(tmp_path / "run", [], float).root
    assert_refused(onward("page", "--host", "192.0.2.1", "--run", run), 2, *words)


@pytest.mark.parametrize("host", ["::1%nowhere", "my..host", f"{'a' * 64}.lan"])
def test_a_host_that_there_is_not_is_named(host: str, tmp_path: Path) -> None:
    """A name that nobody has is wrong usage, not a failure of this machine."""
    run = made_up_run(tmp_path / "run", [], float).root
    assert_refused(onward("page", "--host", host, "--port", 1, "--run", run), 2, f"{host}:1", "no such host")
