"""A run that this process owns, and what every part of its work shares."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from onward.errors import OnwardError
from onward.events import Hub, Note
from onward.layout import RunLayout
from onward.service.outside.reporting import NewNotes
from onward.service.owner.answers import Answers
from onward.service.owner.heartbeat import Heartbeat
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger


@dataclass(frozen=True)
class Owned:
    """A run in the process that owns it: its record, its config, what is asked of it, who is told.

    Args:
        let_go: has other processes that train free their models.
    """

    layout: RunLayout
    ledger: Ledger
    settings: Settings
    wishes: Wishes
    answers: Answers
    heartbeat: Heartbeat
    hub: Hub
    shown: Shown
    news: NewNotes
    let_go: Callable[[], None] = lambda: None

    def record(self, level: str, message: str, kind: str) -> None:
        """Record what whoever watches should read; where the ledger cannot take it now, it is told all the same."""
        try:
            self.ledger.add_event(level, message, kind=kind)
        except (sqlite3.Error, OnwardError):
            self.hub.tell(Note(message))
        else:
            self.tell_news()

    def tell_news(self) -> None:
        """Tell whoever watches what the ledger got since the last time: refused files, what operators did."""
        for note in self.news():
            self.hub.tell(note)

    def look_at_config(self) -> bool:
        """Read the config again if it changed; a refused one is shown, and changes nothing. True if it changed."""
        changed, problem = self.settings.refresh(), self.settings.problem
        if changed and problem is not None:
            self.record("error", f"the config is refused; the earlier config stays in force: {problem}", "config")
        self.shown.stand("config", problem)
        return changed
