"""What doctor finds of a run."""

from __future__ import annotations

from onward.layout import RunLayout
from onward.service.proof.doctor.examination import examine
from onward.service.proof.doctor.finding import Finding


def findings(layout: RunLayout, subject: str) -> list[Finding]:
    """Return what was found of a subject."""
    return [finding for finding in examine(layout) if finding.subject == subject]
