"""The checks, in order."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator

from onward.errors import OnwardError, UsageError
from onward.layout import RunLayout
from onward.service.proof.doctor import machine, model, process, state, versions
from onward.service.proof.doctor.finding import Finding
from onward.store.ledger import Ledger


def examine(layout: RunLayout) -> list[Finding]:
    """Check the machine and, if there is one, the run in `layout`."""
    findings = [*versions.check_versions(), *machine.check_device(), *machine.check_threads()]
    try:
        layout.require()
        _require_ledger(layout)
    except UsageError as error:
        return [*findings, Finding("warning", "run", f"{error.what}: {error.where}", error.hint)]
    except OnwardError as error:  # damaged, or of a newer release
        return [*findings, Finding("error", "ledger", error.what, error.hint)]
    checks: list[tuple[str, Callable[[RunLayout], Iterator[Finding]]]] = [
        ("config", model.check_config),
        ("identity", model.check_identity),
        ("base model", model.check_base),
        ("model", model.check_admission),
        ("versions", versions.check_last_versions),
        ("memory", machine.check_memory),
        ("ledger", state.check_ledger),
        ("ledger's disk", machine.check_ledger_disk),
        ("access", state.check_access),
        ("owner", process.check_owner),
        ("state", state.check_checkpoints),
        ("disk", machine.check_disk),
        ("inbox", process.check_inbox),
        ("queue", process.check_queue),
        ("trackers", process.check_trackers),
    ]
    for subject, check in checks:
        try:
            findings += check(layout)
        except OnwardError as error:
            finding = Finding("error", subject, error.what, error.hint)
            said = {(other.message, other.hint) for other in findings}
            if (finding.message, finding.hint) not in said:  # a refused config stops many checks
                findings.append(finding)
        except sqlite3.DatabaseError as error:
            findings.append(Finding("error", subject, str(error)))
        except OSError as error:
            place = f" [{error.filename}]" if error.filename else ""
            findings.append(Finding("error", subject, f"{error.strerror or error}{place}"))
    return findings


def _require_ledger(layout: RunLayout) -> None:
    """Refuse a file that is not a ledger; any other reason why it cannot be read is reported with the rest."""
    with contextlib.suppress(UsageError, sqlite3.DatabaseError, OSError):
        Ledger(layout.ledger, read_only=True).close()
