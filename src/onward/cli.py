"""The command line: parse, call `Run`, print. Results go to stdout, messages for people to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from onward import __version__, startup
from onward.errors import ModelError, OnwardError, UsageError, printable_lines
from onward.layout import RunLayout
from onward.terminal import flush_results, open_standard_streams, say, show_line
from onward.text import printable, quoted

if TYPE_CHECKING:
    from onward.run import Run

app = typer.Typer(
    help="Cumulative fine-tuning: files arrive one after another, and every file continues the same run.",
    no_args_is_help=True,
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


def show(value: Any) -> None:
    """Print a result as JSON."""
    show_line(json.dumps(value, indent=2, ensure_ascii=False))


def say_stopped(run: Run, reason: str, command: str) -> None:
    """Say that a command ended because of a stop, what is committed by now, and which command goes on."""
    checkpoint = run.status()["checkpoint"]
    committed = f"{checkpoint} is committed" if checkpoint else "nothing is committed yet"
    say(f"stopped ({reason}); {committed}; onward {command} --run {quoted(run.layout.root)} goes on")


def completer(*states: str) -> Callable[[typer.Context, str], list[str]]:
    """Return what completes FILE by names of the run's files in some states, where a shell takes them as they are."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        from onward.store.ledger import Ledger

        run = Path(context.params.get("run") or os.environ.get("ONWARD_RUN") or ".")
        try:
            with Ledger(RunLayout(run).ledger, read_only=True) as ledger:
                names = [row.name for row in ledger.files(*states)]
        except (OnwardError, sqlite3.Error, OSError):
            return []
        return [name for name in names if name.startswith(incomplete) and quoted(name) == name]

    return complete


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Answer `--version`."""
    if show_version:
        show_line(f"onward {__version__}")
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
        place = quoted(made.layout.root)
        say(f"made the run {place}; next: onward train FILE... --run {place}")


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
    """Add files and train them in order, now; without files, train those that wait."""
    from onward.profiling import StepProfile
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.wishes import Wishes

    opened = Run(run, loading=startup.large_imports)
    stop = Wishes()
    with stop.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        steps = StepProfile(opened.layout.profile, observe)
        done = opened.train(*(files or []), again=again, observe=steps if profile else observe, stop=stop, report=say)
    if profile:
        steps.end()
        say(steps.describe())
    if as_json:
        show(done)
    if stop.reason:
        say_stopped(opened, stop.reason, "train")
    elif not done:
        say("nothing left to train: every accepted file is done")


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

    opened = Run(run, loading=startup.large_imports)
    accepted = opened.add(*files, priority=priority, again=again)
    max_length = opened.config.max_length
    if as_json:
        show(
            [
                {key: row[key] for key in ("name", "sha256", "rows", "tokens", "truncated", "dropped")}
                for row in accepted
            ]
        )
    for row in accepted:
        long = over_length(row["rows"], row["truncated"], row["dropped"], max_length)
        say(f"accepted {printable(row['name'])}: {row['rows']} rows{long}, {row['tokens']} tokens")
    if len(accepted) < len(files):
        count = len(files) - len(accepted)
        say(f"{count} {'was' if count == 1 else 'were'} in the stream already")


@app.command()
def watch(
    run: RunOption = Path(),
    once: Annotated[bool, typer.Option("--once", help="End when inbox and queue are empty.")] = False,
) -> None:
    """Train whatever arrives in inbox/, until stopped."""
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.wishes import Wishes

    opened = Run(run, loading=startup.large_imports)
    stop = Wishes()
    with stop.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        say(f"watching {quoted(opened.layout.inbox)}; onward stop --run {quoted(run)} or Ctrl-C commits and ends it")
        refused = opened.watch(once=once, observe=observe, stop=stop, report=say)
    if stop.reason:
        say_stopped(opened, stop.reason, "watch")
    elif once and refused:
        say(f"{refused} refused or quarantined; the reports are in {quoted(opened.layout.rejected)}")
        raise typer.Exit(3)


@app.command(hidden=True)
def check(run: RunOption = Path()) -> None:
    """Check the rows of files that arrived; a daemon starts this while it trains."""
    from onward.run import Run
    from onward.service.wishes import Wishes

    os.nice(10)
    stop = Wishes()
    with stop.on_signals():
        Run(run, loading=startup.large_imports).check_arrived(stop=stop)


@app.command()
def pause(
    run: RunOption = Path(),
    release: Annotated[bool, typer.Option("--release", help="Free the model's memory meanwhile.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Finish the current step, commit and wait."""
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
    after_file: Annotated[bool, typer.Option("--after-file", help="Finish the current file first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Commit and end the process that trains; the next start goes on in the same file."""
    from onward.run import Run

    answer(Run(run).stop(after_file=after_file), as_json)


@app.command()
def skip(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="A name, a position (4 or file:4) or a hash prefix; without it, the file in training.",
            autocompletion=completer("arriving", "queued", "training"),
        ),
    ] = None,
    run: RunOption = Path(),
    reason: Annotated[str | None, typer.Option("--reason", help="Kept in the ledger.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take a file out of the stream; the run is as if it had never begun it."""
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


@app.command()
def rollback(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FILE|STEP",
            help="A file (name, position, hash prefix) or a step; file:4 and step:4 say which is meant.",
            autocompletion=completer("done"),
        ),
    ],
    run: RunOption = Path(),
    requeue: Annotated[bool, typer.Option("--requeue", help="Queue the undone files again.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go back to the boundary after FILE; later files are marked undone."""
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    ask(f"go back to {printable(to)} and undo every later file of {quoted(opened.layout.root)}?", yes)
    result = opened.rollback(to, requeue=requeue)
    if as_json:
        show(result)
    say(f"back at step {result['global_step']}; undone: {_names(result['undone'])}")


@app.command()
def rebuild(
    without: Annotated[
        str,
        typer.Option(
            "--without",
            metavar="FILE",
            help="A name, a position (4 or file:4) or a hash prefix.",
            autocompletion=completer("training", "done"),
        ),
    ],
    run: RunOption = Path(),
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the run as if it had never seen FILE: train the later files again, from the boundary before it."""
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.wishes import Wishes

    opened = Run(run, loading=startup.large_imports)
    question = (
        f"go back to before {printable(without)} and train every later file of {quoted(opened.layout.root)} again?"
    )
    ask(question, yes)
    asked = Wishes()
    with asked.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        result = opened.rebuild(without, observe=observe, stop=asked, report=say)
    if as_json:
        show(result)
    if asked.reason:
        say_stopped(opened, asked.reason, "train")
    again = len(result["queued"])
    name = printable(result["without"])
    say(f"without {name}: step {result['global_step']}; trained again: {again} {'file' if again == 1 else 'files'}")


@app.command()
def service(
    run: RunOption = Path(),
    user: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Who runs it; by default you or, for root, the owner of the run's directory."
        ),
    ] = None,
) -> None:
    """Print a systemd unit that watches this run."""
    from onward.service.outside.unit import systemd_unit

    layout = RunLayout(run)
    layout.require()
    show_line(systemd_unit(layout.root, user).rstrip("\n"))


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
    place = quoted(adopted.layout.root)
    say(f"adopted step {step} into {place}; next: onward train FILE... --run {place}")


@app.command()
def reset(run: RunOption = Path(), yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Forget all progress: remove the model and its restore points, mark every file undone."""
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    ask(f"remove the model and all restore points of {quoted(opened.layout.root)}?", yes)
    result = opened.reset()
    if as_json:
        show(result)
    say(f"reset; undone: {_names(result['undone'])}. The originals stay in archive/")


@app.command()
def doctor(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Check this machine and run for what would stop training later."""
    from onward.service.proof.doctor import examine

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


def answer(text: str, as_json: bool) -> None:
    """Print what a control command was answered."""
    if as_json:
        show({"answer": text})
    else:
        say(text)


def _names(names: list[str]) -> str:
    return ", ".join(map(printable, names)) or "nothing"


def ask(question: str, yes: bool) -> None:
    """Ask before something is destroyed."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this destroys state, and there is no terminal to ask at", hint="Give --yes if you mean it.")
    typer.confirm(question, abort=True, err=True)


def main() -> NoReturn:
    """Run the command line; every refusal is a line and an exit status, never a traceback."""
    startup.set_environment()
    open_standard_streams()
    try:
        outcome = app(standalone_mode=False)
        flush_results()
    except CommandLineError as error:
        with contextlib.suppress(OSError, ValueError):
            error.show()
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        say("interrupted; what was committed is safe")
        sys.exit(1)
    except OnwardError as error:
        say(f"onward: {error}")
        sys.exit(error.exit_status)
    except sqlite3.DatabaseError as error:
        say(f"onward: the ledger cannot be used: {error}\n  onward doctor says more.")
        sys.exit(1)
    except OSError as error:
        say(f"onward: {error.strerror or error} [{error.filename or 'system'}]")
        say("  What was committed is safe; onward doctor says more.")
        sys.exit(1)
    if outcome == INTERRUPTED:
        say("interrupted; what was committed is safe")
        sys.exit(1)
    sys.exit(outcome if isinstance(outcome, int) else 0)
