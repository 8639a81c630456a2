"""Requests to the owner of a run, and the files that commands were given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from onward.store.database import Database
from onward.store.rows import IntentRow, RequestRow


class Requests(Database):
    """Reads, records and answers requests."""

    def add_request(self, kind: str, argument: str | None = None, file_id: int | None = None) -> int:
        """Record a request of an operator to the process that owns the run; return its id."""
        values = {"kind": kind, "argument": argument, "file_id": file_id, "created": self.clock()}
        return self.insert("requests", values)

    def request(self, request_id: int) -> RequestRow | None:
        """Return a request."""
        return self.record(RequestRow, "SELECT * FROM requests WHERE id = ?", request_id)

    def open_requests(self) -> list[RequestRow]:
        """Return the requests that are not answered yet, oldest first."""
        return self.records(RequestRow, "SELECT * FROM requests WHERE acknowledged IS NULL ORDER BY id")

    def last_request(self) -> int:
        """Return the id of the newest request, 0 if there is none."""
        return int(self.scalar("SELECT coalesce(max(id), 0) FROM requests"))

    def acknowledge(self, request_id: int, answer: str) -> None:
        """Answer a request unless it has an answer already."""
        self.write(
            "UPDATE requests SET acknowledged = ?, answer = ? WHERE id = ? AND acknowledged IS NULL",
            self.clock(),
            answer,
            request_id,
        )

    def add_intent(self, paths: Sequence[Path], *, again: bool, priority: int) -> int:
        """Record which files a command was given, before any of them is read; return the intent's id."""
        names = json.dumps([str(path.absolute()) for path in paths])
        return self.insert(
            "intents", {"paths": names, "again": int(again), "priority": priority, "created": self.clock()}
        )

    def intents(self) -> list[IntentRow]:
        """Return the commands that ended before their files were taken in, oldest first."""
        return self.records(IntentRow, "SELECT * FROM intents ORDER BY id")

    def end_intent(self, intent_id: int) -> None:
        """Forget a command whose files were taken in or refused."""
        self.write("DELETE FROM intents WHERE id = ?", intent_id)
