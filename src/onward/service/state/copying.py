"""A copy of a run as it was at one of its boundaries; what is tried on the copy never touches the run.

Everything large is linked, not copied. The process that owns the run may train it meanwhile: the copy reads the ledger
as of one moment, and linked files stay as they are, since Onward replaces files and never changes them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from onward.atomic import link_or_copy, link_tree
from onward.config import Config
from onward.config.text import read_config, render_yaml
from onward.data.templates.own_template import read_template, write_template
from onward.errors import DamagedState, UsageError
from onward.layout import RunLayout, entries
from onward.service.state.ownership import Ownership
from onward.service.state.reading import verified_point
from onward.service.state.retention import Retention
from onward.service.state.rollback import move_ledger_back, undone
from onward.service.state.settle import Settlement
from onward.store.files import BEGUN_STATES, HELD
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.training.model.base import OWN_ADAPTER, OWN_BASE

PARTS = (OWN_BASE, OWN_ADAPTER, "tokenizer", "anchor")
"""Folders of a run that are part of what it is; they never change."""

UNTOLD = {"notify", "track"}
"""Keys that a copy does without: those notified of the run are not notified of what is tried on a copy."""


def copy_run(layout: RunLayout, target: Path, step: int) -> RunLayout:
    """Make `target` a run of its own: this one as it was at a restore point, with its later files queued again.

    Files that wait in the run are not copied. The copy has the run's identity, so that its checkpoints belong to the
    same run, and is trained by the process that made it.

    Args:
        target: a directory that does not exist yet, on the run's disk if links should be possible.
        step: the step of a restore point.

    Raises:
        UsageError: the restore point is no longer kept.
        DamagedState: it does not verify.
        Unreadable: something cannot be read now.
    """
    copy = RunLayout(target)
    target.mkdir(parents=True)
    copy.make()
    _link_state(layout, copy, step)
    with Ledger(layout.ledger, read_only=True) as ledger:
        ledger.copy_to(copy.ledger)
    _link_parts(layout, copy)
    _write_config(layout, copy, read_config(layout.config))
    with Ledger(copy.ledger) as ledger:
        _link_originals(layout, copy, ledger.files(*HELD))
        _go_back(copy, ledger, step)
    return copy


def _link_state(layout: RunLayout, copy: RunLayout, step: int) -> None:
    folder = layout.boundary(step)
    try:
        link_tree(folder, copy.boundary(step))
    except FileNotFoundError:
        hint = "onward status names those that are; keep_boundaries in the config keeps more."
        raise UsageError(f"the restore point of step {step} is no longer kept", where=folder, hint=hint) from None


def _link_parts(layout: RunLayout, copy: RunLayout) -> None:
    for name in PARTS:
        if (layout.root / name).is_dir():
            shutil.copytree(layout.root / name, copy.root / name, copy_function=_link)
    tokenizer = layout.cache / "tokenizer"
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, copy.cache / "tokenizer")
    if layout.base_revision.is_file():
        shutil.copyfile(layout.base_revision, copy.base_revision)
    for folder in entries(layout.tokens):
        with contextlib.suppress(OSError):  # removed meanwhile: recreated if needed
            link_tree(folder, copy.tokens / folder.name)


def _link(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


def _write_config(layout: RunLayout, copy: RunLayout, config: Config) -> None:
    plain = config.model_copy(update={name: Config.model_fields[name].default for name in UNTOLD})
    plain = plain.asking([str((layout.root / file).absolute()) for file in config.evaluation.files])
    template = read_template(config.chat_template, layout.root)
    if template is not None:
        write_template(config.chat_template, template, copy.root)
    copy.config.write_text(render_yaml(plain), encoding="utf-8")


def _link_originals(layout: RunLayout, copy: RunLayout, rows: Sequence[FileRow]) -> None:
    """Link the accepted originals; one that was compressed meanwhile is found under its new name."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        for row in rows:
            now = ledger.find(row.id) or row
            for source in {layout.kept(row.copy), layout.kept(now.copy)}:
                if source.is_file():
                    link_or_copy(source, copy.root / source.relative_to(layout.root))


def _go_back(copy: RunLayout, ledger: Ledger, step: int) -> None:
    ownership = Ownership(copy, ledger)
    if copy.boundary(step) not in ownership.restore_points():
        raise DamagedState("the restore point does not belong to this run", where=copy.boundary(step))
    point = verified_point(copy.boundary(step))
    for row in ledger.files("arriving"):
        ledger.move_file(row.id, "skipped")
    position = point.cursor.position
    begun = [row for row in ledger.in_stream(position) if row.state in BEGUN_STATES]
    moves = undone(begun, queued_after=position, with_config=True) + undone(ledger.files("queued"))
    move_ledger_back(ledger, step, moves, f"a copy that begins at step {step}")
    Settlement(copy, ledger, Retention(len(begun) + 1, 0)).go_to(point)
