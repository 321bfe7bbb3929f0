"""A search over α: a logarithmic grid, then a golden section; and the curve as a picture."""

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.errors import NumericalError, RequestError
from eutectic.evaluation.metrics import LOWER_IS_BETTER
from eutectic.reporting.plots import check_picture, new_figure, save_figure
from eutectic.storage import can_hold

OBJECTIVES = {
    "validation": "mean over tasks of the metric's share of the expert's, on validation data",
    "divergence": "mean over tasks of the divergence from the expert's outputs, on proxy data",
    "norm": "norm of the merged change against the experts' mean",
    "gram": "squared error of layer outputs relative to the experts' shifts, from Grams",
}
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Measured:
    """An objective's value with what it consists of, such as one number per task."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class ScaleCurve:
    """Every α that was tried.

    Attributes:
        points: α -> what was measured, in ascending order of α.
        scale: the best α.
        maximise: whether larger values are better.
    """

    points: Mapping[float, Measured]
    scale: float
    maximise: bool

    @property
    def value(self) -> float:
        """The objective at the best α."""
        return self.points[self.scale].value

    @property
    def at_edge(self) -> bool:
        """Whether the best α is the smallest or the largest that was tried."""
        scales = list(self.points)
        return self.scale in (scales[0], scales[-1])

    @property
    def flat(self) -> bool:
        """Whether the smallest α, where next to nothing was merged, did as well as the best."""
        first = next(iter(self.points))
        return first < self.scale and self.points[first].value == self.value

    def as_record(self) -> dict[str, Any]:
        """Return the curve as JSON-serialisable values; a value that is not finite is null."""
        points = [
            {"scale": scale, "value": _plain(m.value), "parts": plain_parts(m.parts)}
            for scale, m in self.points.items()
        ]
        return {"scale": self.scale, "maximise": self.maximise, "points": points}

    def described(self, search: str) -> dict[str, Any]:
        """Return what `eutectic.json` says of a search: its objective and the whole curve."""
        return {"search": search, "objective": OBJECTIVES[search], **self.as_record()}


def search_scale(
    objective: Callable[[float], float | Measured],
    *,
    low: float = 0.02,
    high: float = 3.0,
    points: int = 11,
    tolerance: float = 0.05,
    maximise: bool = False,
    tell: Callable[[int, int, float], None] | None = None,
) -> ScaleCurve:
    """Return the α in [low, high] with the best objective, and all that were tried.

    `points` values at equal ratios come first; a golden section in log α between the neighbours of
    the best one follows, until α is known to a relative `tolerance`. Accuracies have plateaus: the
    search goes on in the middle of the widest run of best points, and of the final one the point
    nearest to its middle (in log α) is taken. With the default settings 17 values are computed; on
    an objective with one optimum the result is within `tolerance` of it.

    Args:
        objective: of α; NaN counts as the worst value.
        low: smallest α, positive.
        high: largest α.
        points: size of the grid, at least 3.
        tolerance: relative precision.
        maximise: look for the largest value instead of the smallest.
        tell: called before each value with (number done, number in all, α).

    Raises:
        RequestError: the range is empty or not positive, or `points` or `tolerance` out of bounds.
        NumericalError: every value is NaN.

    Example:
        >>> curve = search_scale(lambda a: (a - 0.7) ** 2)
        >>> abs(curve.scale / 0.7 - 1) < 0.05
        True
    """
    if not (0 < low < high < math.inf and points >= 3 and 0 < tolerance < 1):
        raise RequestError(
            f"a search over α takes 0 < low < high, at least 3 points and a tolerance between 0 "
            f"and 1;\ngot low={low}, high={high}, points={points}, tolerance={tolerance}."
        )
    found: dict[float, Measured] = {}
    step = math.log(high / low) / (points - 1)
    goal = 2 * math.log1p(tolerance)
    sections = max(0, math.ceil(math.log(2 * step / goal) / -math.log(_GOLDEN)))
    total = points + (sections + 1 if sections else 0)

    def at(position: float) -> float:
        """Return the value at a logarithm of α, as a cost."""
        scale = rounded(math.exp(position))
        if scale not in found:
            if tell is not None:
                tell(len(found), total, scale)
            result = objective(scale)
            found[scale] = result if isinstance(result, Measured) else Measured(float(result))
        return _cost(found[scale], maximise)

    positions = [math.log(low) + i * step for i in range(points)]
    costs = [at(position) for position in positions]
    if all(cost == math.inf for cost in costs):
        raise NumericalError(
            f"the objective has no finite value for any α from {low:g} to {high:g}.\n"
            "Look for NaN in the experts or the data, or search another range."
        )
    best = positions.index(_middle(positions, costs))
    left, right = positions[max(best - 1, 0)], positions[min(best + 1, points - 1)]
    _golden_section(at, left, right, positions[best], goal)
    ordered = dict(sorted(found.items()))
    tried = {math.log(scale): scale for scale in ordered}
    middle = _middle(list(tried), [_cost(m, maximise) for m in ordered.values()])
    return ScaleCurve(ordered, tried[middle], maximise)


def _middle(positions: Sequence[float], costs: Sequence[float]) -> float:
    """Return the position nearest to the middle of the widest run of equally best ones."""
    optimum = min(costs)
    runs: list[list[float]] = [[]]
    for position, cost in zip(positions, costs, strict=True):
        if cost == optimum:
            runs[-1].append(position)
        elif runs[-1]:
            runs.append([])
    widest = max(filter(None, runs), key=lambda run: run[-1] - run[0])
    middle = (widest[0] + widest[-1]) / 2
    # Rounded, so that of two that are equally near the smaller is taken.
    return min(widest, key=lambda position: round(abs(position - middle), 9))


def grid(low: float, high: float, points: int) -> list[float]:
    """Return numbers at equal ratios from `low` to `high`."""
    ratio = math.log(high / low) / (points - 1)
    return [rounded(low * math.exp(i * ratio)) for i in range(points)]


def rounded(scale: float) -> float:
    """Return α rounded to six digits, as printed: the printed value gives the same bytes again."""
    return float(f"{scale:.6g}")


def _golden_section(
    at: Callable[[float], float], left: float, right: float, best: float, goal: float
) -> None:
    """Narrow [left, right] down to `goal`; on a tie keep the side where `best` is."""
    if right - left <= goal:
        return
    inner = right - _GOLDEN * (right - left)
    outer = left + _GOLDEN * (right - left)
    inner_cost, outer_cost = at(inner), at(outer)
    while True:
        tie = inner_cost == outer_cost
        lower = inner_cost < outer_cost or (tie and 2 * best <= inner + outer)
        if lower:
            right, outer, outer_cost = outer, inner, inner_cost
        else:
            left, inner, inner_cost = inner, outer, outer_cost
        if right - left <= goal:
            return
        if lower:
            inner = right - _GOLDEN * (right - left)
            inner_cost = at(inner)
        else:
            outer = left + _GOLDEN * (right - left)
            outer_cost = at(outer)


def _cost(measured: Measured, maximise: bool) -> float:
    value = -measured.value if maximise else measured.value
    return math.inf if math.isnan(value) else value


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plain_parts(parts: Mapping[str, float]) -> dict[str, float | None]:
    """Return numbers for JSON: what is not finite is null."""
    return {name: _plain(value) for name, value in parts.items()}


def tried(search: Mapping[str, Any]) -> list[float]:
    """Return, of a record of a search, what was tried: values of α, or of `over`'s parameter."""
    return [p["scale" if search.get("over") is None else "parameter"] for p in search["points"]]


