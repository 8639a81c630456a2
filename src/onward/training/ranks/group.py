"""Several processes as a world: how they communicate, move tensors, and pass an error of one on to all.

Data goes through PyTorch's process group (NCCL between GPUs, gloo between CPUs), small messages always through gloo.
No collective has a timeout of its own: a waiting rank checks every half second whether the others are alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from onward.training.ranks.failures import from_message, to_message
from onward.training.ranks.watch import Watch
from onward.training.world import Message

GLANCE = timedelta(seconds=0.5)
"""Time between two checks of whether the others are alive, while this rank waits."""
FRAME, LENGTH = 512, 8
"""Bytes of every frame from rank 0, and how many of them give the length of the message."""
NAP = 1e-4
"""Seconds between two checks of a GPU."""


class Group:
    """All ranks of a run, as one of them sees them, once PyTorch's process group exists.

    Args:
        device: what this rank computes on.
        watch: knows which ranks are alive.
        is_uniform: whether all ranks compute the same bits: equal devices, threads and versions.
    """

    def __init__(self, rank: int, size: int, device: torch.device, watch: Watch, *, is_uniform: bool) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.watch = watch
        self.is_uniform = is_uniform
        self.is_broken = False
        """Whether the ranks may be in different places, so that they can no longer communicate."""

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return any(found == b"\1" for found in self._all(bytes([flag])))

    def tell(self, make: Callable[[], Message]) -> None:
        """Tell the other ranks what to do next; rank 0 only."""
        if not self.is_broken:
            self._say(json.dumps(make()).encode())

    def listen(self) -> Message:
        """Return the next message from rank 0; every rank but 0.

        Raises:
            RankLost: rank 0 is gone.
            Released: it has ended.
        """
        return json.loads(self._say(None))

    def share(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, by rank."""
        own = json.dumps(value).encode()
        lengths = [int.from_bytes(found, "little") for found in self._all(len(own).to_bytes(8, "little"))]
        return [
            json.loads(found[:length])
            for found, length in zip(self._all(own.ljust(max(lengths), b" ")), lengths, strict=True)
        ]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the tensors of rank 0, bit for bit, into the memory of every rank's own."""
        for tensor in tensors:
            plain = tensor.detach().contiguous().reshape(-1)
            work = distributed.broadcast(plain.view(torch.uint8), 0, async_op=True)
            if tensor.device.type == "cuda":
                self.moved(work)
            else:
                self.wait(work)
            if self.rank and plain.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(plain.view(tensor.shape))

    def meet(self, failure: Exception | None, payload: bytes = b"") -> list[bytes]:
        """Meet after work that may have failed; return the payloads of all ranks, which must have the same length.

        Raises:
            Exception: the work of a rank failed: this rank's own error, or one of the same kind that names the first.
        """
        found = self._all(bytes([failure is not None]) + payload, limited=True)
        if not any(record[0] for record in found):
            return [record[1:] for record in found]
        told = self.share(None if failure is None else to_message(failure))
        first = next(rank for rank, message in enumerate(told) if message is not None)
        if failure is not None and first == self.rank:
            raise failure
        raise from_message(first, told[first]) from failure

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Raise on every rank what the body raises on any rank."""
        failure: Exception | None = None
        with self.in_step():
            try:
                yield
            except Exception as error:
                failure = error
        self.meet(failure)

    @contextlib.contextmanager
    def in_step(self) -> Generator[None]:
        """Note if the body is left early, so that the ranks are no longer in the same place."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.is_broken = True
            raise

    def wait(self, work: Any, *, limited: bool = False) -> None:
        """Wait for a collective, and check meanwhile that the others are alive.

        Args:
            limited: whether the others are about to join; otherwise they may take any time.

        Raises:
            RankLost: a rank is gone or frozen, or its connection broke.
            Released: rank 0 has ended.
        """
        begun = time.monotonic()
        while True:
            has_ended = work.is_completed()
            try:
                work.wait(GLANCE)
                return
            except RuntimeError as error:  # this wait timed out, or the collective failed
                if has_ended:  # it may also have ended right after the timeout
                    self.is_broken = True
                    raise self.watch.blame(error) from None
            self._look(time.monotonic() - begun if limited else 0.0)

    def moved(self, work: Any) -> None:
        """Order what is computed next after a collective on the device's tensors, which all ranks join."""
        if self.device.type == "cuda":
            work.wait()  # the stream waits; the process waits in `settle`
        else:
            self.wait(work, limited=True)

    def gather_into(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Fill `whole` with the tensors of all ranks, one after another; what is computed next is ordered after it."""
        library: Any = distributed
        gather = getattr(library, "all_gather_single", None) or library.all_gather_into_tensor  # its old name
        self.moved(gather(whole, own, async_op=True))

    def require_all(self) -> None:
        """Check that the ranks that this one waits for are alive.

        Raises:
            RankLost: one is gone.
            Released: rank 0 has ended.
        """
        self._look(0.0)

    def wait_unseen(self) -> None:
        """Note that this rank from now on waits in PyTorch's own collectives, which no check interrupts."""
        self.watch.may_hang = True

    def settle(self) -> None:
        """Wait until the device has finished its work; a CPU already has."""
        if self.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        begun = looked = time.monotonic()
        while not done.query():
            time.sleep(NAP)
            if time.monotonic() - looked > GLANCE.total_seconds():
                looked = time.monotonic()
                self._look(looked - begun)

    def end(self, last: Message | None = None) -> None:
        """Leave the group; messages to a rank that is gone are not waited for.

        Args:
            last: what rank 0 tells the others first; if they cannot be told, they find out by themselves.
        """
        try:
            if last is not None:
                self.tell(lambda: last)
        finally:
            self.watch.close(released=last is not None)
        if self.is_broken:
            _keep_groups()
        else:
            distributed.destroy_process_group()

    def _look(self, waited: float) -> None:
        try:
            self.watch.check(waited)
        except BaseException:
            self.is_broken = True
            raise

    def _all(self, own: bytes, *, limited: bool = False) -> list[bytes]:
        """Return the bytes of all ranks, which must have the same length."""
        self.watch.place += 1
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self.wait(distributed.all_gather(found, mine, async_op=True), limited=limited)
        return [each.numpy().tobytes() for each in found]

    def _say(self, text: bytes | None) -> bytes:
        """Send a text of any length from rank 0 to all; a short one takes a single message."""
        frame = bytearray(FRAME)
        if text is not None:
            start = len(text).to_bytes(LENGTH, "little") + text[: FRAME - LENGTH]
            frame[: len(start)] = start
        head = torch.frombuffer(frame, dtype=torch.uint8)
        self.wait(distributed.broadcast(head, 0, async_op=True))
        told = head.numpy().tobytes()
        length = int.from_bytes(told[:LENGTH], "little")
        if length <= FRAME - LENGTH:
            return told[LENGTH : LENGTH + length]
        rest = bytearray(length - (FRAME - LENGTH)) if text is None else bytearray(text[FRAME - LENGTH :])
        body = torch.frombuffer(rest, dtype=torch.uint8)
        self.wait(distributed.broadcast(body, 0, async_op=True))
        return told[LENGTH:] + body.numpy().tobytes()


def _keep_groups() -> None:
    """Keep PyTorch's process groups alive past the end of the interpreter.

    Destroying one waits for its threads, and a thread of gloo waits for what a frozen rank never sends: the process
    would not end. `abort` does not help (seen with torch 2.13).
    """
    library: Any = distributed.distributed_c10d
    for group in library._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
