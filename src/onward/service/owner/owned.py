"""A run that this process owns, and what every part of its work shares."""

from __future__ import annotations

from dataclasses import dataclass

from onward.events import Hub
from onward.layout import RunLayout
from onward.service.owner.answers import Answers
from onward.service.owner.heartbeat import Heartbeat
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger


@dataclass(frozen=True)
class Owned:
    """A run in the process that owns it: its record, its config, what is asked of it, who is told."""

    layout: RunLayout
    ledger: Ledger
    settings: Settings
    wishes: Wishes
    answers: Answers
    heartbeat: Heartbeat
    hub: Hub
    shown: Shown
