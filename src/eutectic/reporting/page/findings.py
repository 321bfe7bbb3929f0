"""What all findings of a report are made with, and the bounds that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eutectic.reporting.page.page_record import Finding, Level, ModelScore, Scores

POOR = 0.9  # of the expert: a task below it is worth another try
FAIR = 0.97  # of the experts: a merge below it leaves something to gain
WEAK = 0.6  # of what lies between chance and 1, a router's decisions


def finding(
    kind: str,
    level: Level,
    text: str,
    subject: Sequence[str] = (),
    *,
    command: str = "",
    **numbers: Any,
) -> Finding:
    """Return a finding; `numbers` are those that its text states."""
    return Finding(
        kind=kind, level=level, text=text, subject=tuple(subject), numbers=numbers, command=command
    )


def named(own: Scores, name: str) -> ModelScore | None:
    """Return the model of a name, None where the results have none."""
    return next((m for m in own.models if m.name == name), None)
