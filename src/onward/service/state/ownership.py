"""Which checkpoint directories a run made. Nothing else in its directory is ever removed or replaced."""

from __future__ import annotations

import filecmp
import os
import shlex
from pathlib import Path

from onward.errors import DamagedState, NotMadeHere, Unreadable
from onward.layout import RunLayout, entries, step_of
from onward.store.ledger import Ledger
from onward.text import quoted
from onward.training.checkpoints.checkpoint import remove_checkpoint, stated_origin
from onward.training.checkpoints.huggingface import OPTIMIZER, TRAINER_STATE


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
        """Return directories with the names of checkpoints or restore points that the run did not make."""
        return [
            folder for folder in (*self.layout.checkpoints(), *self.layout.restore_points()) if not self.made(folder)
        ]

    def require_present(self) -> None:
        """Refuse a run that has trained and whose state was removed: that may have been meant as a fresh start, or not.

        Raises:
            DamagedState: it was; the hint says what to do.
        """
        claimed = self.ledger.newest_checkpoint()
        if claimed and claimed.step > int(self.ledger.get("origin_step", 0)) and not entries(self.layout.current):
            raise DamagedState(
                f"current_model is gone, but the ledger claims {claimed.step} steps",
                where=self.layout.current,
                hint="onward rollback --to FILE restores a boundary; onward reset starts over, if you mean it.",
            )

    def require_same_moment(self) -> None:
        """Refuse a ledger that is older than the state it should describe, or that is another run's.

        Raises:
            DamagedState: it is; the hint says what to do.
        """
        last, begun = self.ledger.newest_checkpoint(), self.ledger.has_checkpoints()
        for folder in self.others():
            origin, step = stated_origin(folder), step_of(folder)
            is_later = origin == (self.run, step) and step > (last.step if last else -1)
            if is_later or (origin is not None and not begun):
                claim = f"ends at step {last.step}" if last else "knows of no checkpoint"
                raise DamagedState(
                    f"the ledger {claim}, but there is a checkpoint of step {step}: they are not from the same moment",
                    where=folder,
                    hint=way_out_of(folder),
                )

    def require_free(self, folder: Path) -> None:
        """Refuse to write where there is something that the run did not make.

        Raises:
            NotMadeHere: there is; the hint is the command that moves it away.
        """
        if os.path.lexists(folder) and not self.made(folder):
            source, aside = folder.absolute(), self._free_name(folder.name)
            kind = "directory" if folder.is_dir() else "file"
            raise NotMadeHere(
                f"this {kind} was not made by this run, but the next checkpoint needs its name",
                where=folder,
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


def way_out_of(folder: Path) -> str:
    """Return what to do about a checkpoint that is of a later moment than the ledger, or of another run."""
    return (
        "Restore ledger.sqlite3 from a copy of that moment. Without one, this makes a new run: "
        f"onward adopt {quoted(folder)} --run NEW_RUN"
    )


def _is_equal(path: Path, other: Path) -> bool:
    """Whether two names are one file or have the same content; False if one of them is missing."""
    try:
        return path.samefile(other) or filecmp.cmp(path, other, shallow=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
