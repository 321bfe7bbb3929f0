"""The curve of a search as a picture, with its numbers beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.errors import RequestError
from eutectic.evaluation.metrics import LOWER_IS_BETTER
from eutectic.reporting.plots import new_figure, save_figure

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Find out before any work whether a picture can be drawn there."""
    if path.suffix not in FORMATS:
        raise RequestError(f"{path}: a plot's name ends with {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}.")
    numbers = numbers_of(path)
    check_replaced(numbers, {"scale", "objective", "points"}, "the curve's numbers")
    new_figure(1, 1)


def numbers_of(path: Path) -> Path:
    """Return the JSON file beside a picture."""
    return path.with_suffix(".json")


def plot_curve(search: Mapping[str, Any], path: Path) -> None:
    """Draw the objective, and each task's part of it, against α on a logarithmic axis.

    Metrics are drawn as shares of the experts', as the objective means them; the JSON has them raw.
    `search` itself, of a report or of `eutectic.json`, is written as JSON beside the picture:
    `curve.json` for `curve.png`.
    """
    check_plot(path)
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    points = search["points"]
    scales = [p["scale"] for p in points]
    for name in points[0]["parts"]:
        # None, where a value was not finite, leaves a gap.
        values = [_share(search, name, _number(p["parts"].get(name))) for p in points]
        axes.plot(scales, values, linewidth=0.8, alpha=0.6, label=name)
    mean = [_number(p["value"]) for p in points]
    axes.plot(scales, mean, "o-", color="black", markersize=3, label="objective")
    axes.axvline(search["scale"], color="tab:red", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(f"α (best: {search['scale']:g})")
    axes.set_ylabel(search["objective"], fontsize="small", wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    text = json.dumps(dict(search), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(numbers_of(path), (text + "\n").encode())
    save_figure(figure, path, dpi=150)


def _share(search: Mapping[str, Any], task: str, value: float) -> float:
    """Return a metric in the objective's unit, as a share of the expert's; others as they are."""
    if "experts" not in search:
        return value
    expert = _number(search["experts"][task])
    lower = search["tasks"][task].get("metric") in LOWER_IS_BETTER
    above, below = (expert, value) if lower else (value, expert)
    return above / below if below > 0 else float("nan")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
