"""The command line: parse, call `Run`, print. Results go to stdout, messages for people to stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

from onward import __version__
from onward.errors import ModelError, OnwardError, UsageError
from onward.layout import RunLayout

app = typer.Typer(
    help="Cumulative fine-tuning: files arrive one after another, and every file continues the same run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or config, 3 a file was rejected, 4 the run is locked, "
    "5 verification failed.",
)
CommandLineError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
"""click's `ClickException`, be it click's own or of the copy of click inside typer."""
REFRESH_SECONDS = 1.0
INTERRUPTED = 130
"""What typer makes of a second Ctrl-C."""

RunOption = Annotated[
    Path, typer.Option("--run", envvar="ONWARD_RUN", help="The run's directory.", show_default="current directory")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A config key, dotted: lora.rank=8. Repeatable.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Hugging Face name, path, or smollm2-135m.")]
AgainOption = Annotated[bool, typer.Option("--again", help="Accept content that the stream already has.")]


def say(message: str) -> None:
    """Print a line for a person; a terminal that is a file on a full disk is no reason to end otherwise."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def show(value: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Answer `--version`."""
    if show_version:
        print(f"onward {__version__}")
        raise typer.Exit


@app.command()
def init(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="The new run's directory.")] = None,
    run: RunOption = Path(),
    model: ModelOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run."""
    from onward.config import parse_settings
    from onward.run import Run

    values = parse_settings(settings or [])
    if model is not None and "model" in values:
        raise UsageError("the model is named twice", where="--model and --set model=", hint="Name it once.")
    if model is not None:
        values["model"] = model
    if "model" in values and not values["model"]:
        raise UsageError("the model has no name", where="model", hint="Name it, or leave --model out: smollm2-135m.")
    try:
        made = Run.create(directory or run, report=say, **values)
    except ModelError as error:
        raise UsageError(
            error.what, where=error.where, hint=error.hint or "Name another: --model NAME_OR_PATH"
        ) from None
    if as_json:
        show({"run": str(made.layout.root.absolute()), "config": made.config.model_dump(mode="json")})
    else:
        say(f"made the run {made.layout.root}; next: onward train FILE... --run {made.layout.root}")


@app.command()
def train(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Training files, in order.")] = None,
    run: RunOption = Path(),
    again: AgainOption = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile the first steps: a trace for Perfetto, the top costs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add files and train them in order, now; without files, go on with what the stream owes."""
    from onward.profiling import StepProfile
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.stop import StopRequest

    opened = Run(run)
    stop = StopRequest()
    with stop.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        steps = StepProfile(opened.layout.profile, observe)
        done = opened.train(*(files or []), again=again, observe=steps if profile else observe, stop=stop, report=say)
    if profile:
        steps.end()
        say(steps.describe())
    if as_json:
        show(done)
    if stop:
        say(f"stopped ({stop.reason}), committed; onward train --run {run} goes on")
    elif not done:
        say("the stream owes nothing: every accepted file is trained")


