"""The plan of a file in its stream: its own rows, and replayed rows of earlier files. All plans are made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from onward.config import Config, stored_config
from onward.data.plan.holdout import count_held_out, held_out_rows
from onward.data.plan.order import FilePlan, make_plan
from onward.data.plan.replay import ReplayPlan, Source, StreamPlan, needed_by
from onward.data.tokenized import TokenizedFile
from onward.digest import sha256_json
from onward.service.intake.tokens import open_tokens
from onward.service.knowledge.table import read_table
from onward.service.session import Session
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

FORGOTTEN_FLOOR = 0.02
"""Policy `forgotten`: the weight of each file in addition to its relative forgetting, so that none is left out."""
RECENT_FALL = 0.5
"""Policy `recent`: the weight of a file relative to the one after it."""


def plan_of(ledger: Ledger, row: FileRow, rows: int, config: Config, position: int) -> StreamPlan:
    """Return the plan of a file: a function of its content, its config and the stream before it.

    Policy `forgotten` also reads the measurements at the boundary before the file.

    Args:
        rows: rows of the tokenized file.
        config: the config in force for the file.
        position: its place in the stream, present or future.
    """
    return plan_at(ledger, make_plan(row.sha256, rows, config, row.occurrence), config, position)


def plan_at(ledger: Ledger, own: FilePlan, config: Config, position: int) -> StreamPlan:
    """Return the plan that a file with a plan of its own has at a place in the stream, as `plan_of` does."""
    if not config.replay.share:
        return own
    before = ledger.in_stream(0, position - 1)
    sources = _sources(ledger, before, own.sha256, config)
    if not sources:
        return own
    stream = ""
    for sha256 in (*(other.sha256 for other in before), own.sha256):
        stream = sha256_json([stream, sha256])
    key = f"onward replay 1:{config.seed}:{stream}"
    return ReplayPlan(own, sources, config.replay.share, config.replay.policy != "uniform", key)


def held_out_of(ledger: Ledger, row: FileRow, configs: dict[str, Config]) -> tuple[int, ...]:
    """Return the rows of a file in the stream that are never trained, in rising order.

    Args:
        configs: a cache of configs by fingerprint; configs that are read are added.
    """
    assert row.config is not None, row.name
    if row.config not in configs:
        configs[row.config] = stored_config(ledger.config_of(row))
    config = configs[row.config]
    return held_out_rows(config.seed, row.sha256, row.rows, count_held_out(row.rows, config.holdout))


def _sources(ledger: Ledger, before: Sequence[FileRow], own: str, config: Config) -> tuple[Source, ...]:
    """Return the files that rows may be replayed from, each content as it was first trained."""
    configs: dict[str, Config] = {}
    found: dict[str, Source] = {}
    for row in before:
        if row.sha256 != own and row.sha256 not in found and row.config is not None:
            found[row.sha256] = Source(row.sha256, row.rows, held_out_of(ledger, row, configs))
    return tuple(_weighted(list(found.values()), ledger, before, config))


def _weighted(sources: Sequence[Source], ledger: Ledger, before: Sequence[FileRow], config: Config) -> Iterator[Source]:
    policy, shares = config.replay.policy, dict[str, float]()
    if policy == "forgotten":
        shares = read_table(ledger, max((row.place for row in before), default=0)).forgotten_share()
    for place, source in enumerate(sources, start=1):
        recent, forgotten = RECENT_FALL ** (len(sources) - place), FORGOTTEN_FLOOR + shares.get(source.sha256, 0.0)
        share = {"uniform": 1.0, "recent": recent, "forgotten": forgotten}[policy]
        yield replace(source, weight=source.trained_rows * share)


def sources_of(ledger: Ledger, config: Config) -> tuple[Source, ...]:
    """Return the finished files of the stream, each content once, with the rows that are never trained."""
    return _sources(ledger, ledger.files("done"), "", config)


class OpenSources:
    """The tokens of the files that a plan takes rows from, recreated from the archive if they are not cached.

    Args:
        stop: called for each row that is read again; may raise to give up.
    """

    def __init__(self, session: Session, stop: Callable[[], None]) -> None:
        self._session = session
        self._stop = stop
        self._opened: dict[str, TokenizedFile] = {}

    def of_plan(self, plan: StreamPlan, own: TokenizedFile, first_step: int = 0) -> Mapping[str, TokenizedFile]:
        """Open the files that the steps of a plan from `first_step` on need; return them by their SHA-256.

        Raises:
            DamagedState: the original of a file is missing or changed.
        """
        kept = {sha256: tokens for sha256, tokens in self._opened.items() if sha256 in plan.sources}
        kept[plan.sha256] = own
        for sha256 in sorted(needed_by(plan, first_step) - kept.keys()):
            kept[sha256] = self._open(sha256)
        self._opened = kept
        return kept

    def _open(self, sha256: str) -> TokenizedFile:
        row = first_in_stream(self._session.ledger, sha256)
        return open_tokens(self._session, row, stored_config(self._session.ledger.config_of(row)), self._stop)


def first_in_stream(ledger: Ledger, sha256: str) -> FileRow:
    """Return the first file of the stream with a content."""
    rows = [row for row in ledger.with_content(sha256) if row.position is not None and row.config is not None]
    return min((row for row in rows if row.state in ("training", "done")), key=lambda row: row.place)
