"""Who may look at a page and act on it: hosts, origins, the token and the cookie in its place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ledgers import made_up_run

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
    for host in ("", "10.0.0.5", "localhost.evil", "127.0.0.1:x", "a/b", "[::1", "0x7f.1", "localhost#", "localhost?a"):
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
