"""The last proof of a run, kept in its ledger: observers see later what was checked, when and at which step."""

from __future__ import annotations

import contextlib
import sqlite3

from onward.layout import RunLayout
from onward.service.proof.verify import Proof, verify
from onward.store.ledger import PROOF, Ledger


def verify_and_keep(layout: RunLayout, ledger: Ledger, *, deep: bool) -> Proof:
    """Check every claim of a run (see `verify`) and record the outcome, unless the ledger cannot be written."""
    proof = verify(layout, ledger, deep=deep)
    with contextlib.suppress(sqlite3.Error):
        at = {"at": ledger.clock(), "step": ledger.committed_step(), "deep": deep}
        ledger.put(**{PROOF: {**at, **proof.to_dict()}})
    return proof