@app.command()
def add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Training files, in order.")],
    run: RunOption = Path(),
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check files and put them in the stream."""
    from onward.progress import over_length
    from onward.run import Run

    accepted = Run(run).add(*files, priority=priority, again=again)
    if as_json:
        show(
            [
                {key: row[key] for key in ("name", "sha256", "rows", "tokens", "truncated", "dropped")}
                for row in accepted
            ]
        )
    for row in accepted:
        long = over_length(row["truncated"], row["dropped"])
        say(f"accepted {row['name']}: {row['rows']} rows{long}, {row['tokens']} tokens")
    if len(accepted) < len(files):
        say(f"{len(files) - len(accepted)} were in the stream already")


@app.command()
def watch(
    run: RunOption = Path(),
    once: Annotated[bool, typer.Option("--once", help="End when inbox and queue are empty.")] = False,
) -> None:
    """Train whatever arrives in inbox/, until stopped."""
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.stop import StopRequest

    opened = Run(run)
    stop = StopRequest()
    with stop.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        say(f"watching {opened.layout.inbox}; onward stop --run {run} or Ctrl-C ends it, committed")
        refused = opened.watch(once=once, observe=observe, stop=stop, report=say)
    if stop:
        say(f"stopped ({stop.reason}), committed; onward watch --run {run} goes on")
    elif once and refused:
        say(f"{refused} refused or quarantined; the reports are in {opened.layout.rejected}")
        raise typer.Exit(3)


@app.command(hidden=True)
def check(run: RunOption = Path()) -> None:
    """Check the rows of files that arrived; a daemon lets this be done beside its steps."""
    from onward.run import Run
    from onward.service.stop import StopRequest

    os.nice(10)
    stop = StopRequest()
    with stop.on_signals():
        Run(run).check_arrived(stop=stop)


@app.command()
def pause(
    run: RunOption = Path(),
    release: Annotated[bool, typer.Option("--release", help="Give the model's memory back meanwhile.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Finish the step, commit and hold still."""
    from onward.run import Run

    answer(Run(run).pause(release=release), as_json)


