"""The client of `launcher.py`, which imports little: asks for a command with its own streams and waits for its end."""

import json
import os
import signal
import socket
import sys


def is_open(number: int) -> bool:
    """Return whether a descriptor is open."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


streams = [number for number in (0, 1, 2) if is_open(number)]  # before anything else takes one of them
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
asked = {"words": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ), "open": streams}  # noqa: PTH109
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
text = json.dumps(asked).encode() + b"\n"
socket.send_fds(server, [text[:1]], streams)
server.sendall(text[1:])
status = int(server.recv(16) or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
