"""Reads a pickle as plain values: nothing is imported, called or built except lists, dicts and tuples.

A pickle is a program for a small stack machine. This one runs it with inert placeholders for classes and functions, so
that a file from a stranger can be read safely. The standard library's `pickletools` reads opcodes and their arguments.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

LARGEST = 1 << 24
"""The largest file that is read, in bytes: arguments are a few kilobytes."""
_LEGACY_HEAD = 3
"""How many pickles precede the object in a file written by PyTorch before 1.6: magic number, protocol, system."""


class NotAPickle(Exception):
    """The bytes are not a pickle that this machine can follow; the message says why."""


@dataclass(eq=False)
class Inert:
    """A placeholder for a class or function (`name` alone), for a call of one, or for an object of a class.

    Args:
        name: its module and name.
        arguments: what it was called with.
        state: what was put into it, usually its attributes.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


def read_saved(path: Path) -> Any:
    """Return what `torch.save` wrote, inert; tensors are placeholders without their values.

    Raises:
        NotAPickle: the file is too large, or not a pickle.
        OSError: it cannot be read.
    """
    if path.stat().st_size > LARGEST:
        raise NotAPickle(f"it has more than {LARGEST} bytes")
    data = path.read_bytes()
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return _legacy(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (member,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            if member.file_size > LARGEST:
                raise NotAPickle(f"it unpacks to more than {LARGEST} bytes")
            return run_pickle(io.BytesIO(archive.read(member)))
    except (NotAPickle, MemoryError):
        raise
    except Exception as error:  # each way to compress, and each Python, has errors of its own
        raise NotAPickle(f"it is not an archive of torch.save: {error}") from None


def _legacy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    found = [run_pickle(stream)]
    while len(found) <= _LEGACY_HEAD and isinstance(found[0], int) and stream.tell() < len(data):
        found.append(run_pickle(stream))
    return found[-1]


def run_pickle(stream: io.BytesIO) -> Any:
    """Run one pickle from a stream and return its value, inert.

    Raises:
        NotAPickle: it is not one.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.stack[-1]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise NotAPickle(f"{type(error).__name__}: {error}") from None


class _Machine:
    """The stack, its marks and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif argument is not None and name.startswith(_LITERALS):
            self.stack.append(argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"opcode {name} is not known")

    def push(self, value: Any) -> None:
        """Push a value onto the current stack: computing the value may have ended a group."""
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """Pop the topmost values, in the order in which they were pushed."""
        if count > len(self.stack):
            raise IndexError("the stack is too short")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def mark(self, _: Any) -> None:
        """Begin a group of values."""
        self.marks.append(self.stack)
        self.stack = []

    def group(self) -> list[Any]:
        """Pop all values since the last mark."""
        taken, self.stack = self.stack, self.marks.pop()
        return taken

    def remember(self, number: Any) -> None:
        """Store the topmost value in the memo under a number, or under the next one."""
        self.memo[len(self.memo) if number is None else int(number)] = self.stack[-1]

    def call(self, values: list[Any]) -> None:
        """Push a placeholder for a call, from the callable, its arguments, and keywords, which are ignored."""
        target, arguments = values[0], values[1]
        self.stack.append(Inert(_name_of(target), tuple(arguments)))

    def extend(self, items: list[Any]) -> None:
        """Add items to the list or set on the stack."""
        target = self.stack[-1]
        (target if isinstance(target, list) else target.items).extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values, in turn, to the dict on the stack."""
        pairs = list(zip(items[::2], items[1::2], strict=True))
        target = self.stack[-1]
        if isinstance(target, dict):
            cast(dict[Any, Any], target).update(pairs)
        else:
            target.items.extend(pairs)

    def new_dict(self, _: Any) -> None:
        """Push a dict of the keys and values since the last mark."""
        items = self.group()
        self.stack.append({})
        self.set_items(items)

    def build(self, _: Any) -> None:
        """Put a state into the object on the stack."""
        (state,) = self.pop(1)
        self.stack[-1].state = state


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, Inert) else type(value).__name__


_LITERALS = ("INT", "BININT", "LONG", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BIN", "UNICODE", "BINUNICODE",
             "BINBYTES", "BYTEARRAY")  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": lambda: Inert("set"),
}  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.pop(1),
    "POP_MARK": lambda machine, _: machine.group(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "PUT": _Machine.remember, "BINPUT": _Machine.remember, "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GET": lambda machine, number: machine.push(machine.memo[int(number)]),
    "BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.group())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "LIST": lambda machine, _: machine.push(machine.group()),
    "DICT": _Machine.new_dict,
    "FROZENSET": lambda machine, _: machine.push(Inert("frozenset", items=machine.group())),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.group()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.group()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.group()),
    "GLOBAL": lambda machine, names: machine.push(Inert(str(names).replace(" ", "."))),
    "STACK_GLOBAL": lambda machine, _: machine.push(Inert(".".join(map(str, machine.pop(2))))),
    "REDUCE": lambda machine, _: machine.call(machine.pop(2)),
    "NEWOBJ": lambda machine, _: machine.call(machine.pop(2)),
    "NEWOBJ_EX": lambda machine, _: machine.call(machine.pop(3)),
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(Inert("persistent", tuple(machine.pop(1)))),
}  # fmt: skip
"""What each opcode does. `OBJ`, `INST`, `EXT*` and out-of-band buffers are not written by `torch.save`."""