@app.command()
def resume(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Go on after a pause."""
    from onward.run import Run

    answer(Run(run).resume(), as_json)


@app.command()
def stop(
    run: RunOption = Path(),
    after_file: Annotated[bool, typer.Option("--after-file", help="Finish the file in hand first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Commit and end the process that trains; the file goes on at the next start."""
    from onward.run import Run

    answer(Run(run).stop(after_file=after_file), as_json)


@app.command()
def skip(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A waiting file; without it, the one in hand.")
    ] = None,
    run: RunOption = Path(),
    reason: Annotated[str | None, typer.Option("--reason", help="Kept in the ledger.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take a file out of the stream, back at the boundary before it."""
    from onward.run import Run

    answer(Run(run).skip(file, reason=reason), as_json)


@app.command()
def status(
    run: RunOption = Path(),
    keep_showing: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show step, file, queue, loss, learning rate, ETA, disk and what happened last."""
    from onward.status import read_status, recent_events

    layout = RunLayout(run)
    if as_json:
        show(read_status(layout))
        return
    from onward.progress import print_status, status_lines, watch_status

    if keep_showing:
        watch_status(lambda: status_lines(read_status(layout), recent_events(layout)), REFRESH_SECONDS)
    print_status(read_status(layout), recent_events(layout))


@app.command()
def history(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Show one row per file: rows, steps, loss, learning rate, handover, time."""
    from onward.status import read_history

    entries = read_history(RunLayout(run))
    if as_json:
        show(entries)
        return
    from onward.progress import print_history

    print_history(entries)


@app.command()
def verify(
    run: RunOption = Path(),
    deep: Annotated[bool, typer.Option("--deep", help="Train again from the last boundary and compare.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the run's proof: files, hashes, counters, rows, learning rates, handovers."""
    from onward.run import Run

    proof = Run(run).verify(deep=deep)
    if as_json:
        show(proof.to_dict())
    else:
        for check in proof.checks:
            print(f"{'ok    ' if check.ok else 'FAILED'}  {check.name}: {check.detail}")
    if not proof.ok:
        failed = ", ".join(check.name for check in proof.checks if not check.ok)
        say(f"not verified: {failed}")
        raise typer.Exit(5)


@app.command()
def rollback(
    to: Annotated[
        str, typer.Option("--to", metavar="FILE|STEP", help="A file (name, position, hash prefix) or a step.")
    ],
    run: RunOption = Path(),
    requeue: Annotated[bool, typer.Option("--requeue", help="Queue the undone files again.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go back to the boundary after FILE; later files are marked undone."""
    from onward.run import Run

    opened = Run(run)
    ask(f"go back to {to} and undo every later file of {opened.layout.root}?", yes)
    result = opened.rollback(to, requeue=requeue)
    if as_json:
        show(result)
    say(f"back at step {result['global_step']}; undone: {', '.join(result['undone']) or 'nothing'}")


@app.command()
def rebuild(
    without: Annotated[str, typer.Option("--without", metavar="FILE", help="A name, position or hash prefix.")],
    run: RunOption = Path(),
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the run as if it had never seen FILE: train the later files again, from the boundary before it."""
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.stop import StopRequest

    opened = Run(run)
    ask(f"go back to before {without} and train every later file of {opened.layout.root} again?", yes)
    asked = StopRequest()
    with asked.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        result = opened.rebuild(without, observe=observe, stop=asked, report=say)
    if as_json:
        show(result)
    if asked:
        say(f"stopped ({asked.reason}), committed; onward train --run {run} goes on")
    say(f"without {result['without']}: step {result['global_step']}; trained again: {len(result['queued'])} files")


@app.command()
def service(run: RunOption = Path()) -> None:
    """Print a systemd unit that watches this run."""
    from onward.service.outside.unit import systemd_unit

    layout = RunLayout(run)
    layout.require()
    print(systemd_unit(layout.root), end="")


@app.command()
def adopt(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of transformers' Trainer.")],
    run: RunOption = Path(),
    model: ModelOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run from a Hugging Face Trainer checkpoint, moments and step included."""
    from onward.config import parse_settings
    from onward.run import Run

    adopted = Run.adopt(checkpoint, run, model, settings=parse_settings(settings or []), report=say)
    if as_json:
        show(adopted.status())
    step = adopted.status()["global_step"]
    say(f"adopted step {step} into {adopted.layout.root}; next: onward train FILE... --run {adopted.layout.root}")


@app.command()
def reset(run: RunOption = Path(), yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Forget all progress: remove the model and its restore points, mark every file undone."""
    from onward.run import Run

    opened = Run(run)
    ask(f"remove the model and all restore points of {opened.layout.root}?", yes)
    result = opened.reset()
    if as_json:
        show(result)
    say(f"reset; undone: {', '.join(result['undone']) or 'nothing'}. The originals stay in archive/")


@app.command()
def doctor(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Say what this machine and run lack, before it matters."""
    from onward.service.proof.doctor import examine

    findings = examine(RunLayout(run))
    if as_json:
        show([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            print(
                f"{finding.level:<8}{finding.subject}: {finding.message}"
                + (f"\n        {finding.hint}" if finding.hint else "")
            )
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def answer(text: str, as_json: bool) -> None:
    """Print what a control command was answered."""
    if as_json:
        show({"answer": text})
    else:
        say(text)


def ask(question: str, yes: bool) -> None:
    """Ask before something is destroyed."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this destroys state and nobody is here to ask", hint="Say --yes if you mean it.")
    typer.confirm(question, abort=True, err=True)


def main() -> NoReturn:
    """Run the command line; every refusal is a line and an exit status, never a traceback."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other burn a core that other work on this machine may want: then a step took
        # up to 100 times longer. Read by libgomp when torch is loaded; the bits are the same.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        outcome = app(standalone_mode=False)
        sys.stdout.flush()
    except CommandLineError as error:
        error.show()
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        say("interrupted; what was committed stays")
        sys.exit(1)
    except OnwardError as error:
        say(f"onward: {error}")
        sys.exit(error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except sqlite3.DatabaseError as error:
        say(f"onward: the ledger cannot be used: {error}\n  onward doctor looks closer.")
        sys.exit(1)
    except OSError as error:
        say(f"onward: {error.strerror or error} [{error.filename or 'system'}]")
        say("  What was committed stays; onward doctor looks closer.")
        sys.exit(1)
    if outcome == INTERRUPTED:
        say("interrupted; what was committed stays")
        sys.exit(1)
    sys.exit(outcome if isinstance(outcome, int) else 0)
