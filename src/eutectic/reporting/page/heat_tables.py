"""Tables whose cells have colours: layers, pairs of experts, models on tasks, confusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from eutectic.reporting.page.page_record import (
    LayerMap,
    Measure,
    ModelScore,
    PairTable,
    Routing,
    Scores,
)
from eutectic.reporting.page.shown_numbers import DASH, IN_PERCENT, with_interval


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a text, the number to sort by, and a class."""

    text: str
    value: float | None = None
    kind: str = ""
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One of several contents that a reader chooses among."""

    key: str
    label: str
    content: Any
    group: str = ""
    chosen: bool = False  # shown first, and on paper; else the first is


@dataclass(frozen=True)
class Heat:
    """A table whose cells have colours."""

    caption: str
    meaning: str
    unit: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    legend: Sequence[tuple[str, str]]  # (class, text) of the colours, from low to high
    states: bool = False


STEPS = 10  # colours, less one


def map_panels(maps: Sequence[LayerMap]) -> list[Panel]:
    """Return one panel per measure, grouped by the source that it is of.

    The first that says different things of different layers is shown first.
    """
    panels = [
        Panel(f"m{i}-{j}", measure.label, _heat(own, measure), own.name)
        for i, own in enumerate(maps)
        for j, measure in enumerate(own.measures)
    ]
    telling = (i for i, p in enumerate(panels) if len(_texts(p.content)) > 1)
    first = next(telling, 0)
    return [replace(panel, chosen=i == first) for i, panel in enumerate(panels)]


def _texts(heat: Heat) -> set[str]:
    return {cell.text for _, cells in heat.rows for cell in cells}


def _heat(own: LayerMap, measure: Measure) -> Heat:
    if measure.states:
        legend = [(f"k{i % 8}", f"{i + 1}: {name}") for i, name in enumerate(measure.states)]
    else:
        letter = "d" if measure.scale == "diverging" else "q"
        legend = _scale(measure.low, measure.high, kind=letter)

    def cell(value: float | None) -> Cell:
        if value is None:
            return Cell("", None, "empty")
        if measure.states:
            place = int(value)
            return Cell(f"{place + 1}", value, f"k{place % 8}", measure.states[place])
        letter = "d" if measure.scale == "diverging" else "q"
        color = _color(value, measure.low, measure.high)
        return Cell(fixed(value, measure.low, measure.high), value, f"{letter}{color}")

    filled = [
        (n, line)
        for n, line in zip(own.rows, measure.values, strict=True)
        if any(v is not None for v in line)
    ]
    kept = [i for i, _ in enumerate(own.columns) if any(line[i] is not None for _, line in filled)]
    return Heat(
        caption=measure.label,
        meaning=measure.meaning,
        unit=measure.unit,
        columns=[own.columns[i] for i in kept],
        rows=[(row, [cell(line[i]) for i in kept]) for row, line in filled],
        legend=legend,
        states=bool(measure.states),
    )


def three_digits(value: float) -> str:
    """Return a number to three digits.

    >>> three_digits(0.91234), three_digits(-123.4), three_digits(0.00012)
    ('0.912', '−123', '1.2e−4')
    """
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e−").replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 3)}f}"
    return text.replace("-", "−")


def fixed(value: float, low: float, high: float) -> str:
    """Return a number with as many decimals as tell two colours of its scale apart.

    >>> fixed(-0.00001, -1, 1), fixed(0.9213, 0.9, 1), fixed(82.31, 0, 100)
    ('0.00', '0.921', '82')
    """
    reach = high - low
    if not 1e-4 < reach < 1e5:
        return three_digits(value)
    decimals = max(0, 2 - math.floor(math.log10(reach) + 1e-9))
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def pair_panel(table: PairTable) -> Panel:
    """Return a table of pairs; the diagonal is empty."""
    letter = "d" if table.scale == "diverging" else "q"

    def cell(value: float | None) -> Cell:
        if value is None:
            return Cell("", None, "empty")
        color = _color(value, table.low, table.high)
        return Cell(fixed(value, table.low, table.high), value, f"{letter}{color}")

    heat = Heat(
        caption=table.label,
        meaning=table.meaning,
        unit="",
        columns=table.names,
        rows=[
            (n, [cell(v) for v in row]) for n, row in zip(table.names, table.values, strict=True)
        ],
        legend=_scale(table.low, table.high, kind=letter),
    )
    return Panel(f"p-{table.key.replace(' ', '-')}", table.label, heat)


def score_matrix(own: Scores, models: Sequence[ModelScore]) -> Heat | None:
    """Return shares of the experts, or values, of all models on all tasks."""
    held = {(s.model, s.task): s for s in own.scores}
    by_share = own.by == "share"
    rows = [m for m in models if m.role in ("model", "base", "experts")]
    values = {k: (s.share if by_share else s.value).value for k, s in held.items()}
    flat = [v for (m, _), v in values.items() if v is not None and m != "experts"]
    if not flat or len(own.tasks) < 2:
        return None
    low, high = min(flat), max(flat)
    down = not by_share and not all(t.higher_is_better for t in own.tasks)
    metrics = {task.name: "share" if by_share else task.metric for task in own.tasks}

    def cell(model: str, task: str) -> Cell:
        value = values.get((model, task))
        if value is None:
            return Cell(DASH, None, "empty")
        score = held[model, task]
        shown = f"{100 * value:.1f}" if metrics[task] in IN_PERCENT else f"{value:.3g}"
        note = f"{with_interval(score.value, _metric_of(own, task))}"
        color = _color(-value if down else value, -high if down else low, -low if down else high)
        return Cell(shown, value, f"q{color}", note)

    percent = by_share or all(t.metric in IN_PERCENT for t in own.tasks)
    return Heat(
        caption="Share of the expert's figure per task" if by_share else "Figure per task",
        meaning="Sort by a task with the button in its column.",
        unit="%" if percent else "",
        columns=[task.name for task in own.tasks],
        rows=[(m.name, [cell(m.name, t.name) for t in own.tasks]) for m in rows],
        legend=_scale(low, high, 100 if percent else 1, turned=down),
    )


def _metric_of(own: Scores, name: str) -> str:
    return next(task.metric for task in own.tasks if task.name == name)


def _color(value: float, low: float, high: float) -> int:
    share = (value - low) / ((high - low) or 1.0)
    return round(STEPS * min(1.0, max(0.0, share)))


def _scale(
    low: float, high: float, times: float = 1, kind: str = "q", *, turned: bool = False
) -> list[tuple[str, str]]:
    """Return the colours of a scale with numbers at both ends and in the middle."""
    ends = {i: times * (low + (high - low) * i / STEPS) for i in (0, 5, STEPS)}
    texts = {i: fixed(value, ends[0], ends[STEPS]) for i, value in ends.items()}
    steps = range(STEPS + 1)
    return [(f"{kind}{STEPS - i if turned else i}", texts.get(i, "")) for i in steps]


def common_metric(own: Scores) -> str:
    """Return the metric of all tasks, `metric` where they differ."""
    names = {task.metric for task in own.tasks}
    return next(iter(names)) if len(names) == 1 else "metric"


def confusion_table(own: Routing) -> Heat | None:
    """Return where each task's samples are sent, None where nobody measured it."""
    if not own.confusion:
        return None
    return Heat(
        caption="Where each task's samples are sent",
        meaning="Rows are tasks, columns the experts that were chosen; each row adds up to 100 %. "
        "Right decisions stand on the diagonal.",
        unit="%",
        columns=own.experts,
        rows=[
            (task, [Cell(f"{100 * shares.get(e, 0):.0f}", shares.get(e, 0.0),
                         f"q{_color(shares.get(e, 0.0), 0, 1)}") for e in own.experts])
            for task, shares in own.confusion.items()
        ],
        legend=_scale(0, 1, 100),
    )  # fmt: skip
