"""Results of an evaluation as a picture: every model's share of the experts, task by task."""

import textwrap
from pathlib import Path
from typing import Any

from eutectic.errors import RequestError
from eutectic.evaluation.results import Figures, Mean, Results
from eutectic.reporting.plots import check_picture, new_figure, save_figure
from eutectic.storage import can_hold

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = "osD^vPX"
SHOWN = 6  # models whose figures of every task are drawn, beside the base's


def check_plot(path: Path) -> None:
    """Find out before any work whether a picture can be drawn there."""
    if path.suffix not in FORMATS:
        raise RequestError(f"{path}: a plot's name ends with {', '.join(FORMATS)}.")
    if not can_hold(path.parent):
        raise RequestError(f"{path}: there is no folder {path.parent}.")
    check_picture(path)
    new_figure(1, 1)


def draw_results(results: Results, path: Path) -> None:
    """Draw the models' means with their 95 % intervals, and their figures on every task.

    In percent of the expert's figure where every model has one, else the mean of the metric.
    """
    check_plot(path)
    rows = [m for m in results.means if m.value is not None or m.normalized is not None]
    shares = all(m.normalized is not None for m in rows)
    tasks = [task.name for task in results.tasks]
    height = 1.5 + 0.32 * len(rows) + (0.32 * len(tasks) + 0.6 if len(tasks) > 1 else 0)
    figure = new_figure(6.4, min(height, 14.0))
    panels = 2 if len(tasks) > 1 else 1
    ratios = [len(rows) + 1, len(tasks) + 1][:panels]
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=ratios)[:, 0]
    unit = 100.0 if shares or _is_percent(results) else 1.0
    _means(axes[0], rows, shares, unit)
    if panels == 2:
        _by_task(axes[1], results, shares, unit)
    metrics = ", ".join(dict.fromkeys(task.metric for task in results.tasks))
    label = f"{metrics}, % of the expert's" if shares else metrics + (" (%)" if unit == 100 else "")
    axes[-1].set_xlabel(label, fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(_finding(results, rows, shares), 66)), fontsize=10)
    save_figure(figure, path, dpi=150)


def _means(axes: Any, rows: list[Mean], shares: bool, unit: float) -> None:
    """One bar per model, with the interval of its mean."""
    for place, mean in enumerate(rows):
        value, ends = _figure(mean, shares)
        if value is None:
            continue
        reference = mean.checkpoint in ("base", "experts")
        axes.barh(place, unit * value, color="#999999" if reference else _COLOURS[0], height=0.62)
        right = value
        if ends is not None:
            low, high = (max(0.0, value - ends[0]), max(0.0, ends[1] - value))
            error = [[unit * low], [unit * high]]
            axes.errorbar(unit * value, place, xerr=error, color="black", capsize=2, linewidth=1)
            right = max(value, ends[1])
        axes.annotate(
            f"{unit * value:.1f}" if unit == 100 else f"{value:.4g}",
            (unit * right, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), [mean.checkpoint for mean in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("mean over tasks, with 95 % interval (bars cut on the left)", fontsize=9)
    _zoom(axes, rows, shares, unit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _zoom(axes: Any, rows: list[Mean], shares: bool, unit: float) -> None:
    """Begin the axis near the worst model: differences are what is looked at."""
    found = [_figure(mean, shares) for mean in rows]
    lows = [ends[0] if ends else value for value, ends in found if value is not None]
    highs = [ends[1] if ends else value for value, ends in found if value is not None]
    span = max(max(highs) - min(lows), 1e-9)
    axes.set_xlim(unit * (min(lows) - 0.12 * span), unit * (max(highs) + 0.14 * span))


def _by_task(axes: Any, results: Results, shares: bool, unit: float) -> None:
    """A row per task, a mark per model."""
    models = [c.name for c in results.checkpoints if c.role != "expert"]
    cells = {(r.checkpoint, r.task): _figure(r, shares)[0] for r in results.results}
    sign = 1 if shares or results.tasks[0].higher_is_better else -1
    known = {m.checkpoint: _figure(m, shares)[0] or 0.0 for m in results.means}
    ranked = sorted(models, key=lambda name: -sign * known.get(name, 0.0))
    shown = [name for name in ranked if name != "base"][:SHOWN]
    for index, name in enumerate(["base", *shown] if "base" in models else shown):
        colour = "#999999" if name == "base" else _COLOURS[(index - 1) % len(_COLOURS)]
        values = [cells.get((name, task.name)) for task in results.tasks]
        places = [(unit * v, i) for i, v in enumerate(values) if v is not None]
        mark = _MARKS[index % len(_MARKS)]
        axes.plot(*zip(*places, strict=True), mark, color=colour, markersize=5, label=name)
    axes.set_yticks(range(len(results.tasks)), [t.name for t in results.tasks], fontsize=8)
    axes.set_ylim(len(results.tasks) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    left_out = len(models) - len(shown) - ("base" in models)
    more = f" (the best {len(shown)} models of {len(shown) + left_out})" if left_out else ""
    axes.set_title(f"task by task{more}", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _figure(found: Figures, shares: bool) -> tuple[float | None, tuple[float, float] | None]:
    return (
        (found.normalized, found.normalized_interval) if shares else (found.value, found.interval)
    )


def _finding(results: Results, rows: list[Mean], shares: bool) -> str:
    """Say which model is best, and whether the others can be told from it."""
    models = {c.name for c in results.checkpoints if c.role == "model"}
    sign = 1 if shares or results.tasks[0].higher_is_better else -1
    known = {m.checkpoint: v for m in rows if (v := _figure(m, shares)[0]) is not None}
    ranked = {name: sign * value for name, value in known.items() if name in models}
    if not ranked:
        return "Base and experts"
    best = max(ranked, key=ranked.__getitem__)
    value = known[best]
    said = f"{best} keeps {100 * value:.1f} % of the experts" if shares else f"{best}: {value:.4g}"
    ends = {
        d.checkpoint: d.normalized_interval if shares else d.interval
        for d in results.differences
        if d.other == best and d.checkpoint in models
    }
    alike = [name for name, pair in ends.items() if pair and pair[0] <= 0 <= pair[1]]
    if not ends:
        return said
    if not alike:
        return f"{said}, distinguishably more than every other model"
    return f"{said}; not distinguishable from it: {', '.join(alike)}"


def _is_percent(results: Results) -> bool:
    return all(task.metric in ("accuracy", "macro_f1") for task in results.tasks)