def chosen(search: Mapping[str, Any]) -> float:
    """Return, of a record of a search, the best of what was tried."""
    return search["scale" if search.get("over") is None else "value"]


FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Find out before any work whether a picture can be drawn there."""
    if path.suffix not in FORMATS:
        raise RequestError(f"{path}: a plot's name ends with {', '.join(FORMATS)}.")
    if not can_hold(path.parent):
        raise RequestError(f"{path}: there is no folder {path.parent}.")
    check_picture(path)
    numbers = numbers_of(path)
    check_replaced(numbers, {"scale", "objective", "points"}, "the curve's numbers")
    new_figure(1, 1)


def numbers_of(path: Path) -> Path:
    """Return the JSON file beside a picture."""
    return path.with_suffix(".json")


def plot_curve(search: Mapping[str, Any], path: Path) -> None:
    """Draw the objective against α on a logarithmic axis, and each task's part of it below.

    The frame shows the values near the best one; values far from it are marked at its edge with
    their numbers. Metrics are drawn as shares of the experts', as the objective means them; the
    JSON has them raw. `search` itself, of a report or of `eutectic.json`, is written as JSON beside
    the picture: `curve.json` for `curve.png`.
    """
    check_plot(path)
    points = search["points"]
    parts = list(points[0]["parts"])
    figure = new_figure(6.4, 5.8 if parts else 3.8)
    panels = figure.subplots(1 + bool(parts), 1, sharex=True, squeeze=False)[:, 0]
    scales, best = tried(search), chosen(search)
    mean = [_number(p["value"]) for p in points]
    panels[0].plot(scales, mean, "o-", color="black", markersize=3, label="objective")
    _frame(panels[0], scales, [mean], scales.index(best))
    better = "higher" if search.get("maximise") else "lower"
    label = textwrap.fill(f"{search['objective']} ({better} is better)", 42)
    panels[0].set_ylabel(label, fontsize=7)
    panels[0].set_title(_finding(search), fontsize=10)
    if parts:
        # None, where a value was not finite, leaves a gap.
        values = [
            [_share(search, name, _number(p["parts"].get(name))) for p in points] for name in parts
        ]
        for index, (name, own) in enumerate(zip(parts, values, strict=True)):
            style = ("-", "--", ":")[index // 10 % 3]
            panels[1].plot(scales, own, style, linewidth=1, label=name, color=f"C{index % 10}")
        _frame(panels[1], scales, values, scales.index(best))
        shares = "share of the expert's metric" if "experts" in search else "part of the objective"
        panels[1].set_ylabel(f"{shares}, task by task", fontsize=7)
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axes in panels:
        axes.axvline(best, color="tab:red", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    ticks = [t for t in _TICKS if min(scales) <= t <= max(scales)]
    if len(ticks) > 1:
        panels[-1].set_xticks(ticks, [f"{t:g}" for t in ticks])
        panels[-1].set_xticks([], minor=True)
    over = search.get("over")
    label = "scale α of the merged change (no unit)"
    if over is not None:
        label = f"{over} of {search.get('method') or 'the method'}, at scale {search['scale']:g}"
    panels[-1].set_xlabel(label, fontsize=9)
    text = json.dumps(dict(search), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(numbers_of(path), (text + "\n").encode())
    save_figure(figure, path, dpi=150)


_TICKS = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]
_NEAR = 0.01  # of the best value


def _finding(search: Mapping[str, Any]) -> str:
    """Say which α is best, and which neighbours are as good within one percent."""
    points, scales, found = search["points"], tried(search), chosen(search)
    place = scales.index(found)
    best = _number(points[place]["value"])
    name = f"{search['method']}: " if search.get("method") else ""
    axis = search.get("over") or "α"
    said = f"{name}{axis} = {found:.3g} is best ({best:.4g})"
    if place in (0, len(points) - 1) and len(points) > 1:
        return f"{said}\nat the edge of what was tried: a wider range may hold a better one"
    near = [abs(_number(p["value"]) - best) <= _NEAR * abs(best) for p in points]
    low = high = place
    while low > 0 and near[low - 1]:
        low -= 1
    while high < len(points) - 1 and near[high + 1]:
        high += 1
    if low == high:
        return said
    ends = f"{scales[low]:.2g} to {scales[high]:.2g}"
    return f"{said}\nwithin 1 % of it: {axis} from {ends}"


def near_the_best(curves: Sequence[Sequence[float]], at: int) -> tuple[float, float] | None:
    """Return between which values the curves lie around their values at one place.

    None where all values are so near that nothing need be left out: the farthest is at most four
    times as far as the median. Else three times the median on both sides.
    """
    off = sorted(
        abs(value - curve[at])
        for curve in curves
        for place, value in enumerate(curve)
        if place != at and math.isfinite(value) and math.isfinite(curve[at])
    )
    if not off or off[-1] <= 4 * off[len(off) // 2]:
        return None
    reach = 3 * off[len(off) // 2] or off[-1]
    centres = [curve[at] for curve in curves if math.isfinite(curve[at])]
    return min(centres) - reach, max(centres) + reach


def _frame(axes: Any, scales: Sequence[float], curves: Sequence[Sequence[float]], at: int) -> None:
    """Limit the axis to what lies near the values at one α, and mark what lies outside.

    One bad α at the edge of the range would make the rest a flat line.
    """
    ends = near_the_best(curves, at)
    if ends is None:
        return
    low, high = ends
    shown = [v for curve in curves for v in curve if low <= v <= high]
    margin = 0.06 * (max(shown) - min(shown)) or 1.0
    low, high = min(shown) - margin, max(shown) + margin
    axes.set_ylim(low, high)
    for curve in curves:
        for scale, value in zip(scales, curve, strict=True):
            if math.isfinite(value) and not low <= value <= high:
                edge, mark, lift = (low, "v", 7) if value < low else (high, "^", -11)
                axes.plot([scale], [edge], mark, color="grey", markersize=5, clip_on=False)
                if len(curves) == 1:
                    axes.annotate(
                        f"{value:.3g}",
                        (scale, edge),
                        (0, lift),
                        textcoords="offset points",
                        ha="center",
                        fontsize=6,
                    )


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
