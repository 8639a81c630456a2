"""Commands of policy: `accept`, and on copies of the run `compare`, `release`, `releases`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.commands.back import ask
from onward.cli.options import JsonOption, RunOption, YesOption, completer
from onward.cli.output import show
from onward.errors import OnwardError
from onward.events import Observe
from onward.layout import RunLayout
from onward.service.wishes import Stopped, Wishes
from onward.terminal import say, show_line
from onward.text import printable, quoted

Settings = Annotated[
    list[str],
    typer.Argument(metavar="SETTING...", help="KEY=VALUE of the config; join several into one setting with K=V;K=V."),
]


@dataclass(frozen=True)
class _Apart:
    """What training on a copy of a run needs: the run, what shows its steps, and what may ask it to end."""

    layout: RunLayout
    observe: Observe
    asked: Wishes


@contextmanager
def _apart(run: Path) -> Generator[_Apart]:
    from onward.progress import make_observer

    layout, asked = RunLayout(run), Wishes()
    layout.require()
    with startup.large_imports():
        import_module("onward.views.branch")
    try:
        with asked.on_signals(), make_observer(lambda: 10) as observe:
            yield _Apart(layout, observe, asked)
    except Stopped as stopped:
        raise OnwardError(f"stopped by {stopped}", hint="Nothing of it is left, and the run is unchanged.") from None


def accept(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A name or a hash prefix.", autocompletion=completer("quarantined"))
    ],
    run: RunOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Queue a quarantined FILE again. The guard lets it through."""
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    name = opened.accept(file)
    if as_json:
        show({"accepted": name})
    say(f"{printable(name)} is queued again; onward train --run {quoted(opened.layout.root)} trains it")


def compare(
    settings: Settings,
    run: RunOption = Path(),
    last: Annotated[int, typer.Option("--last", min=1, help="Number of last files to train again.")] = 3,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Trainings per setting, each with a different order of rows.")
    ] = 2,
    as_json: JsonOption = False,
) -> None:
    """Train the last files again under other settings, to compare. This happens on copies of the run."""
    with _apart(run) as apart:
        from onward.views.compare import Trials, lines, parse_variants

        trials = Trials(last, seeds, apart.observe, lambda line: say(printable(line)), apart.asked)
        comparison = trials.compare(apart.layout, parse_variants(settings))
    if as_json:
        show(comparison.to_dict())
        return
    for line in lines(comparison):
        show_line(printable(line))


def release(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_' and '-'.")],
    run: RunOption = Path(),
    start: Annotated[
        str | None, typer.Option("--from", metavar="FILE|STEP", help="The boundary to begin at.", show_default="newest")
    ] = None,
    cooldown: Annotated[
        float | None,
        typer.Option(
            "--cooldown",
            metavar="STEPS|SHARE",
            min=0,
            help="Steps over which the learning rate decays to zero; below 1, a share of the steps so far.",
            show_default="0.1; 0 with --average",
        ),
    ] = None,
    average: Annotated[
        int, typer.Option("--average", min=1, help="Average the weights of this many last boundaries.")
    ] = 1,
    notes: Annotated[str, typer.Option("--notes", help="Text for the model card.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a model to publish, on a branch of the run. On the branch, the learning rate decays to zero."""
    with _apart(run) as apart:
        from onward.views.release import Making, Order

        making = Making(apart.layout, apart.observe, say, apart.asked)
        record = making.release(Order(name, start, cooldown, average, notes))
    if as_json:
        show(record)
    say(f"made {quoted(apart.layout.releases / name)} from step {record['step']}; the run is unchanged")


def releases(
    run: RunOption = Path(),
    remove: Annotated[str | None, typer.Option("--remove", metavar="NAME", help="Remove a release.")] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the releases of the run, side by side, or remove one."""
    from onward.views.releases import find_release, lines, list_releases, remove_release

    layout = RunLayout(run)
    layout.require()
    if remove is not None:
        ask(f"remove the release {quoted(find_release(layout, remove).folder)}?", yes)
        remove_release(layout, remove)
    found = list_releases(layout)
    if as_json:
        show([release.summary() for release in found])
        return
    for line in lines(found):
        show_line(printable(line))
