"""Finds the committed state that is meant, and holds its files in a folder while they are read, whatever is trained.

`--at FILE|STEP|RELEASE` of every command ends up here. A state is the newest commit, the boundary after a file, a step
with a restore point, or a release. Its files are linked (or copied, if that is not possible) into a folder of the
reader's own, verified there, and removed when the reader is done, or by the next reader if one died.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Generator
from dataclasses import dataclass
from pathlib import Path

from onward.atomic import discard_tree, link_or_copy
from onward.errors import DamagedState, UsageError
from onward.layout import MANIFEST, RunLayout, entries, step_of
from onward.service.state.ownership import Ownership
from onward.service.state.reading import ATTEMPTS, find_newest, link_checkpoint, link_newest, newest_checkpoint
from onward.store.ledger import Ledger
from onward.store.lookup import FILE, STEP, find_step, states_named
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint
from onward.training.checkpoints.huggingface import FOR_TRAINING
from onward.views.locked import make_locked
from onward.views.releases import read_release

AT = "--at"
RELEASE = "release:"


@dataclass(frozen=True)
class Point:
    """A committed state of a run, held for reading.

    Args:
        folder: its files, which nobody changes or removes while it is held: a checkpoint, or a release.
        label: which state it is, in words: `step 9, after file 2 (b.jsonl)`. Printable only if names are.
        step: its global step; None for a release whose folder does not say it.
        manifest: the checkpoint's manifest, verified; None for a release without one.
        release: the release's name; None for a state of the run itself.
    """

    folder: Path
    label: str
    step: int | None
    manifest: Manifest | None
    release: str | None = None


@contextlib.contextmanager
def hold(layout: RunLayout, at: str | None = None) -> Generator[Point]:
    """Hold a committed state in the body, while other processes train, roll back or clean up.

    Files that are needed only for further training (moments and the like) are left out.

    Args:
        at: a file (name, position, hash prefix), a step or a release; `file:X`, `step:N` and `release:NAME` are
            unambiguous. None for the newest commit.

    Raises:
        UsageError: there is no such state, it is no longer kept, or `at` is ambiguous.
        DamagedState: it is not what was committed.
        Unreadable: a part of it cannot be read now.
    """
    layout.require()
    with own_folder(layout) as place:
        folder = place / "state"
        release = None if at is None else _release_meant(layout, at)
        if at is None:
            manifest = link_newest(layout, folder, left_out=FOR_TRAINING)
        elif release is not None:
            yield _hold_release(layout, release, folder)
            return
        else:
            manifest = _link_step(layout, at, folder)
        yield Point(folder, describe(layout, manifest), manifest.step, manifest)


def state_mark(layout: RunLayout, at: str | None = None) -> tuple[int, int]:
    """Return a mark of a state, unlike that of any other meant by the same words, such as a step trained again.

    It reads only where a manifest is stored, so that it can be asked for before every answer.

    Args:
        at: the state, as for `hold`.

    Raises:
        UsageError: there is no such state, or it is no longer kept.
    """
    for _ in range(ATTEMPTS):
        seen_at = _stated_by(layout, at)
        with contextlib.suppress(FileNotFoundError):  # it was replaced just now
            seen = seen_at.stat()
            return seen.st_ino, seen.st_mtime_ns
    raise DamagedState("the state is being replaced again and again", where=layout.current)


def describe(layout: RunLayout, manifest: Manifest) -> str:
    """Return, in words, which state of the run a checkpoint is."""
    cursor = manifest.cursor
    if cursor.position == 0:
        return f"step {manifest.step}, before the first file"
    with Ledger(layout.ledger, read_only=True) as ledger:
        row = ledger.at_position(cursor.position)
    name = f" ({row.name})" if row is not None and row.sha256 == cursor.sha256 else ""
    if cursor.at_boundary:
        return f"step {manifest.step}, after file {cursor.position}{name}"
    return f"step {manifest.step}, in file {cursor.position}{name}, step {cursor.step} of {cursor.steps}"


@contextlib.contextmanager
def own_folder(layout: RunLayout) -> Generator[Path]:
    """Give the body a folder of its own on the run's disk, where links to the run's files can be made.

    It is locked as long as the body runs; unlocked folders are those of readers that died, and are removed. Users who
    may not write in the run's directory get a folder among the system's temporary files.
    """
    made = _lockable(layout)
    if made is None:
        with tempfile.TemporaryDirectory(prefix="onward-") as name:
            yield Path(name)
        return
    folder, lock = made
    try:
        yield folder
    finally:
        discard_tree(folder)
        os.close(lock)


def _lockable(layout: RunLayout) -> tuple[Path, int] | None:
    """Make a folder below `cache/reading/` and lock it; None if that is not possible."""
    try:
        layout.reading.mkdir(parents=True, exist_ok=True)
        return make_locked(layout.reading, mode=0o700)
    except OSError:
        return None


def _release_meant(layout: RunLayout, at: str) -> str | None:
    """Return the name of the release that a text means; None if it means none.

    Raises:
        UsageError: there is no release with the name after `release:`, or a file or a step may be meant too.
    """
    names = [path.name for path in entries(layout.releases) if path.is_dir() and not path.name.startswith(".")]
    if at.startswith(RELEASE):
        name = at.removeprefix(RELEASE)
        if name not in names:
            hint = f"Releases: {', '.join(names) or 'none'}."
            raise UsageError(f"there is no release {name!r}", where=AT, hint=hint)
        return name
    if at not in names or at.startswith((FILE, STEP)):
        return None
    with Ledger(layout.ledger, read_only=True) as ledger:
        others = states_named(ledger, at, list(_kept_folders(layout, ledger)))
    if others:
        what = f"{at!r} is the name of a release, and a file or a step of the stream"
        hint = f"Say which one: {AT} {f', {AT} '.join(others)} or {AT} {RELEASE}{at}"
        raise UsageError(what, where=AT, hint=hint)
    return at


def _hold_release(layout: RunLayout, name: str, folder: Path) -> Point:
    source, manifest = layout.releases / name, None
    folder.mkdir()
    for path in entries(source):
        if path.is_file() and path.name not in FOR_TRAINING:
            link_or_copy(path, folder / path.name)
    if (folder / MANIFEST).is_file():
        found = inspect_checkpoint(folder, FOR_TRAINING)
        if found.verified is None:
            raise DamagedState(f"the release is not what was published: {'; '.join(found.problems)}", where=source)
        manifest = found.verified
    published = read_release(source)
    changed = published.changed(folder, FOR_TRAINING) if published else []
    if changed:
        raise DamagedState(
            f"the release is not what was published: {changed[0]} was changed",
            where=source,
            hint=f"Restore it from a copy, or make it again: onward releases --remove {name}; onward release {name}",
        )
    step = None if manifest is None else manifest.step
    return Point(folder, f"release {name}", step, manifest, release=name)


def _stated_by(layout: RunLayout, at: str | None) -> Path:
    """Return the manifest of a state, or the folder of a release, which may have none."""
    if at is None:
        return newest_checkpoint(layout) / MANIFEST
    release = _release_meant(layout, at)
    if release is not None:
        return layout.releases / release
    kept, step = _kept_states(layout, at)
    if step not in kept:
        raise _no_longer_kept(layout, step, kept)
    return kept[step] / MANIFEST


def _link_step(layout: RunLayout, at: str, folder: Path) -> Manifest:
    """Link and verify the state of a boundary, or the newest commit if its step is named."""
    kept, step = _kept_states(layout, at)
    found = link_checkpoint(kept[step], folder, left_out=FOR_TRAINING) if step in kept else None
    if found is None:
        raise _no_longer_kept(layout, step, kept)
    if found.verified is None:
        raise DamagedState(f"it is not what was committed: {'; '.join(found.problems)}", where=kept[step])
    return found.verified


def _kept_states(layout: RunLayout, at: str) -> tuple[dict[int, Path], int]:
    """Return the folders of all states that are kept, by step, and the step that is meant."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        kept = _kept_folders(layout, ledger)
        return kept, find_step(ledger, at, sorted(kept), AT)


def _kept_folders(layout: RunLayout, ledger: Ledger) -> dict[int, Path]:
    points = {step_of(point): point for point in Ownership(layout, ledger).restore_points()}
    newest = find_newest(layout, ledger.get("run"))
    return points if newest is None else {step_of(newest): newest, **points}


def _no_longer_kept(layout: RunLayout, step: int, kept: Collection[int]) -> UsageError:
    steps = ", ".join(map(str, sorted(kept))) or "none"
    hint = f"States of these steps are kept: {steps}. Give one as {AT} {STEP}N; keep_boundaries keeps more."
    return UsageError(f"the state of step {step} is no longer kept", where=layout.boundaries, hint=hint)
