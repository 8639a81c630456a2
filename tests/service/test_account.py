"""What a boundary knows of the boundaries before: added up as the stream grows, the same as from the whole table."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ledgers import made_up_run

from onward.service.knowledge.account import Account, Measured
from onward.service.knowledge.table import Table, read_table
from onward.store.ledger import Ledger

CONTENTS = "abcadeafbg"
"""The contents of ten files: some come again."""


class Counting(Ledger):
    """A ledger that counts how often results of a boundary are read."""

    reads = 0

    def boundary_results(self, file_id: int) -> dict[str, Any]:
        """Count, and read."""
        self.reads += 1
        return super().boundary_results(file_id)


def measured(directory: Path) -> Path:
    """Measure ten files on some of what came before, each time on one of two sets of rows; returns the ledger."""
    path = made_up_run(directory, [(f"{place}.jsonl", 2) for place in range(10)], float).ledger
    chance = random.Random(7)
    with Ledger(path) as ledger:
        for file_id, own in enumerate(CONTENTS, start=1):
            ledger.set_file(file_id, sha256=own)
            seen = [key for key in set(CONTENTS[:file_id]) if chance.random() < 0.6]
            model = {
                key: {"loss": chance.random(), "rows": chance.choice([[1], [1, 2]]), "tokens": 3}
                for key in sorted(seen)
            }
            kl = chance.choice([None, chance.random()])
            grid = {
                "model": model,
                "base": {own: {"rows": [1], "tokens": 3}},
                "anchor": kl and {"kl": kl},
                "names": {},
                "cost": 5,
            }
            before = {"model": {own: {"loss": chance.random(), "rows": [1], "tokens": 3}}, "base": {}, "cost": 2}
            ledger.keep_boundary_results(file_id, file_id, {"grid": grid} | ({"before": before} if file_id > 1 else {}))
    return path


def trained(ledger: Ledger, place: int) -> int:
    """Add up the tokens of the steps of the first files of the stream."""
    return sum(ledger.tokens_of(row.id) for row in ledger.files("training", "done")[:place])


def from_table(table: Table, key: str, rows: list[int], since: int) -> Measured | None:
    """Look a loss up in the whole table."""
    placed = zip(table.after, table.scores, strict=True)
    seen = [(after, row[key]) for after, row in placed if after >= since and key in row]
    return next((Measured(after, score["loss"]) for after, score in reversed(seen) if score["rows"] == rows), None)


def test_an_account_is_what_the_whole_table_says(tmp_path: Path) -> None:
    """At every boundary, whichever account is asked: one that grew with the stream, or one made there."""
    with Ledger(measured(tmp_path / "run")) as ledger:
        grown = Account(ledger)
        for place in range(1, 11):
            table, made = read_table(ledger, place), Account(ledger).up_to(place)
            for account in (grown.up_to(place), made):
                for key in "abcdefg":
                    for since in ledger.places_of(key, place):
                        for rows in ([1], [1, 2]):
                            assert from_table(table, key, rows, since) == account.newest_loss(
                                key, {"rows": rows, "tokens": 3}, since
                            )
                placed = zip(table.after[1:], table.anchor[1:], strict=True)
                known = [Measured(after, value) for after, value in placed if value is not None]
                assert (known[-1] if known else None) == account.anchor
                assert list(dict.fromkeys(CONTENTS[:place])) == list(account.contents)
                assert (5 * place + 2 * (place - 1), trained(ledger, place)) == (account.cost, account.tokens)
        assert [1, 4, 7] == ledger.places_of("a", 10)


def test_a_boundary_reads_what_is_new(tmp_path: Path) -> None:
    """The work of a boundary does not grow with the stream; what was taken back is not believed any longer."""
    ledger = Counting(measured(tmp_path / "run"))
    with ledger:
        account = Account(ledger)
        for place in range(1, 11):
            account.up_to(place).up_to(place)
            assert place == ledger.reads
        assert account.up_to(4).tokens == trained(ledger, 4)
        ledger.set_file(4, position=None, state="undone")
        ledger.set_file(5, position=4)
        assert list("abcd") == list(account.up_to(4).contents)
