"""Every path of a run's directory, in one place."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from onward.errors import DamagedState, Unreadable, UsageError
from onward.text import quoted

LEDGER = "ledger.sqlite3"
MANIFEST = "onward.json"
"""The file whose presence makes a directory a checkpoint; written last."""
CHECKPOINT_PREFIX = "checkpoint-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BOUNDARY = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"\.tmp-(?:removed-)?((?:checkpoint|step)-\d+)")
_LEFT = (
    ("", re.compile(r"\.tmp-ledger\.sqlite3(-wal|-shm|-journal)?")),
    ("current_model", re.compile(r"\.tmp-((removed-)?checkpoint-\d+|link-.+|shards)")),
    ("boundaries", re.compile(r"\.tmp-(removed-)?step-\d+")),
)
"""Temporary names of unfinished writes of a new ledger and of state, by folder of the run."""
_KEPT = re.compile(r"(?:archive|rejected)/([^/\0]+)")
_DROPPED = re.compile(r"(?:(?:high|low)/)?([^/\0]+)")


def typed_path(text: str) -> Path:
    """Return the path that a person typed: `~` and `~name` are home directories, if there are such users."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # the method of Path refuses unknown ones


def step_of(directory: Path) -> int:
    """Return the step in the name of a checkpoint or restore point (so 100 comes after 99, never by text)."""
    match = _CHECKPOINT.fullmatch(directory.name) or _BOUNDARY.fullmatch(directory.name)
    if match is None:
        raise ValueError(f"not the name of a checkpoint: {directory}")
    return int(match.group(1))


def unfinished_step(entry: Path) -> int | None:
    """Return the step of a checkpoint or restore point that is being written or removed under a temporary name."""
    match = _UNFINISHED.fullmatch(entry.name)
    return None if match is None else step_of(entry.with_name(match.group(1)))


def _named(pattern: re.Pattern[str], path: str) -> str:
    """Return a path below a folder of the run that the ledger names, if it has the form that Onward writes."""
    match = pattern.fullmatch(path)
    if match is None or match.group(1) in (".", ".."):
        raise DamagedState(
            f"the ledger names a file outside the directories where Onward keeps files: {path!r}",
            where="ledger.sqlite3",
            hint="Somebody changed the ledger. Restore it from a copy.",
        )
    return path


