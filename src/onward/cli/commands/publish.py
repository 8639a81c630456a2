"""Commands that publish a run's model: `export`, `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import AtOption, JsonOption, RunOption
from onward.cli.output import show
from onward.layout import RunLayout
from onward.terminal import say
from onward.text import how_many, printable, quoted


def export(
    target: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A new folder; for gguf, also a new .gguf file.")],
    run: RunOption = Path(),
    at: AtOption = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="adapter, merged, gguf or ollama.",
            show_default="adapter; merged if all weights are trained",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16.", show_default="as trained, or that of the base; gguf: float16"
        ),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="For gguf and ollama: q8_0, q4_k_m or f16.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a committed state as files: adapter, merged, GGUF, Ollama. A model card is included."""
    layout = RunLayout(run)
    layout.require()
    with startup.large_imports():
        from onward.views.export.export import Wanted
        from onward.views.export.export import export as write

    result = write(layout, Wanted(target, file_format, at, dtype, quantize), say)
    if as_json:
        show(result)
    files = f"{how_many(len(result['files']), 'file')}, {sum(result['files'].values()) / 1e6:.1f} MB"
    say(f"exported {printable(result['at'])} to {quoted(target)}: {files}")


def push(
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub.")],
    run: RunOption = Path(),
    at: AtOption = None,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="As for export.", show_default="adapter; merged if all weights are trained"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is created now.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a committed state and upload it to a hub. The token is that of `hf auth login`, or HF_TOKEN."""
    layout = RunLayout(run)
    layout.require()
    with startup.large_imports():
        from onward.views.export.push import push as upload

    result = upload(layout, repository, at=at, file_format=file_format, private=private, report=say)
    if as_json:
        show(result)
    say(f"pushed {printable(result['at'])} to {printable(result['url'])}")
