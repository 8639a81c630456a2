"""Measures a kept state on everything in the grid, or on public tasks; the run is not changed."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml

from onward.config import Config, stored_config
from onward.errors import UsageError, first_line
from onward.layout import LEDGER, RunLayout
from onward.service.knowledge.evaluation import Evaluation
from onward.service.session import Session, open_session
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.text import printable
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.model.load import build_model, load_model
from onward.views.points import AT, Point, hold

HARNESS = "lm_eval"


@dataclass(frozen=True)
class _Kept:
    """A kept state: where it is, its manifest, and the last file that was trained in it, be it in part."""

    session: Session
    point: Point
    manifest: Manifest
    row: FileRow
    config: Config
    scratch: Path

    def described(self) -> dict[str, Any]:
        """Return which state it is, as JSON values: its step, the last file that was done there, both in words."""
        done = self.row.place if self.manifest.cursor.at_boundary else self.row.place - 1
        return {"step": self.manifest.step, "after": done, "at": self.point.label}


def measure(
    layout: RunLayout,
    at: str | None,
    report: Callable[[str], None] = lambda _: None,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure a kept state on every file of its stream, on the anchor and on `evaluation.files`, without a limit.

    Args:
        at: a step or a file, as for `rollback`; None for the last commit.
        look: called between two forward passes; may raise to give up.

    Raises:
        UsageError: there is no such state.
        DamagedState: it does not verify.
    """
    with _opened(layout, at, report) as kept:
        spec = replace(kept.session.spec, config=kept.config)
        model = build_model(spec, checkpoint=kept.point.folder, treatment=kept.session.treatment)
        evaluation = Evaluation(kept.session, look, samples=kept.scratch / "samples")
        found = evaluation.everything(model, kept.row, kept.config, kept.manifest.step)
        names = {key: (None, name) for key, name in found["names"].items()}
        stream = kept.session.ledger.in_stream(0, kept.row.place)
        names |= {row.sha256: (row.position, row.name) for row in stream}
    files = [
        {"position": names[key][0], "name": names[key][1], "sha256": key, **score}
        for key, score in found["model"].items()
    ]
    anchor = found["anchor"] and found["anchor"]["kl"]
    return {**kept.described(), "files": files, "anchor": anchor}


def measure_tasks(
    layout: RunLayout,
    at: str | None,
    tasks: Sequence[str],
    limit: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness (Gao et al.) on a kept state.

    Args:
        tasks: names that the harness knows, or `.yaml` files of custom tasks.
        limit: questions per task; None for all.

    Raises:
        UsageError: the harness is not installed, it knows no such task, or there is no such state.
    """
    if importlib.util.find_spec(HARNESS) is None:
        raise UsageError("--tasks needs lm-evaluation-harness", where="--tasks", hint="pip install 'onward[eval]'")
    with _opened(layout, at, report) as kept:
        session = kept.session
        model = load_model(kept.point.folder, session.base, session.device, session.dtype)
        results = _run_harness(model, session, tasks, limit)
    return {**kept.described(), "tasks": results}


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Return what was measured as lines."""
    lines = [printable(found["at"])]
    for file in found.get("files", ()):
        position = "" if file["position"] is None else f"{file['position']} "
        mark = " (trained rows)" if file["trained"] else ""
        lines.append(
            f"{position}{printable(file['name'])}: loss {file['loss']:.4f}, accuracy {file['accuracy']:.4f}{mark}"
        )
    if found.get("anchor") is not None:
        lines.append(f"anchor: {found['anchor']:.6f} nats per token from the base")
    for task, values in found.get("tasks", {}).items():
        shown = ", ".join(f"{printable(name)} {value:.4f}" for name, value in values.items())
        lines.append(f"{printable(task)}: {shown}")
    return lines


@contextlib.contextmanager
def _opened(layout: RunLayout, at: str | None, report: Callable[[str], None]) -> Generator[_Kept]:
    with hold(layout, at) as point, tempfile.TemporaryDirectory() as scratch, _copied(layout, Path(scratch)) as ledger:
        manifest = point.manifest
        if manifest is None:
            hint = f"onward releases --json has what was measured when it was made; {AT} STEP names a boundary."
            raise UsageError(f"{point.label} is not a state of the run", where=AT, hint=hint)
        row = ledger.at_position(manifest.cursor.position)
        if row is None:
            raise UsageError("nothing was trained in that state", where=AT, hint="Name a later one; see onward history")
        session = open_session(layout, ledger, report=report)
        then, files = stored_config(manifest.config), session.config.evaluation.files  # those of then may be gone
        yield _Kept(session, point, manifest, row, then.asking(files), Path(scratch))


@contextlib.contextmanager
def _copied(layout: RunLayout, scratch: Path) -> Generator[Ledger]:
    """Copy the ledger: measuring takes long, and files may be taken out of the stream meanwhile."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        ledger.copy_to(scratch / LEDGER)
    with Ledger(scratch / LEDGER) as copy:
        yield copy


def _run_harness(model: Any, session: Session, tasks: Sequence[str], limit: int | None) -> dict[str, dict[str, float]]:
    """Return the harness's numbers for each task, by the harness's names."""
    harness = cast(Any, importlib.import_module(HARNESS))
    models = cast(Any, importlib.import_module(f"{HARNESS}.models.huggingface"))
    known = cast(Any, importlib.import_module(f"{HARNESS}.tasks"))
    own = [Path(name) for name in tasks if name.endswith(".yaml")]
    for path in own:
        if not path.is_file():
            raise UsageError("there is no such file", where=path)
    manager = known.TaskManager(include_path=[str(path.parent.absolute()) for path in own] or None)
    names = [task_in(Path(name)) if name.endswith(".yaml") else name for name in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        hint = "lm-eval ls tasks lists them; give your own task as a file with its ending, .yaml."
        raise UsageError(f"lm-evaluation-harness knows no task {unknown[0]!r}", where="--tasks", hint=hint)
    wrapped = models.HFLM(pretrained=model, tokenizer=session.tokenizer, batch_size=8)
    found = harness.simple_evaluate(model=wrapped, tasks=names, limit=limit, task_manager=manager, log_samples=False)
    return {
        task: {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }


def task_in(path: Path) -> str:
    """Return the name that a file of the harness gives its group or task, which need not be that of the file.

    Raises:
        UsageError: the file is not YAML, or names none.
    """
    try:
        values = yaml.load(path.read_bytes(), _Untagged)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"it is not YAML: {first_line(error)}", where=path) from None
    keys = cast(dict[str, Any], values) if isinstance(values, dict) else {}
    name = next((keys[key] for key in ("group", "task") if isinstance(keys.get(key), str)), None)
    if name is None:
        raise UsageError("it names no task of lm-evaluation-harness", where=path, hint="Write into it: task: NAME")
    return name


class _Untagged(yaml.SafeLoader):
    """Reads files of the harness without its tags, such as `!function`, which name code."""


_Untagged.add_multi_constructor("!", lambda *_: None)