@dataclass(frozen=True)
class RunLayout:
    """The paths of the run in `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """`onward.yaml`, or `config.json` if only that exists."""
        yaml_file, json_file = self.root / "onward.yaml", self.root / "config.json"
        return json_file if json_file.exists() and not yaml_file.exists() else yaml_file

    @property
    def ledger(self) -> Path:
        """The durable record, `ledger.sqlite3`."""
        return self.root / LEDGER

    @property
    def unfinished_ledger(self) -> Path:
        """The ledger of a run that is being made."""
        return unfinished(self.ledger)

    @property
    def lock(self) -> Path:
        """Held by the one process that trains or rolls back."""
        return self.root / ".lock"

    @property
    def intake_lock(self) -> Path:
        """Held by a process that takes files in, which may happen while another trains."""
        return self.root / ".intake.lock"

    @property
    def track_lock(self) -> Path:
        """Held by the one process that reports the run to trackers."""
        return self.root / ".track.lock"

    @property
    def trackers(self) -> Path:
        """Files of trackers that were not configured to keep them elsewhere."""
        return self.root / "trackers"

    @property
    def inbox(self) -> Path:
        """Where files are dropped."""
        return self.root / "inbox"

    @property
    def archive(self) -> Path:
        """Originals of accepted files."""
        return self.root / "archive"

    @property
    def rejected(self) -> Path:
        """Refused files, each with its report."""
        return self.root / "rejected"

    def kept(self, copy: str) -> Path:
        """Return the path of a file's original, as its row in the ledger names it.

        Raises:
            DamagedState: the path is not a file of `archive/` or `rejected/`.
        """
        return self.root / _named(_KEPT, copy)

    def dropped(self, inbox: str) -> Path:
        """Return the path of a file of the inbox, as its row in the ledger names it.

        Raises:
            DamagedState: the path is not a file of the inbox.
        """
        return self.inbox / _named(_DROPPED, inbox)

    def tokenizer(self, base: Path) -> Path:
        """Return the folder with the run's tokenizer: the base's, unless an adopted checkpoint brought its own."""
        own = self.root / "tokenizer"
        return own if own.is_dir() else base

    @property
    def log(self) -> Path:
        """The log of the daemon, with its rotated parts next to it."""
        return self.root / "logs" / "onward.log"

    @property
    def profile(self) -> Path:
        """Where `train --profile` leaves its trace."""
        return self.root / "logs" / "profile"

    @property
    def cache(self) -> Path:
        """What can be recreated."""
        return self.root / "cache"

    @property
    def base_revision(self) -> Path:
        """In which folder of the hub's cache the base model is."""
        return self.cache / "base.json"

    @property
    def tokens(self) -> Path:
        """Tokenized files."""
        return self.cache / "tokens"

    @property
    def samples(self) -> Path:
        """Tokens of the rows that files are measured on."""
        return self.cache / "samples"

    @property
    def anchor(self) -> Path:
        """Texts that the base wrote."""
        return self.root / "anchor"

    @property
    def current(self) -> Path:
        """`current_model/`, which Hugging Face tools can load."""
        return self.root / "current_model"

    @property
    def boundaries(self) -> Path:
        """Restore points."""
        return self.root / "boundaries"

    @property
    def releases(self) -> Path:
        """Published models, each in a folder named after it."""
        return self.root / "releases"

    @property
    def reading(self) -> Path:
        """Folders in which other processes keep links to the files that they read."""
        return self.cache / "reading"

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.current / f"{CHECKPOINT_PREFIX}{step}"

    def boundary(self, step: int) -> Path:
        """Return the path of the restore point of a step."""
        return self.boundaries / f"step-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints in `current_model/`, newest step first."""
        return self._by_step(self.current, _CHECKPOINT)

    def restore_points(self) -> list[Path]:
        """Return the restore points in `boundaries/`, newest step first."""
        return self._by_step(self.boundaries, _BOUNDARY)

    def taken(self) -> list[Path]:
        """Return each path of a checkpoint or restore point at which, or at whose temporary name, there is anything."""
        named = ((self.current, _CHECKPOINT), (self.boundaries, _BOUNDARY))
        found = ((entry, pattern) for folder, pattern in named for entry in entries(folder))
        names = ((entry.with_name(entry.name.removeprefix(".tmp-")), pattern) for entry, pattern in found)
        return list(dict.fromkeys(path for path, pattern in names if pattern.fullmatch(path.name)))

    @property
    def shards(self) -> Path:
        """Where the shards of a model are written and merged; removed after each commit."""
        return self.current / ".tmp-shards"

    def temporaries(self) -> list[Path]:
        """Return what has the name of an interrupted write of state, whoever made it."""
        named = ((self.root / folder, pattern) for folder, pattern in _LEFT)
        return [entry for folder, pattern in named for entry in entries(folder) if pattern.fullmatch(entry.name)]

    def make(self) -> None:
        """Create the run's directories."""
        self.inbox.mkdir(parents=True, exist_ok=True)
        self.make_own()

    def make_own(self) -> None:
        """Recreate the directories that only the run writes to; the inbox may be a disk that is not mounted."""
        for directory in (self.archive, self.rejected, self.tokens, self.boundaries):
            directory.mkdir(parents=True, exist_ok=True)

    def require(self) -> None:
        """Refuse a directory that is not a run.

        Raises:
            UsageError: there is no ledger here.
            DamagedState: the ledger is gone, but what it records is still here.
        """
        if not self.ledger.is_file():
            if self.unfinished_ledger.exists():
                what = "no run yet: the command that makes one in this directory is at work, or was interrupted"
                hint = "Once it has ended, repeat it: onward init or onward adopt, with the same words."
                raise UsageError(what, where=self.root.absolute(), hint=hint)
            if self._newest_of_run() is not None or self.ledger.is_symlink():
                raise self.lost_ledger()
            hint = f"onward init {quoted(self.root)} makes one; --run DIR or ONWARD_RUN names another."
            raise UsageError("there is no run in this directory", where=self.root.absolute(), hint=hint)

    def lost_ledger(self) -> DamagedState:
        """Return the refusal for a ledger that was removed or replaced, with the way out."""
        if self.ledger.is_symlink() and not self.ledger.exists():
            hint = f"{LEDGER} is a link to a disk of the machine that owns the run: run this command there."
            what = f"the ledger is not on this machine: {self.ledger.readlink()}"
            return DamagedState(what, where=self.ledger.absolute(), hint=hint)
        what = "the ledger was removed or replaced"
        return DamagedState(what, where=self.ledger.absolute(), hint=self.way_without_ledger())

    def empty_ledger(self) -> DamagedState:
        """Return the refusal for an empty ledger, which cannot be the one that the run was made with."""
        hint = self.way_without_ledger()
        if self._newest_of_run() is None:
            hint += " If nothing was trained here: remove it, then onward init"
        return DamagedState("the ledger is empty", where=self.ledger.absolute(), hint=hint)

    def way_without_ledger(self) -> str:
        """Return what to do if the ledger cannot be used."""
        newest = self._newest_of_run()
        way = f" Without one, this makes a new run from the last commit: onward adopt {quoted(newest)} --run NEW_RUN"
        return f"Put {LEDGER} back from a copy.{way if newest else ''}"

    def _newest_of_run(self) -> Path | None:
        """Return the newest checkpoint or restore point that Onward made, by its step."""
        made = (folder for folder in (*self.checkpoints(), *self.restore_points()) if (folder / MANIFEST).is_file())
        return next(made, None)

    @staticmethod
    def _by_step(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
        named = (entry for entry in entries(directory) if pattern.fullmatch(entry.name))
        return sorted((entry for entry in named if _is_directory(entry)), key=step_of, reverse=True)


def unfinished(ledger: Path) -> Path:
    """Return the name that a ledger has until its run is made; a link leads to a disk of this machine."""
    final = ledger.resolve()
    return final.with_name(f".tmp-{final.name}")


def entries(directory: Path) -> list[Path]:
    """Return the entries of a directory, sorted by name; none if there is no such directory.

    Raises:
        Unreadable: the system refuses to list it now.
    """
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Unreadable.of(error, directory) from None


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unreadable.of(error, path) from None
