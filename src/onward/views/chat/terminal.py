"""A conversation in the terminal: answers on stdout as they come, everything else on stderr.

A model's text is not trusted: control characters except line ends and tabs reach the terminal as escapes.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from onward.errors import OnwardError, Unreadable, UsageError
from onward.layout import RunLayout, typed_path
from onward.service.holder import is_held
from onward.startup import Ended
from onward.terminal import say, show_text
from onward.text import printable, quoted
from onward.views.chat.conversation import Column, save_row
from onward.views.chat.engine import Engine, Outcome
from onward.views.chat.sampling import Sampling
from onward.views.loaded import load
from onward.views.points import hold, state_mark

HELP = """/reset            begin a new conversation
/system TEXT      set the system message (without TEXT: the template's own) and begin anew
/at [FILE|STEP]   stay at another state of the run, or go on with the newest; the conversation stays
/save [FILE]      save the conversation as a training row: in inbox/, or at the end of a .jsonl file
/help             this
/quit             end (as Ctrl-D); Ctrl-C ends an answer"""


@dataclass(frozen=True)
class Asking:
    """The options that a chat was started with.

    Args:
        points: the states to ask, as `--at` names them; None is the newest commit.
        sampling: how answers are drawn.
        seed: the seed of every answer; None draws one for each message.
        system: the system message.
        refresh: whether to switch to newer commits.
    """

    points: Sequence[str | None]
    sampling: Sampling
    seed: int | None = None
    system: str | None = None
    refresh: bool = False


class Chat:
    """A chat with one state of a run, or with several that get the same messages and the same seed.

    Args:
        give_way: called before an answer is computed while another process trains.

    Raises:
        OnwardError: a state cannot be found or loaded.
    """

    def __init__(self, layout: RunLayout, asking: Asking, give_way: Callable[[], None]) -> None:
        self._layout, self._asking, self._give_way = layout, asking, give_way
        self._open = ExitStack()
        self._columns: list[Column] = []
        self._follows = asking.refresh
        """Whether newer commits are switched to: not while the user stays at a state that was named."""
        self._mark = state_mark(layout) if asking.refresh else None
        try:
            self._yield_to_training()
            for at in asking.points:
                with hold(layout, at) as point:
                    engine = self._open.enter_context(Engine(load(layout, point)))
                self._columns.append(Column(engine, asking.system))
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def once(self, text: str) -> list[dict[str, Any]]:
        """Return the answers to one message as plain values, one for each state."""
        sampling = self._sampling()
        return [_plain(column.ask(text, sampling).outcome, sampling) for column in self._columns]

    def show_once(self, text: str) -> None:
        """Show the answers to one message."""
        self._introduce()
        self._answer(text)

    def talk(self, lines: Iterator[str]) -> None:
        """Answer messages and obey commands until there are no more."""
        self._introduce()
        say("/help lists the commands")
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                break
            try:
                if text.startswith("/"):
                    self._obey(*_command(text))
                elif text:
                    self._refresh()
                    self._answer(text)
            except OnwardError as error:  # also what the model fails at: what was said before can still be saved
                say(f"onward: {error}")

    def _introduce(self) -> None:
        for column in self._columns:
            say(f"{printable(column.engine.loaded.label)} answers")
        if not self._columns[0].engine.prompts.has_template:
            say("this run's tokenizer has no chat template: the model continues what you type")

    def _answer(self, text: str) -> None:
        self._yield_to_training()
        sampling = self._sampling()
        outcomes: list[Outcome] = []
        for column in self._columns:
            if len(self._columns) > 1:
                say(f"{printable(column.engine.loaded.label)}:")
            reply = column.ask(text, sampling)
            try:
                for piece in reply:
                    show_text(_printable(piece))
            except KeyboardInterrupt as interrupt:
                reply.cancel()
                if isinstance(interrupt, Ended):  # meant for the process, not only for this answer
                    raise
            outcome = reply.outcome
            show_text("\n")
            if outcome.finish != "stop":
                say(f"({'cancelled' if outcome.finish == 'cancelled' else f'cut at {outcome.tokens} tokens'})")
            outcomes.append(outcome)
        for column, outcome in zip(self._columns, outcomes, strict=True):  # all of them, or none: they stay comparable
            column.keep(text, outcome)

    def _sampling(self) -> Sampling:
        seed = secrets.randbits(32) if self._asking.seed is None else self._asking.seed
        return replace(self._asking.sampling, seed=seed)

    def _obey(self, command: str, rest: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "reset": lambda _: self._restart(),
            "system": self._set_system,
            "at": self._go_to,
            "save": self._save,
            "help": lambda _: say(HELP),
        }
        if command not in commands:
            raise UsageError(f"there is no command /{command}", hint="/help lists them.")
        commands[command](rest)

    def _restart(self) -> None:
        for column in self._columns:
            column.turns.clear()
        say("a new conversation")

    def _set_system(self, text: str) -> None:
        for column in self._columns:
            column.system = text or None
        self._restart()

    def _go_to(self, at: str) -> None:
        if len(self._columns) > 1:
            raise UsageError(
                "two states are being compared", where="/at", hint="Start again: onward chat --compare A B"
            )
        follows = self._asking.refresh and not at
        try:
            mark = state_mark(self._layout) if follows else None
            with hold(self._layout, at or None) as point:
                self._columns[0].engine.move_to(self._layout, point)
        except OnwardError as error:
            raise UsageError(error.what, where=error.where, hint=error.hint) from None
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"the state cannot be read: {error}", where="/at") from None
        self._follows, self._mark = follows, mark
        self._introduce()

    def _save(self, name: str) -> None:
        saved = save_row(self._columns[0].row(), self._layout, typed_path(name) if name else None)
        which = f" of {printable(self._columns[0].engine.loaded.label)}" if len(self._columns) > 1 else ""
        say(f"saved the conversation{which} in {quoted(saved)}")

    def _refresh(self) -> None:
        """Switch to the newest commit; if it cannot be loaded, report that and keep the state in memory.

        What cannot be read now is tried again with the next message.
        """
        if not self._follows:
            return
        try:
            if (mark := state_mark(self._layout)) == self._mark:
                return
            self._mark = mark
            with hold(self._layout) as point:
                self._columns[0].engine.move_to(self._layout, point)
        except (OnwardError, OSError, sqlite3.Error) as error:
            if not isinstance(error, OnwardError) or isinstance(error, Unreadable):
                self._mark = None
            say(f"the newest commit cannot be loaded: {error}")
        self._introduce()

    def _yield_to_training(self) -> None:
        if is_held(self._layout.lock):
            self._give_way()


def typed_lines() -> Iterator[str]:
    """Yield what the user types, line by line, with editing; or the lines of a stdin that is not a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # some builds of Python have none
        import readline  # gives `input` line editing and a history of this session

        readline.set_auto_history(True)
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return


def _command(text: str) -> tuple[str, str]:
    command, _, rest = text[1:].partition(" ")
    return command, rest.strip()


def _plain(outcome: Outcome, sampling: Sampling) -> dict[str, Any]:
    values = asdict(outcome)
    return {"answer": values.pop("text"), "step": values.pop("step"), "at": values.pop("label"), **values,
            "sampling": asdict(sampling)}  # fmt: skip


def _printable(text: str) -> str:
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
