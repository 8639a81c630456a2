"""A conversation with one state of a run, or the same one with several; saved as a training row when asked to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, BinaryIO

from onward.atomic import move_to_free_name, write_file
from onward.data.row_types import Message
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.text import quoted
from onward.views.chat.engine import Engine, Outcome, Reply
from onward.views.chat.sampling import Sampling


class Column:
    """What was said with one state.

    Args:
        engine: gives the answers.
        system: the system message; None leaves it to the chat template.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        self.system = system
        self.turns: list[Message] = []
        """Questions and answers so far, in turn."""

    def ask(self, text: str, sampling: Sampling) -> Reply:
        """Begin the answer to a message; a model without a chat template continues its text.

        Raises:
            UsageError: it cannot be asked.
        """
        if not self.engine.prompts.has_template:
            return self.engine.go_on(text, sampling)
        return self.engine.reply([*self._opening(), *self.turns, {"role": "user", "content": text}], sampling)

    def keep(self, text: str, outcome: Outcome) -> None:
        """Keep a message with its answer as context for the next one; without an answer, keep nothing."""
        if outcome.text.strip():
            answer = {"role": "assistant", "content": outcome.text}
            self.turns += [{"role": "user", "content": text}, answer]

    def row(self) -> dict[str, Any]:
        """Return the conversation as a training row.

        Raises:
            UsageError: nothing was answered yet.
        """
        if not self.turns:
            raise UsageError("there is no answer to save yet")
        if not self.engine.prompts.has_template:
            last = self.turns[-2:]
            return {"prompt": last[0]["content"], "completion": last[1]["content"]}
        return {"messages": [*self._opening(), *self.turns]}

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def save_row(row: dict[str, Any], layout: RunLayout, path: Path | None = None) -> Path:
    """Save a training row: in a file of its own in the run's inbox, or at the end of a `.jsonl` file.

    Args:
        path: the file; None for the inbox, from which a process that watches trains it.

    Returns:
        The file that now contains it.

    Raises:
        UsageError: the file is not a `.jsonl` file, or cannot be written.
    """
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        if path is None:
            return _into_inbox(line, layout.inbox)
        if path.suffix != ".jsonl":
            raise UsageError("rows are saved in a .jsonl file", where=path, hint=f"/save {quoted(path)}.jsonl")
        with path.open("ab+") as stream:
            stream.write(line if _ends_a_line(stream) else b"\n" + line)
    except OSError as error:
        raise UsageError(f"the row cannot be saved: {error.strerror}", where=error.filename or path) from None
    return path


def _ends_a_line(stream: BinaryIO) -> bool:
    """Return whether a file is empty or ends with a line end, as editors may leave it or not."""
    if stream.seek(0, os.SEEK_END) == 0:
        return True
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


def _into_inbox(line: bytes, inbox: Path) -> Path:
    """Atomically put a file into the inbox, under a name that is not taken."""
    stem = time.strftime("chat-%Y%m%d-%H%M%S")
    names = [f"{stem}.jsonl", *(f"{stem}-{number}.jsonl" for number in range(2, 1000))]
    temporary = inbox / f".{stem}-{secrets.token_hex(4)}.part"  # others may save in this second
    try:
        write_file(temporary, line)
        for name in names:
            with contextlib.suppress(FileExistsError):
                move_to_free_name(temporary, inbox / name)
                return inbox / name
    finally:
        temporary.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, "a thousand rows were saved within this second", str(inbox))
