"""The process that answers the page's questions: a model in memory, alongside training and at a lower priority.

Wishes come as JSON lines on stdin, answers go as JSON lines to stdout. It is a separate process, so that the page
itself stays small and survives the death of a model: `python -m onward.views.page.answering RUN`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from onward import startup
from onward.errors import OnwardError, first_line
from onward.layout import RunLayout

NICENESS = 10
"""The niceness of the process: on a busy processor it gets a tenth of what training gets."""
LOADED = 2
"""States that are kept in memory: the two columns."""


class Answering:
    """Answers wishes: `{"id", "at", "messages", "system", "temperature", "max_tokens", "seed"}`.

    `{"cancel": ID}` ends an answer early. The output is pieces `{"id", "text"}`, and finally `{"id", "done"}` or
    `{"id", "error"}`.

    Args:
        out: receives the output.
    """

    def __init__(self, layout: RunLayout, out: IO[str]) -> None:
        self._layout, self._out = layout, out
        self._engines: OrderedDict[str | None, tuple[Any, Any]] = OrderedDict()
        self._replies: dict[int, Any] = {}
        self._writing = threading.Lock()

    def run(self, lines: Iterator[str]) -> None:
        """Answer until there are no more lines."""
        for line in lines:
            wish = json.loads(line)
            if "cancel" in wish:
                if (reply := self._replies.get(wish["cancel"])) is not None:
                    reply.cancel()
                continue
            try:
                self._begin(wish)
            except OnwardError as error:
                self._tell({"id": wish["id"], "error": str(error)})
            except Exception as error:  # other questions, current and later ones, are still answered
                self._tell({"id": wish["id"], "error": f"this cannot be answered: {first_line(error)}"})
        for engine, _ in self._engines.values():
            engine.close()

    def _begin(self, wish: Mapping[str, Any]) -> None:
        from onward.views.chat.conversation import Column
        from onward.views.chat.sampling import Sampling

        at = wish.get("at") or None
        engine = self._engine(at)
        column = Column(engine, wish.get("system") or None)
        *before, last = wish["messages"]
        column.turns = list(before)
        settings = {name: wish[name] for name in ("temperature", "max_tokens", "seed") if name in wish}
        reply = column.ask(last["content"], Sampling(**settings))
        self._replies[wish["id"]] = reply
        # read in a thread, so that the other column's state is loaded meanwhile
        threading.Thread(target=self._read, args=(wish["id"], reply), daemon=True).start()

    def _read(self, number: int, reply: Any) -> None:
        try:
            for piece in reply:
                self._tell({"id": number, "text": piece})
            outcome = reply.outcome
        except OnwardError as error:
            self._tell({"id": number, "error": str(error)})
            return
        finally:
            del self._replies[number]
        done = {"label": outcome.label, "step": outcome.step, "tokens": outcome.tokens, "finish": outcome.finish}
        self._tell({"id": number, "done": {**done, "seconds": outcome.seconds, "text": outcome.text}})

    def _engine(self, at: str | None) -> Any:
        """Return the engine of a state; it switches to the state that the same words mean now."""
        from onward.views.chat.engine import Engine
        from onward.views.loaded import load
        from onward.views.points import hold, state_mark

        mark = state_mark(self._layout, at)
        engine, known = self._engines.get(at, (None, None))
        if engine is None:
            with hold(self._layout, at) as point:
                engine = Engine(load(self._layout, point))
        elif known != mark:
            with hold(self._layout, at) as point:
                engine.move_to(self._layout, point)
        self._engines[at] = engine, mark
        self._engines.move_to_end(at)
        while len(self._engines) > LOADED:
            self._engines.popitem(last=False)[1][0].close()
        return engine

    def _tell(self, value: dict[str, Any]) -> None:
        with self._writing:
            self._out.write(json.dumps(value) + "\n")
            self._out.flush()


def own_output() -> IO[str]:
    """Return what is standard output, and let whatever a library prints there go to standard error from now on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def main() -> None:
    """Answer questions about the run that the first argument names."""
    out = own_output()
    startup.set_environment()
    startup.keep_out_fetched_code()
    os.nice(max(0, NICENESS - os.nice(0)))  # before any thread starts: each keeps the niceness it started with
    with startup.large_imports():
        importlib.import_module("onward.views.chat.engine")
    Answering(RunLayout(Path(sys.argv[1])), out).run(sys.stdin)


if __name__ == "__main__":
    main()
