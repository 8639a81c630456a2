"""A run that this process owns: what all parts of its work share."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from onward.errors import OnwardError
from onward.events import Hub, Note
from onward.layout import RunLayout
from onward.service.outside.reporting import NewNotes
from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.service.owner.answers import Answers
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger


@dataclass(frozen=True)
class Owned:
    """A run in the process that owns it: its ledger, its config, its wishes, its observers.

    Args:
        let_go: makes the other processes that train free their models.
        require_ranks: raises if one of them is gone.
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
    require_ranks: Callable[[], None] = lambda: None

    def while_waiting(self) -> None:
        """Show that this process is at work though it waits; called several times a second meanwhile.

        Raises:
            RankLost: another process that trains is gone, of which nobody else would learn before the next step.
        """
        self.heartbeat.moved()
        self.require_ranks()

    def record(self, level: str, message: str, kind: str) -> None:
        """Record a message that observers should read; they get it even if the ledger cannot be written now."""
        try:
            self.ledger.add_event(level, message, kind=kind)
        except (sqlite3.Error, OnwardError):
            self.hub.tell(Note(message))
        else:
            self.tell_news()

    def tell_news(self) -> None:
        """Pass the ledger's new events to observers: refused files, what operators did."""
        for note in self.news():
            self.hub.tell(note)

    def look_at_config(self) -> bool:
        """Read the config again if it changed; return whether it did. A refused one is reported and changes nothing."""
        changed, problem = self.settings.refresh(), self.settings.problem
        if changed and problem is not None:
            self.record("error", f"the config is refused; the earlier config stays in force: {problem}", "config")
        self.shown.stand("config", problem)
        return changed
