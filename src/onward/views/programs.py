"""What a program does with a kept state of a run: measures it, lets it answer. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from onward.library.torch_defaults import defaults_of_torch
from onward.run import Run

if TYPE_CHECKING:
    from onward.views.chat.engine import Engine


def evaluate(
    run: Run,
    at: str | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a kept state on every file of its stream, on the anchor and on `evaluation.files`; the run is not
    changed, and another process may train it meanwhile.

    Args:
        at: a file (name, position, hash prefix) or a step, as `onward evaluate --at` takes it; None for the last
            commit.
        tasks: measure these tasks of lm-evaluation-harness instead, by name or as `.yaml` files (`onward[eval]`).
        limit: the most questions of a task; None for all.
        report: receives a line when something takes long.

    Returns:
        The keys of `onward evaluate --json`. Losses are means over target tokens, in nats.

    Raises:
        UsageError: there is no such state, it is no longer kept, or a task is unknown.
        DamagedState: it is not what was committed.
        ModelError: the base model is missing or is another one.
    """
    from onward.views.evaluate import measure, measure_tasks

    with defaults_of_torch():
        return measure_tasks(run.layout, at, tasks, limit, report) if tasks else measure(run.layout, at, report)


def load_engine(run: Run, at: str | None = None) -> Engine:
    """Load a kept state that answers: `load_engine(run).reply(messages, Sampling()).outcome.text`.

    Another process may train the run meanwhile. The state is loaded on the GPU if there is one and no process trains
    this run, else on the CPU. Close the engine, or use it in a `with` statement, to free its memory.

    Args:
        at: a file (name, position, hash prefix), a step or a release, as `onward chat --at` takes it; None for the
            newest commit.

    Raises:
        UsageError: there is no such state, or it is no longer kept.
        DamagedState: it is not what was committed.
        ModelError: the base model is missing or is another one.
        Unreadable: a file cannot be read now.
    """
    from onward.views.chat.engine import Engine
    from onward.views.loaded import load
    from onward.views.points import hold

    with defaults_of_torch(), hold(run.layout, at) as point:
        return Engine(load(run.layout, point))
