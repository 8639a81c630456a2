"""Processes that import before their turn, so that a turn is spent on what is measured.

`Prepared` starts such a process; the process calls `wait`. Standard input of the process is one end of a pair of
sockets: the process writes a byte when it has imported everything and reads one when its turn comes. If whoever started
it ends, it reads the end of the stream and ends too. A script that is called by hand does not wait.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

TURN = "ONWARD_GPU_TURN"
"""Variable that tells a process to wait for its turn; those that it starts itself do not."""


class Prepared:
    """A process that was started before its turn.

    Args:
        environment: variables of the process.
        apart: whether it gets a session of its own, so that it can be ended together with those that it started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, apart: bool = False) -> None:
        self._apart = apart
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command, env={**environment, TURN: "wait"}, stdin=theirs, stdout=self._output,
                stderr=subprocess.STDOUT, start_new_session=apart,
            )  # fmt: skip

    def wait_until_ready(self, seconds: float) -> None:
        """Return when the process has imported everything or has ended; end it if it takes longer."""
        self._channel.settimeout(seconds)
        try:
            self._channel.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            self.end()
        except ConnectionError:
            pass  # it has ended

    def take_turn(self, seconds: float) -> int | None:
        """Let the process go on and wait for it; returns its exit status, or None if it was ended after the time."""
        with contextlib.suppress(OSError):  # it has ended
            self._channel.sendall(b".")
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def said(self) -> str:
        """Return what the process has printed."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def end(self) -> None:
        """End the process if it still runs, and those of its session if it has one of its own."""
        if self._process.poll() is None:
            if self._apart:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()


def wait(*modules: str) -> None:
    """Import modules and return when the turn comes; at once in a process that was not started ahead of it.

    A process that imports modules here does without bitsandbytes (`lean`). Nothing that is timed uses it.

    Raises:
        ImportError: a package is missing.
        SystemExit: whoever started this process has ended.
    """
    if os.environ.pop(TURN, None) is None:
        return
    for name in ("lean", *modules) if modules else ():
        importlib.import_module(name)
        assert not _uses_gpu(), f"{name} initializes CUDA before the turn"
    turn = b""
    with socket.socket(fileno=os.dup(0)) as channel, contextlib.suppress(ConnectionError):  # its other end is closed
        channel.sendall(b".")
        turn = channel.recv(1)
    if not turn:
        sys.exit("the suite ended before this process had its turn")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _uses_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def present(*packages: str) -> list[str]:
    """Return those of some modules whose package is installed."""
    return [name for name in packages if importlib.util.find_spec(name.partition(".")[0]) is not None]
