"""The command line for shells, without the seconds that Python takes to import torch: `onward` asks a process to fork.

What a shell sees is the same: arguments, folder, environment and streams are those of the command that it starts, the
exit status and a signal that ended it are passed on, and a command that is killed is gone when the next one begins.
Tests of how a process starts begin a real one instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import selectors
import shlex
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import apart_with

from onward import cli

CLIENT = Path(__file__).with_name("launch.py")


def make_program(folder: Path) -> Path:
    """Start the process that forks, for the life of this one; returns the program `onward` in a folder.

    Args:
        folder: its name is short: the system allows about 100 characters for that of a socket.
    """
    address = folder / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    apart_with(_serve, listener)
    listener.close()
    program = folder / "onward"
    words = shlex.join([sys.executable, "-I", "-S", str(CLIENT), str(address)])
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return program


def _serve(listener: socket.socket) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    _Server(listener).serve(parent.sentinel)


class _Server:
    """Forks a process for each client, hands it the client's signals, and tells the client how it ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}
        self._woken, waking = socket.socketpair()
        for end in (self._woken, waking):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking.fileno())
        self._waking = waking

    def serve(self, parent: int) -> None:
        """Serve until the process `parent`, a sentinel, ends."""
        while True:
            with selectors.DefaultSelector() as ready:
                for file in (parent, self._listener, self._woken, *self._clients.values()):
                    ready.register(file, selectors.EVENT_READ)
                found = {key.fileobj for key, _ in ready.select()}
            if parent in found:
                return
            for pid, client in list(self._clients.items()):  # first of all: who is gone holds nothing any more
                if client in found:
                    self._hear(pid, client)
            with contextlib.suppress(BlockingIOError):
                while self._woken.recv(1024):
                    pass
            self._reap()
            if self._listener in found:
                self._accept()

    def _hear(self, pid: int, client: socket.socket) -> None:
        numbers = client.recv(64)
        for number in numbers or bytes([signal.SIGKILL]):
            os.kill(pid, number)
        if not numbers:
            os.waitpid(pid, 0)
            self._clients.pop(pid).close()

    def _reap(self) -> None:
        for pid, client in list(self._clients.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    client.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode())
                self._clients.pop(pid).close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        first, descriptors, _, _ = socket.recv_fds(client, 1 << 16, 3)
        text = first
        while not text.endswith(b"\n"):
            text += client.recv(1 << 16)
        asked = json.loads(text)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._listener, self._woken, self._waking, client, *self._clients.values()):
                end.close()
            _become(asked, dict(zip(asked["open"], descriptors, strict=True)))
        for descriptor in descriptors:
            os.close(descriptor)
        self._clients[pid] = client


def _become(asked: dict[str, Any], streams: dict[int, int]) -> None:
    """Be the command that a client asked for, to its end."""
    status = 1
    try:
        for number in (0, 1, 2):
            with contextlib.suppress(OSError):
                os.close(number)
        for number, descriptor in streams.items():
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = _stream(streams, 0, lambda: open(0, closefd=False))  # noqa: SIM115
        sys.stdout = _stream(streams, 1, lambda: open(1, "w", closefd=False))  # noqa: SIM115
        sys.stderr = _stream(streams, 2, lambda: io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True))
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.argv = ["onward", *asked["words"]]
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


def _stream(streams: dict[int, int], number: int, make: Callable[[], Any]) -> Any:
    """Return the stream that Python has for a descriptor: None for one that is closed."""
    return make() if number in streams else None
