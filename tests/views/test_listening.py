"""Where the page and the interface over HTTP listen, and who can reach them there."""

from __future__ import annotations

import socket

import pytest
from addresses import NEEDS_IPV6

from onward.errors import UsageError
from onward.views.web.listening import listen, others_can_reach, url_of


@pytest.mark.parametrize(
    ("host", "public", "name"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        ("127.0.0.2", False, "127.0.0.2"),
        ("localhost", False, "localhost"),
        pytest.param("::1", False, "[::1]", marks=NEEDS_IPV6),
        ("0.0.0.0", True, "127.0.0.1"),
        pytest.param("::", True, "[::1]", marks=NEEDS_IPV6),
    ],
)
def test_who_can_reach_a_server_depends_on_its_address(host: str, public: bool, name: str) -> None:
    """Its URL is one that a program on this machine can open."""
    with listen(host, 0) as listening:
        assert public == others_can_reach(listening)
        assert f"http://{name}:{listening.getsockname()[1]}" == url_of(host, listening)


def test_a_name_of_this_machine_is_not_taken_for_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems give a machine's name an address that only the machine reaches, or one that all do."""
    known = socket.getaddrinfo
    for address, public in (("127.0.1.1", False), ("0.0.0.0", True)):
        monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, to=address, **more: known(to, *rest, **more))
        with listen("my-laptop", 0) as listening:
            assert (public, address) == (others_can_reach(listening), listening.getsockname()[0])
            assert f"http://my-laptop:{listening.getsockname()[1]}" == url_of("my-laptop", listening)


@pytest.mark.parametrize(
    ("host", "words"),
    [("no.such.host.invalid", "no such host"), ("192.0.2.1", "(?s)cannot listen.*an address of this machine")],
)
def test_where_no_server_can_listen_is_refused(host: str, words: str) -> None:
    """A name that nobody knows, and an address of another machine."""
    with pytest.raises(UsageError, match=words) as refused:
        listen(host, 0)
    assert f"{host}:0" == refused.value.where
