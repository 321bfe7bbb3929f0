"""What methods reported of their tensors, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any


def summary(records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) rows: how systems were solved, and what fell short.

    Everything else that methods report, residual curves among it, is in the output's
    `eutectic.json` under `records`.
    """
    found = list(_each(records))
    rows: list[tuple[str, str]] = []
    solved = [(name, record) for name, record in found if "status" in record]
    if solved:
        statuses = Counter(record["status"].replace("_", " ") for _, record in solved)
        listed = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
        steps = sorted(record["iterations"] for _, record in solved)
        rows.append(("systems", f"{len(solved)} solved by conjugate gradients: {listed}"))
        rows.append(("iterations", f"{steps[0]} to {steps[-1]}, median {steps[len(steps) // 2]}"))
        name, record = max(solved, key=lambda pair: _order(pair[1]["residuals"][-1]))
        worst = record["residuals"][-1]
        shown = "not finite" if worst is None else f"{worst:.1e}"
        rows.append(("worst residual", f"{shown} at {name}"))
    resting = Counter((r["rest"], r["reason"]) for _, r in found if "rest" in r)
    for (rule, reason), count in resting.most_common(3):
        rows.append(("not matched", f"{count} took '{rule}': {reason}"))
    if len(resting) > 3:
        rows.append(("not matched", f"{len(resting) - 3} more reasons, in eutectic.json"))
    raised = [(record["ridge"], name) for name, record in found if record.get("ridge_escalated")]
    if raised:
        ridge, name = max(raised)
        rows.append(("singular", f"{len(raised)} Grams took a ridge, up to {ridge:.1e} at {name}"))
    short = [name for name, record in found if record.get("short")]
    if short:
        text = f"{len(short)} tensors have experts with fewer directions than asked for"
        rows.append(("short", f"{text}, such as {short[0]}"))
    return rows


def _each(records: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (tensor, record) of every matrix; parts of a tensor carry theirs in brackets."""
    for tensor, parts in records.items():
        for part, record in parts.items():
            if not isinstance(record, Mapping):
                continue  # a layer's factor, which belongs to the tensor and to no system
            yield (tensor if part == "matrix" else f"{tensor}{part}"), record


def _order(residual: float | None) -> float:
    return float("inf") if residual is None else residual
