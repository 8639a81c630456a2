"""Where a request comes from: the host that it names, the site whose page made it, the token that it carries.

Every site that the same browser shows can reach a server on this machine. So a request has to name a host that the
server is known by (DNS rebinding points a stranger's name at a local address), and one that a browser makes for another
site is refused whatever comes with it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

LOCAL_NAMES = ("localhost", "localhost.localdomain")


@dataclass(frozen=True)
class Hosts:
    """The host names that a server answers to.

    Args:
        names: lower-case names without a port.
        any_address: whether it also answers to every numeric address: those cannot be rebound.
    """

    names: frozenset[str]
    any_address: bool

    @classmethod
    def of(cls, bound_to: str, others: Iterable[str] = (), *, any_address: bool = False) -> Hosts:
        """Return the hosts of a server that listens on an address and has other names, as behind a proxy."""
        names = {*LOCAL_NAMES, "127.0.0.1", "::1", bound_to, *others}
        return cls(frozenset(name.lower().strip("[]") for name in names), any_address)

    def know(self, host: str) -> bool:
        """Return whether the `Host` of a request is one of them, with any port: a tunnel has a port of its own."""
        name = _name_of(host)
        return name is not None and (name in self.names or (self.any_address and _is_address(name)))


def bearer(headers: Headers) -> str:
    """Return the token of `Authorization: Bearer TOKEN`; empty if a request has none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def fits_header(token: str) -> bool:
    """Return whether `Authorization: Bearer TOKEN` can carry a token as it is: plain ASCII, no blank at an end."""
    return token.isascii() and token.isprintable() and token == token.strip()


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
