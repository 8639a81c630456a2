"""Where a server listens."""

from __future__ import annotations

import errno
import ipaddress
import socket

from onward.errors import UsageError

BACKLOG = 128
_HINTS = {
    errno.EADDRNOTAVAIL: "Name an address of this machine: --host 127.0.0.1, or 0.0.0.0 for all of them.",
    errno.EACCES: "Ports below 1024 are reserved; --port 0 takes any that is free.",
}


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any that is free.

    Raises:
        UsageError: there is no such host, it is not this machine, or the port is taken.
    """
    where = f"{host}:{port}"
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:  # the latter of a name that no name server takes
        raise UsageError(f"there is no such host: {getattr(error, 'strerror', None) or error}", where=where) from None
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        hint = _HINTS.get(error.errno or 0, "--port 0 takes any that is free.")
        raise UsageError(f"a server cannot listen there: {error.strerror or error}", where=where, hint=hint) from None
    return listening


def others_can_reach(listening: socket.socket) -> bool:
    """Return whether other machines can: by the address that a socket got, since a name does not tell."""
    return not ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(host: str, listening: socket.socket) -> str:
    """Return the URL of a server on this machine that was asked to listen on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}"
