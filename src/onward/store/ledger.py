"""The ledger: the durable record of the stream and of what became of each file (SQLite, write-ahead log)."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onward.atomic import fsync_directory
from onward.errors import OnwardError
from onward.layout import RunLayout, unfinished
from onward.store.curve import Curve
from onward.store.database import begin, connect, marks
from onward.store.files import BEGUN, Files
from onward.store.requests import Requests
from onward.store.rows import CheckpointRow, EventRow, FileRow, HandoverRow, StepRecord
from onward.store.tracking import Tracking
from onward.store.waiting import Waiting

HANDOVER = "h.id, h.kind, h.step, h.file_id, h.class AS name, h.before, h.after, h.difference, h.created"
PUT = "INSERT OR REPLACE INTO run VALUES (?, ?)"
PROOF = "verified"
"""The fact with the last proof: what `verify --json` prints, with `at` (seconds since the epoch), `step` and `deep`."""
HELD_OVER = "FROM handovers h LEFT JOIN files f ON f.id = h.file_id WHERE f.state IS NOT 'undone'"


def make_ledger(path: Path, **facts: Any) -> None:
    """Make a new run's ledger with these facts, whole or not at all; a link is followed."""
    with ledger_in_making(path) as ledger:
        ledger.put(**facts)


@contextlib.contextmanager
def ledger_in_making(path: Path) -> Generator[Ledger]:
    """Yield a new run's ledger under a temporary name; it gets its own once the body is done. A link is followed."""
    temporary = unfinished(path)
    remove_unfinished(path)
    with Ledger(temporary, create=True) as ledger:
        ledger.put(run=uuid.uuid4().hex, state="idle", origin_step=0)
        yield ledger
        ledger.flush()
    temporary.replace(path.resolve())
    fsync_directory(temporary.parent)


def remove_unfinished(path: Path) -> None:
    """Remove the ledger of a run that was not made completely, with the files of its log."""
    for ending in ("-wal", "-shm", "-journal", ""):
        temporary = unfinished(path)
        temporary.with_name(f"{temporary.name}{ending}").unlink(missing_ok=True)


@contextlib.contextmanager
def look_into(path: Path) -> Generator[Ledger]:
    """Open a ledger for a short look: all that the body reads is of one moment, and it writes nothing."""
    with Ledger(path, read_only=True) as ledger, ledger.one_moment():
        yield ledger


def put_soon(path: Path, waiting: Waiting, **facts: Any) -> None:
    """Set facts of the run without waiting for the disk; a crash of the machine may forget them.

    Raises:
        sqlite3.OperationalError: others write for too long; nothing was set.
    """
    with contextlib.closing(connect(path, durable=False, waiting=waiting)) as connection, connection:
        begin(connection, waiting)
        for key, value in facts.items():
            connection.execute(PUT, (key, json.dumps(value)))


