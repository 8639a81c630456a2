"""Commands that try things apart from the run: `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import JsonOption, RunOption
from onward.cli.output import show
from onward.layout import RunLayout
from onward.terminal import say, show_line
from onward.text import printable

Settings = Annotated[
    list[str],
    typer.Argument(metavar="SETTING...", help="KEY=VALUE of the config; several that belong together: K=V;K=V."),
]


def compare(
    settings: Settings,
    run: RunOption = Path(),
    last: Annotated[int, typer.Option("--last", min=1, help="Files that are trained again.")] = 3,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each, each in another order.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Train the last files again under other settings, apart from the run, and say which did better."""
    from onward.progress import make_observer
    from onward.service.wishes import Wishes

    layout = RunLayout(run)
    layout.require()
    asked = Wishes()
    with startup.large_imports():
        from onward.views.compare import Trials, lines, parse_variants
        from onward.views.grid import final_figures

    variants = parse_variants(settings)
    with asked.on_signals(), make_observer(lambda: 10) as observe:
        trials = Trials(last, seeds, final_figures, observe, lambda line: say(printable(line)), asked)
        comparison = trials.compare(layout, variants)
    if as_json:
        show(comparison.to_dict())
        return
    for line in lines(comparison):
        show_line(printable(line))
