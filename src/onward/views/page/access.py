"""Who may read and who may act: the token, the cookie in its place, and where a request came from.

Every site that the same browser shows can reach a page on this machine. So a request has to name a host that this page
is known by (DNS rebinding points a stranger's name at a local address), and one that a browser makes for another site
is refused whatever cookie comes with it.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers

COOKIE = "onward_page"
LOCAL_NAMES = ("localhost", "localhost.localdomain")
TOKEN_BYTES = 32
SAFE_METHODS = ("GET", "HEAD")


class Key:
    """The token of a page, and the value of the cookie that a browser gets for it.

    Args:
        token: the secret; random if none is given.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(TOKEN_BYTES)
        self.cookie = hmac.new(self.token.encode(), b"onward page: cookie", sha256).hexdigest()

    def is_token(self, text: str) -> bool:
        """Return whether a text is the token, compared in constant time."""
        return hmac.compare_digest(text.encode(errors="replace"), self.token.encode())

    def is_in_header(self, headers: Headers) -> bool:
        """Return whether a request has the token as `Authorization: Bearer TOKEN`."""
        scheme, _, text = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self.is_token(text.strip())

    def is_in_cookie(self, headers: Headers, name: str) -> bool:
        """Return whether a request has the cookie."""
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(name)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(errors="replace"), self.cookie.encode())


@dataclass(frozen=True)
class Hosts:
    """The host names that a page answers to.

    Args:
        names: lower-case names without a port.
        any_address: whether it also answers to every numeric address: those cannot be rebound.
    """

    names: frozenset[str]
    any_address: bool = False

    @classmethod
    def of(cls, bound_to: str, others: Iterable[str] = ()) -> Hosts:
        """Return the hosts of a page that listens on an address and has other names, as behind a proxy."""
        names = {*LOCAL_NAMES, "127.0.0.1", "::1", bound_to, *others}
        return cls(frozenset(name.lower().strip("[]") for name in names), any_address=not is_loopback(bound_to))

    def know(self, host: str) -> bool:
        """Return whether the `Host` of a request is one of them, with any port: a tunnel has a port of its own."""
        name = _name_of(host)
        return name is not None and (name in self.names or (self.any_address and _is_address(name)))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in LOCAL_NAMES


def is_foreign(headers: Headers) -> bool:
    """Return whether a browser says that another site made a request. Programs other than browsers say nothing."""
    origin = headers.get("origin")
    if origin is not None and not _is_same(origin, headers.get("host", "")):
        return True
    made_by = headers.get("sec-fetch-site", "same-origin")
    return made_by not in ("same-origin", "none") and headers.get("sec-fetch-mode") != "navigate"


def _is_same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
        port = {"http": 80, "https": 443}.get(parts.scheme)
        if "@" in parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            return False
        there, here = (parts.hostname, parts.port or port), urlsplit(f"//{host}")
        return port is not None and there == (here.hostname, here.port or port)
    except ValueError:
        return False


def _name_of(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return None if "@" in host or parts.netloc != host else parts.hostname


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
