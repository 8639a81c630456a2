"""Commands that let a run's model answer: `chat`, `serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import AtOption, JsonOption, RunOption
from onward.cli.output import show
from onward.errors import UsageError
from onward.layout import RunLayout, entries
from onward.terminal import flush_results, say, show_line

NICENESS = 10
"""The niceness of a process alongside one that trains: on a busy processor it gets a tenth of the other's share."""


def chat(
    run: RunOption = Path(),
    at: AtOption = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare", metavar="A B", help="Two states, given as for --at, which get the same messages and seed."
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this message and exit.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Switch to newer commits automatically.")] = False,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Number of most probable tokens to sample from; 0 for all.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Seed of every answer.", show_default="random")] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to the model as it was last committed, or earlier. This works alongside a process that trains."""
    if compare is not None and (at is not None or refresh):
        raise UsageError("--compare already names both states", where="--compare", hint="Leave --at and --refresh out.")
    if at is not None and refresh:
        raise UsageError(
            "--refresh follows the newest commit, --at stays at one state", where="--refresh", hint="Leave one out."
        )
    if as_json and message is None:
        raise UsageError("--json works with one message", where="--json", hint="Give the message: --message TEXT")
    layout = RunLayout(run)
    layout.require()
    with startup.large_imports():
        from onward.views.chat.sampling import Sampling
        from onward.views.chat.terminal import Asking, Chat, typed_lines
    sampling = Sampling(temperature, top_p, top_k, max_tokens, seed or 0)
    asking = Asking(compare or (at,), sampling, seed, system, refresh)
    with Chat(layout, asking, give_way) as opened:
        if message is None:
            opened.talk(typed_lines())
        elif not as_json:
            opened.show_once(message)
        else:
            answers = opened.once(message)
            show({"message": message, "answers": answers} if compare else {"message": message, **answers[0]})


def serve(
    run: RunOption = Path(),
    at: AtOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Switch to newer commits, between two requests.")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; for other machines ONWARD_API_KEY must be set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
) -> None:
    """Serve OpenAI's interface. The base URL is the first line on stdout."""
    if at is not None and follow:
        raise UsageError(
            "--follow follows the newest commit, --at stays at one state", where="--follow", hint="Leave one out."
        )
    layout = RunLayout(run)
    layout.require()
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        hint = "pip install 'onward[serve]'"
        raise UsageError("serving needs starlette and uvicorn", where="serve", hint=hint)
    with startup.large_imports():
        from onward.views.serve.server import KEY, Served
        from onward.views.serve.server import serve as answer
    served = Served(host, port, os.environ.get(KEY) or None, at, follow)
    answer(layout, served, said=say, give_way=give_way, ready=_ready)


def _ready(address: str) -> None:
    show_line(address)
    flush_results()


def give_way() -> None:
    """Lower the priority of this process, and of each of its threads where threads have priorities of their own."""
    tasks = Path("/proc/self/task")
    for thread in (int(task.name) for task in entries(tasks)) if tasks.is_dir() else (0,):
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
