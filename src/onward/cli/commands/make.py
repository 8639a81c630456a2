"""Commands that make a run: `init` from a base model, `adopt` from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import AdapterOption, JsonOption, ModelOption, RunOption, SetOption
from onward.cli.output import show
from onward.errors import ModelError, UsageError, first_line
from onward.layout import RunLayout
from onward.terminal import say
from onward.text import quoted


def init(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="The new run's directory.")] = None,
    run: RunOption = Path(),
    model: ModelOption = None,
    adapter: AdapterOption = None,
    settings: SetOption = None,
    later: Annotated[bool, typer.Option("--later", help="Prove the model at the first start instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove that a model trains correctly, and make a run of it."""
    from onward.config.text import parse_settings
    from onward.run import Run
    from onward.store.ledger import Ledger

    if directory is not None and run not in (directory, Path(), Path(os.environ.get("ONWARD_RUN", "."))):
        raise UsageError("two directories are given for the new run", where="DIR and --run", hint="Give one of them.")
    values = parse_settings(settings or [])
    if model is not None and "model" in values:
        raise UsageError("the model is given twice", where="--model and --set model=", hint="Give it once.")
    if model is not None:
        values["model"] = model
    if adapter is not None:
        values["adapter"] = str(adapter)
    if "model" in values and not values["model"]:
        raise UsageError(
            "the model has no name", where="model", hint="Give one, or leave --model out for smollm2-135m."
        )
    try:
        made = Run.create(directory or run, report=say, loading=startup.large_imports, later=later, **values)
    except ModelError as error:
        raise UsageError(
            error.what, where=error.where, hint=error.hint or "Choose another: --model NAME_OR_PATH"
        ) from None
    if not later:
        _say_memory(made.layout)
        _say_threads()
    if as_json:
        config = made.config.model_dump(mode="json")
        with Ledger(made.layout.ledger, read_only=True) as ledger:
            facts = {name: ledger.get(name) for name in ("admission", "memory")}
        show({"run": str(made.layout.root.absolute()), "config": config, **facts})
    else:
        place = quoted(made.layout.root)
        say(f"made the run {place}; next: onward train FILE... --run {place}")


def _say_memory(layout: RunLayout) -> None:
    """Measure and print the memory that a step takes; the run is made even if that cannot be measured."""
    with startup.large_imports():
        from onward.service.proof.memory import measure_memory, memory_in_words
    from onward.store.ledger import Ledger

    try:
        with Ledger(layout.ledger) as ledger:
            measure_memory(layout, ledger)
    except Exception as error:
        say(f"the memory of a step cannot be estimated: {first_line(error)}")
        return
    found = memory_in_words(layout)
    if found is not None:
        words, has_room = found
        say(f"memory: {words}" if has_room else f"memory: {words}; it may not be enough: onward doctor")


def _say_threads() -> None:
    """Say what a run's first file should wait for: later, another number of threads changes bits."""
    from onward.service.proof.doctor.machine import check_threads

    for finding in check_threads():
        say(f"{finding.message}. {finding.hint}")


def adopt(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of transformers' Trainer.")],
    run: RunOption = Path(),
    model: ModelOption = None,
    settings: SetOption = None,
    fresh_moments: Annotated[
        bool, typer.Option("--fresh-moments", help="Take only the weights; the optimizer starts with fresh moments.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a run from a Trainer's checkpoint, with moments and step."""
    from onward.config.text import parse_settings
    from onward.run import Run

    values = parse_settings(settings or [])
    adopted = Run.adopt(
        checkpoint, run, model, settings=values, fresh_moments=fresh_moments, report=say, loading=startup.large_imports
    )
    if as_json:
        show(adopted.status())
    step = adopted.status()["global_step"]
    place = quoted(adopted.layout.root)
    say(f"adopted step {step} into {place}; next: onward train FILE... --run {place}")
