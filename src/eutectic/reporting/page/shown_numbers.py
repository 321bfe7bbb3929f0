"""Numbers as a page shows them: with their unit, to the digits that mean something."""

from __future__ import annotations

from typing import Any

from eutectic.recipes.units import format_bytes
from eutectic.reporting.page.page_record import Figure, GramRow

# Metrics between 0 and 1 that people read in percent.
IN_PERCENT = frozenset(
    {"accuracy", "macro_f1", "exact_match", "mean", "acc", "acc_norm", "share", "f1"}
)
DASH = "–"


def format_value(value: float | None, metric: str) -> str:
    """Return a metric's value.

    >>> format_value(0.7931, "accuracy"), format_value(12.3456, "perplexity")
    ('79.3 %', '12.35')
    """
    if value is None:
        return DASH
    if metric in IN_PERCENT and -1.5 <= value <= 2:
        return f"{100 * value:.1f} %"
    return f"{value:.4g}"


def format_share(value: float | None) -> str:
    """Return a part of one in percent, to one digit after the point."""
    return DASH if value is None else f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Return a difference of shares in points of percent.

    One that a digit after the point would show as none keeps two of its own digits.

    >>> points(0.1234), points(-0.0002), points(0.0)
    ('12.3', '-0.02', '0.0')
    """
    small = 0 < abs(100 * value) < 0.05
    return f"{100 * value:.2g}" if small else f"{100 * value:.1f}"


def with_interval(figure: Figure, metric: str) -> str:
    """Return a value with its interval.

    >>> with_interval(Figure(value=0.5, interval=(0.45, 0.55)), "share")
    '50.0 % [45.0, 55.0]'
    """
    text = format_value(figure.value, metric)
    if figure.interval is None or figure.value is None:
        return text
    low, high = (format_value(v, metric).removesuffix(" %") for v in figure.interval)
    return f"{text} [{low}, {high}]"


def format_seconds(value: float) -> str:
    """Return a time."""
    if value < 100:
        return f"{value:.2g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def gram_row(row: GramRow) -> dict[str, Any]:
    """Return a row with what it says of layers, error and size in words."""
    first, *others = row.layers
    return {
        **row.model_dump(),
        "layer": f"{first} +{len(others)}" if others else first,
        "left": "" if row.beside is None else f"{100 * row.beside:.2g} %",
        "size": format_bytes(row.nbytes),
    }