class Ledger(Files, Requests, Curve, Tracking):
    """Reads the ledger and makes its legal moves. There is one writer of training state, and readers at any time."""

    _newest_event = 0

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_own_release(self) -> None:
        """Raise as `Database` does, and if the content was replaced by that of an older copy: events are never removed.

        Raises:
            DamagedState, Outdated: the process cannot go on with this file.
        """
        super().require_own_release()
        newest = self.last_event()
        if newest < self._newest_event:
            raise RunLayout(self.path.parent).lost_ledger()
        self._newest_event = newest

    # facts of the run

    def get(self, key: str, default: Any = None) -> Any:
        """Return a fact of the run."""
        value = self.scalar("SELECT value FROM run WHERE key = ?", key)
        return default if value is None else json.loads(value)

    def put(self, **facts: Any) -> None:
        """Set facts of the run."""
        with self.transaction():
            for key, value in facts.items():
                self.write(PUT, key, json.dumps(value))

    def keep_config(self, fingerprint: str, config: dict[str, Any]) -> None:
        """Store a config under its fingerprint."""
        self.write("INSERT OR IGNORE INTO configs VALUES (?, ?)", fingerprint, json.dumps(config))

    def config(self, fingerprint: str) -> dict[str, Any]:
        """Return the config with a fingerprint."""
        text = self.scalar("SELECT config FROM configs WHERE fingerprint = ?", fingerprint)
        if text is None:
            raise OnwardError("the ledger has no such config", where=fingerprint)
        return json.loads(text)

    def config_of(self, row: FileRow) -> dict[str, Any]:
        """Return the config that was in force when a file began."""
        assert row.config is not None, row.name
        return self.config(row.config)

    def quick_check(self) -> str:
        """Return the result of SQLite's own check: `ok`, or what is broken."""
        return str(self.scalar("PRAGMA quick_check"))

    # checkpoints

    def begin_checkpoint(self, **values: Any) -> int:
        """Record that a checkpoint is about to be written; this also makes the metrics before it durable."""
        return self.insert("checkpoints", {"state": "writing", "created": self.clock(), **values})

    def commit_checkpoint(self, checkpoint_id: int, *, size: int, seconds: float) -> None:
        """Record that a checkpoint is in place, and the totals of the steps before it."""
        with self.transaction():
            self.write(
                "UPDATE checkpoints SET state = 'committed', bytes = ?, seconds = ? WHERE id = ?",
                size, seconds, checkpoint_id,
            )  # fmt: skip
            (row,) = self.query("SELECT file_id, step FROM checkpoints WHERE id = ?", checkpoint_id)
            if row["file_id"] is not None:
                self.keep_ranges(row["file_id"], row["step"])

    def newest_checkpoint(self) -> CheckpointRow | None:
        """Return the committed checkpoint with the highest step."""
        return self.record(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE state = 'committed' ORDER BY step DESC, id DESC LIMIT 1",
        )

    def committed_step(self) -> int:
        """Return the step of the newest committed checkpoint, 0 if there is none."""
        newest = self.newest_checkpoint()
        return newest.step if newest else 0

    def checkpoint_created(self, step: int) -> float | None:
        """Return when the newest checkpoint of a step was begun, in seconds since the epoch; None if there is none."""
        return self.scalar("SELECT max(created) FROM checkpoints WHERE step = ?", step)

    def checkpoint_states(self, step: int) -> set[str]:
        """Return the states of all checkpoints that the run ever began at a step."""
        return {str(row["state"]) for row in self.query("SELECT state FROM checkpoints WHERE step = ?", step)}

    def state_digests(self, step: int) -> set[str]:
        """Return the digests of the states that a checkpoint of a step may hold: none that was undone, and of those
        committed or lost, the newest; one that is being written may or may not be in place.
        """
        rows = self.query("SELECT state, state_digest FROM checkpoints WHERE step = ? ORDER BY id", step)
        made = [str(row["state_digest"]) for row in rows if row["state"] in ("committed", "lost")]
        return {*made[-1:], *(str(row["state_digest"]) for row in rows if row["state"] == "writing")}

    def is_given_up(self, step: int) -> bool:
        """Whether the newest checkpoint of a step was lost to damage, and its steps are trained again."""
        sql = "SELECT state FROM checkpoints WHERE step = ? AND state != 'undone' ORDER BY id DESC LIMIT 1"
        return self.scalar(sql, step) == "lost"

    def has_checkpoints(self) -> bool:
        """Whether the run ever began a checkpoint."""
        return bool(self.scalar("SELECT EXISTS (SELECT 1 FROM checkpoints)"))

    def lost_digest(self, step: int, basis: str) -> str | None:
        """Return the state digest of a checkpoint at `step` that was lost to damage and had the same basis, if any."""
        return self.scalar(
            "SELECT state_digest FROM checkpoints WHERE step = ? AND basis = ? AND state = 'lost' ORDER BY id DESC",
            step,
            basis,
        )

    # what observers read

    def add_handover(self, **values: Any) -> int:
        """Record a handover; `name` is the class that held."""
        values = {"created": self.clock(), **values, "class": values["name"]}
        del values["name"]
        return self.insert("handovers", values)

    def handovers(self, file_id: int | None = None) -> list[HandoverRow]:
        """Return the handovers of a file, or all except those of undone files, in order."""
        if file_id is not None:
            return self.records(HandoverRow, f"SELECT {HANDOVER} FROM handovers h WHERE h.file_id = ?", file_id)
        return self.records(HandoverRow, f"SELECT {HANDOVER} {HELD_OVER}")

    def newest_handovers(self, limit: int) -> list[HandoverRow]:
        """Return the newest handovers except those of undone files, newest first."""
        return self.records(HandoverRow, f"SELECT {HANDOVER} {HELD_OVER} ORDER BY h.id DESC LIMIT ?", limit)

    def handover_classes(self) -> dict[str, int]:
        """Return how many handovers there are of each class, without those of undone files."""
        rows = self.query(f"SELECT h.class AS name, count(*) AS handovers {HELD_OVER} GROUP BY h.class")
        return {row["name"]: row["handovers"] for row in rows}

    def add_config_change(self, step: int, file_id: int, key: str, values: tuple[Any, Any]) -> None:
        """Record that a key changed at a boundary: `values` are the old and the new one."""
        old, new = map(json.dumps, values)
        self.insert(
            "config_changes",
            {"step": step, "file_id": file_id, "key": key, "old": old, "new": new, "created": self.clock()},
        )

    def add_event(self, level: str, message: str, step: int | None = None, *, kind: str | None = None) -> None:
        """Record what an operator should be able to read later; `notify.events` selects by `kind`."""
        text = message.encode(errors="backslashreplace").decode()
        self.insert("events", {"level": level, "message": text, "step": step, "created": self.clock(), "kind": kind})

    def keep_boundary_results(self, file_id: int, step: int, results: Mapping[str, Any]) -> None:
        """Record what hooks measured at the boundary after a file, by name, as JSON; its commit makes this durable."""
        with self.without_waiting(), self.transaction():
            for name, value in results.items():
                self.write(
                    "INSERT OR REPLACE INTO boundary_results VALUES (?, ?, ?, ?, ?)",
                    file_id, step, name, json.dumps(value), self.clock(),
                )  # fmt: skip

    def boundary_results(self, file_id: int) -> dict[str, Any]:
        """Return what hooks measured at the boundary after a file, by name."""
        rows = self.query("SELECT name, value FROM boundary_results WHERE file_id = ? ORDER BY name", file_id)
        return {row["name"]: json.loads(row["value"]) for row in rows}

    def results_naming(self, name: str, text: str, up_to: int) -> Iterator[Any]:
        """Yield the results of a name, of files of the stream up to a position, whose JSON contains a text."""
        sql = (
            "SELECT value FROM boundary_results JOIN files ON files.id = file_id "
            "WHERE boundary_results.name = ? AND position <= ? AND instr(value, ?) ORDER BY position"
        )
        for row in self.query(sql, name, up_to, text):
            yield json.loads(row["value"])

    def has_result(self, file_id: int, name: str) -> bool:
        """Return whether there is a result of this name for a file."""
        sql = "SELECT EXISTS (SELECT 1 FROM boundary_results WHERE file_id = ? AND name = ?)"
        return bool(self.scalar(sql, file_id, name))

    def tokens_of(self, file_id: int) -> int:
        """Return the tokens of all recorded steps of a file."""
        return int(self.scalar("SELECT coalesce(sum(tokens), 0) FROM steps WHERE file_id = ?", file_id))

    def events(self, limit: int = 20) -> list[EventRow]:
        """Return the newest events, oldest first."""
        return self.records(EventRow, "SELECT * FROM events ORDER BY id DESC LIMIT ?", limit)[::-1]

    def events_after(self, event_id: int) -> list[EventRow]:
        """Return the events recorded after one, oldest first."""
        return self.records(EventRow, "SELECT * FROM events WHERE id > ? ORDER BY id", event_id)

    def last_event(self) -> int:
        """Return the id of the newest event, 0 if there is none."""
        return int(self.scalar("SELECT coalesce(max(id), 0) FROM events"))

    def count_events(self, after: int, kinds: Iterable[str]) -> int:
        """Return how many events of these kinds were recorded after one."""
        wanted = tuple(kinds)
        return int(
            self.scalar(f"SELECT count(*) FROM events WHERE id > ? AND kind IN ({marks(wanted)})", after, *wanted)
        )

    def steps(self, file_id: int, first: int = 0) -> list[StepRecord]:
        """Return the step records of a file, from a global step on."""
        sql = "SELECT * FROM steps WHERE file_id = ? AND step >= ? ORDER BY step"
        return self.records(StepRecord, sql, file_id, first)

    def replayed_rows(self, file_id: int) -> list[tuple[int, str, int]]:
        """Return the replayed rows of a file's steps in order: step, SHA-256 of the row's file, index in it."""
        rows = self.query("SELECT step, sha256, row FROM replayed_rows WHERE file_id = ? ORDER BY step, place", file_id)
        return [(int(row["step"]), str(row["sha256"]), int(row["row"])) for row in rows]

    def last_steps(self, file_id: int, limit: int, up_to: int | None = None) -> list[StepRecord]:
        """Return the newest step records of a file, newest first, up to a global step if one is given."""
        query = "SELECT * FROM steps WHERE file_id = ? AND step <= coalesce(?, step) ORDER BY step DESC LIMIT ?"
        return self.records(StepRecord, query, file_id, up_to, limit)

    def count_trained(self, file_id: int) -> tuple[int, int]:
        """Return how many steps of a file were recorded, and how many rows they had."""
        row = self.query("SELECT count(*) AS n, coalesce(sum(rows), 0) AS rows FROM steps WHERE file_id = ?", file_id)[
            0
        ]
        return int(row["n"]), int(row["rows"])

    def count_steps(self, up_to: int) -> int:
        """Return how many steps of files of the stream were recorded up to a global step."""
        return int(
            self.scalar(
                f"SELECT count(*) FROM steps s JOIN files f ON f.id = s.file_id WHERE f.{BEGUN} AND s.step <= ?", up_to
            )
        )

    def count_trained_up_to(self, step: int) -> dict[str, int]:
        """Return what the steps of files of the stream trained up to a global step, as a state counts it."""
        sums = ("rows + s.replayed) AS rows", "tokens) AS tokens", "target_tokens) AS target_tokens")
        (row,) = self.query(
            f"SELECT {', '.join(f'total(s.{each}' for each in sums)} FROM steps s JOIN files f ON f.id = s.file_id"
            f" WHERE f.{BEGUN} AND s.step <= ?",
            step,
        )
        return {key: int(value) for key, value in row.items()}

    # going back

    def trim(self, step: int, file_ids: Sequence[int], checkpoint_state: str) -> None:
        """Forget these files' step records after `step`, and mark later checkpoints as lost or undone.

        A proof of what is undone is forgotten too: other steps may get the same numbers.
        The record of a checkpoint stays, because it shows that the run made the directory.
        """
        with self.transaction():
            if checkpoint_state == "undone":  # steps lost to damage are trained again, to the same bits
                self.add_rewind(step)
                if (self.get(PROOF) or {"step": step})["step"] > step:
                    self.put(**{PROOF: None})
            for file_id in file_ids:
                self.write("DELETE FROM steps WHERE file_id = ? AND step > ?", file_id, step)
                self.forget_ranges(file_id, step)
                self.write("DELETE FROM replayed_rows WHERE file_id = ? AND step > ?", file_id, step)
                self.write("DELETE FROM boundary_results WHERE file_id = ? AND step > ?", file_id, step)
            self.write(
                "UPDATE checkpoints SET state = ? WHERE step > ? AND state = 'committed'", checkpoint_state, step
            )
            self.write("UPDATE checkpoints SET state = 'undone' WHERE state = 'writing'")
