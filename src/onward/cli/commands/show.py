"""Commands that change nothing: `status`, `history`, `preview`, `verify`, `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onward import startup
from onward.cli.options import JsonOption, RunOption
from onward.cli.output import show, show_each
from onward.errors import UsageError, printable_lines
from onward.layout import RunLayout
from onward.terminal import marker, say, show_line
from onward.text import duration, how_many, printable, quoted, size

if TYPE_CHECKING:
    from onward.views.preview import Preview

REFRESH_SECONDS = 1.0


def status(
    run: RunOption = Path(),
    keep_showing: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show step, file, queue, loss, time left, disk and last events."""
    from onward.status import read_status, recent_events

    layout = RunLayout(run)
    if as_json:
        show(read_status(layout))
        return
    from onward.cli.tables import print_status, status_lines, watch_status

    if keep_showing:
        watch_status(lambda: status_lines(read_status(layout), recent_events(layout)), REFRESH_SECONDS)
    print_status(read_status(layout), recent_events(layout))


def history(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Show one row per file: rows, steps, loss, handover, time."""
    from onward.status import read_history

    entries = read_history(RunLayout(run))
    if as_json:
        show(entries)
        return
    from onward.cli.tables import print_history

    print_history(entries)


def preview(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A training file, or any other source that add takes.")],
    run: RunOption = Path(),
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many rows to show.", show_default="3; with --json all")
    ] = None,
    worst: Annotated[
        bool, typer.Option("--worst", help="Show the longest rows, which are the first to be cut.")
    ] = False,
    with_estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Estimate the time and memory of training it here, from a few steps on a copy."
        ),
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0.0, metavar="PER_HOUR", help="With --estimate: also the cost, at this price.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a file's rows as the model sees them, trained text marked. Nothing is added to the run."""
    if with_estimate:
        estimate(RunLayout(run), file, price, as_json=as_json)
        return
    if price is not None:
        raise UsageError("--price needs --estimate", where="--price", hint="Add --estimate.")
    from onward.views.preview import ROWS, lines_of, preview

    seen = preview(RunLayout(run), file, rows or (None if as_json and not worst else ROWS), worst=worst)
    if as_json:
        show_each(row.to_dict() for row in seen.rows())
    else:
        mark = marker(sys.stdout)
        for row in seen.rows():
            for line in lines_of(row, seen.report.unit, mark):
                show_line(line)
    say_previewed(seen)


def say_previewed(seen: Preview) -> None:
    """Print how much of a file was shown, and what training it will take."""
    report = seen.report
    long = report.lengths.words(seen.max_length) + (f", {seen.held_out} held out" if seen.held_out else "")
    notes = "".join(f"; {printable(note)}" for note in report.notes)
    share = f"{report.tokens} tokens, {report.target_tokens} of them trained"
    time = f", about {duration(seen.seconds)} at the last speed" if seen.seconds is not None else ""
    for line in seen.left_out:
        say(f"left out: {line}")
    bad = f"; {how_many(report.bad_rows, 'bad row')} left out" if report.bad_rows else ""
    say(
        f"{printable(seen.name)}: {len(seen.kept)} of {report.rows} rows shown{long}{bad}; {share}; "
        f"{how_many(seen.steps, 'step')}{time}{notes}"
    )


def estimate(layout: RunLayout, file: Path, price: float | None, *, as_json: bool) -> None:
    """Print what training a file will take."""
    say(f"taking a few steps of {quoted(file)} on a copy")
    with startup.large_imports():
        from onward.views.estimate import estimate

    found = estimate(layout, file, price)
    if as_json:
        show(found.to_dict())
        return
    total = f" of {size(found.memory_total_bytes)}" if found.memory_total_bytes else ""
    cost = f"; cost {found.cost:.4g}" if found.cost is not None else ""
    here = printable(found.device)
    show_line(
        f"{printable(found.name)}: about {duration(found.seconds)} for {how_many(found.steps, 'step')} on {here} "
        f"({found.tokens_per_second:.0f} tokens/s over {how_many(found.timed_steps, 'step')}); "
        f"memory {size(found.memory_bytes)}"
        f"{total}, in the step of {found.heaviest_tokens} tokens{cost}"
    )


def verify(
    run: RunOption = Path(),
    deep: Annotated[bool, typer.Option("--deep", help="Train again from the last boundary and compare.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the run's proof: files, hashes, steps, rows, handovers."""
    from onward.run import Run

    proof = Run(run, loading=startup.large_imports).verify(deep=deep)
    if as_json:
        show(proof.to_dict())
    else:
        for check in proof.checks:
            show_line(f"{'ok    ' if check.ok else 'FAILED'}  {check.name}: {printable_lines(check.detail)}")
    if not proof.ok:
        failed = ", ".join(check.name for check in proof.checks if not check.ok)
        say(f"not verified: {failed}")
        raise typer.Exit(5)


def doctor(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Find what on this machine or in the run would stop training."""
    with startup.large_imports():
        from onward.service.proof.doctor.examination import examine

    findings = examine(RunLayout(run))
    if as_json:
        show([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            show_line(f"{finding.level:<8}{printable(finding.subject)}: {printable_lines(finding.message)}")
            if finding.hint:
                show_line(f"        {printable_lines(finding.hint)}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
