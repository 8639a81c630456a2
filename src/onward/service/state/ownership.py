"""Which checkpoint directories a run made. Nothing else in its directory is ever removed or replaced."""

from __future__ import annotations

import filecmp
import os
import re
import shlex
from pathlib import Path

from onward.atomic import TEMPORARY_PREFIX, is_own_folder
from onward.errors import NotMadeHere, Unreadable
from onward.layout import RunLayout, entries, step_of, unfinished_step
from onward.stated import stated_origin
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import remove_checkpoint
from onward.training.checkpoints.huggingface import OPTIMIZER, TRAINER_STATE

_IN_SHARDS = re.compile(r"(\.tmp-)?state|.+\.safetensors")
"""Names in the folder in which shards are written and merged."""


class Ownership:
    """Distinguishes the directories of a run from those that others put there.

    A directory belongs to the run if the ledger has a checkpoint of that step and the manifest names the run.
    """

    def __init__(self, layout: RunLayout, ledger: Ledger) -> None:
        self.layout = layout
        self.ledger = ledger
        self.run: str | None = ledger.get("run")

    def made(self, folder: Path) -> bool:
        """Return whether the run made a directory that has the name of a checkpoint or a restore point.

        Raises:
            Unreadable: the manifest cannot be read now, so nothing is known.
        """
        step = step_of(folder)
        states = self.ledger.checkpoint_states(step)
        if not states:
            return False
        origin = stated_origin(folder)
        if origin is None:  # only at a step of the ledger, now or before damage: other programs write none
            expected = folder == self.layout.checkpoint(step) and step >= self.ledger.committed_step()
            return expected and bool(states & {"committed", "lost"}) and self._holds_files_of_run(folder)
        return origin in ((self.run, step), (None, None))

    def _holds_files_of_run(self, folder: Path) -> bool:
        """Whether a directory that lost its manifest is empty, or holds state that the run also has elsewhere."""
        places = (self.layout.current, self.layout.boundary(step_of(folder)))
        try:
            return not entries(folder) or any(
                _is_equal(folder / name, place / name) for name in (OPTIMIZER, TRAINER_STATE) for place in places
            )
        except OSError as error:
            raise Unreadable.of(error, folder) from None

    def checkpoints(self) -> list[Path]:
        """Return the run's own checkpoints in `current_model/`, newest step first."""
        return [folder for folder in self.layout.checkpoints() if self.made(folder)]

    def restore_points(self) -> list[Path]:
        """Return the run's own restore points, newest step first."""
        return [folder for folder in self.layout.restore_points() if self.made(folder)]

    def restore_steps(self) -> list[int]:
        """Return the steps of the run's own restore points, newest first."""
        return [step_of(folder) for folder in self.restore_points()]

    def others(self) -> list[Path]:
        """Return what has the name of a checkpoint, a restore point or an interrupted write, and is not the run's."""
        folders = (*self.layout.checkpoints(), *self.layout.restore_points())
        unfinished = [entry for entry in self.layout.temporaries() if not self.left(entry)]
        return [*(folder for folder in folders if not self.made(folder)), *unfinished]

    def left(self, entry: Path) -> bool:
        """Return whether an interrupted write of the run left an entry with a temporary name.

        The ledger has every step at which the run began a checkpoint, before anything was written.
        """
        step = unfinished_step(entry)
        if step is not None:
            return bool(self.ledger.checkpoint_states(step))
        if entry == self.layout.shards:
            return is_own_folder(entry, _IN_SHARDS.fullmatch)
        if entry.is_symlink() or not entry.is_file():
            return False
        name = entry.name.removeprefix(f"{TEMPORARY_PREFIX}link-")
        return entry.parent == self.layout.root or any((folder / name).is_file() for folder in self._own())

    def _own(self) -> list[Path]:
        return [*self.checkpoints(), *self.restore_points()]

    def require_free(self, folder: Path) -> None:
        """Refuse to write where there is something that the run did not make.

        Raises:
            NotMadeHere: there is; the hint is the command that moves it away.
        """
        unfinished = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
        for place, is_own in ((folder, self.made), (unfinished, self.left)):
            if not os.path.lexists(place) or is_own(place):
                continue
            source, aside = place.absolute(), self._free_name(place.name)
            kind = "directory" if place.is_dir() else "file"
            raise NotMadeHere(
                f"this {kind} was not made by this run, but the next checkpoint needs its name",
                where=place,
                hint=f"Move it away, then start again: mv {shlex.quote(str(source))} {shlex.quote(str(aside))}",
            )

    def require_room(self, first: int, last: int) -> None:
        """Refuse to train towards a boundary if something that the run did not make has the name of a commit.

        A stop commits at any step, so any of these names may be needed.

        Args:
            first: the first step that may be committed.
            last: the step of the boundary.

        Raises:
            NotMadeHere: there is; the hint is the command that moves it away.
        """
        for place in self.layout.taken():
            step = step_of(place)
            if step == last or (first <= step < last and place.parent == self.layout.current):
                self.require_free(place)

    def remove(self, folder: Path, *, is_own: bool = False) -> bool:
        """Remove a directory of the run atomically; return whether there was one. Others are left alone.

        Args:
            is_own: whether it was found to be the run's before, by files that have changed since.
        """
        if not os.path.lexists(folder) or not (is_own or self.made(folder)):
            return False
        remove_checkpoint(folder, run=str(self.run), recorded=True)
        return True

    def _free_name(self, name: str) -> Path:
        """Return a free path for it in the run's directory, where Onward ignores such names."""
        root = self.layout.root.absolute()
        names = [f"moved-{name}", *(f"moved-{name}-{number}" for number in range(2, 100))]
        return next(root / free for free in names if not os.path.lexists(root / free))


def _is_equal(path: Path, other: Path) -> bool:
    """Whether two names are one file or have the same content; False if one of them is missing."""
    try:
        return path.samefile(other) or filecmp.cmp(path, other, shallow=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
