"""From the record to what the templates lay out: rows, panels and charts, section by section."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eutectic.recipes.units import format_bytes
from eutectic.reporting.page.heat_tables import (
    Cell,
    Panel,
    common_metric,
    confusion_table,
    map_panels,
    pair_panel,
    score_matrix,
)
from eutectic.reporting.page.page_record import (
    Cost,
    Curve,
    Figure,
    Line,
    ModelScore,
    Report,
    Residuals,
    Routing,
    Scores,
    Spectra,
)
from eutectic.reporting.page.shown_numbers import (
    DASH,
    IN_PERCENT,
    format_seconds,
    format_share,
    format_value,
    gram_row,
    points,
    with_interval,
)
from eutectic.reporting.page.svg_charts import (
    Axis,
    axes_of,
    box,
    clipped_path,
    curve_chart,
    line_chart,
    radar,
    scale_axis,
    style_of,
    whisker,
)

MOST_TENSORS = 6_000  # rows of the table on the page; the JSON has all
MOST_RESIDUALS = 400  # lines of the chart


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str
    title: str
    content: Any


@dataclass(frozen=True)
class Sections:
    """All parts, and what scripts need of them."""

    sections: list[Section]
    data: dict[str, Any]


@dataclass(frozen=True)
class Legend:
    """Which line is whose."""

    name: str
    kind: str
    note: str = ""


@dataclass
class _Data:
    """What scripts are given."""

    spectra: list[list[str]] = field(default_factory=list[list[str]])  # layer -> line -> path


def sections(report: Report) -> Sections:
    """Return the sections for which a report has data, in the order of the page."""
    data = _Data()
    known: list[tuple[str, str, Any]] = [
        ("models", "How good the models are", [_scores(s, i) for i, s in enumerate(report.scores)]),
        ("alpha", "The scale α", [_curve(c, i) for i, c in enumerate(report.curves)]),
        ("layers", "Layer by layer", _layers(report)),
        ("spectra", "Spectra of the updates", _spectra(report.spectra, data)),
        ("pairs", "How the experts interfere", [pair_panel(p) for p in report.pairs]),
        ("residuals", "How the linear systems were solved", _residuals(report.residuals)),
        ("routing", "Routing", [_routing(r, i) for i, r in enumerate(report.routing)]),
        ("tensors", "What became of every tensor", _tensors(report)),
        ("provenance", "Where it comes from", report.merges),
        ("data", "Data", report.data),
        ("grams", "How inputs are kept", [gram_row(g) for g in report.grams]),
        ("costs", "Costs", [_cost(c) for c in report.costs]),
    ]
    found = [Section(key, title, content) for key, title, content in known if content]
    found.append(Section("sources", "Sources of this page", report.sources))
    return Sections(found, {"spectra": data.spectra})


# --- models ---


def _scores(own: Scores, index: int) -> dict[str, Any]:
    models = [m for m in own.models if m.mean.value is not None or m.share.value is not None]
    by_share = own.by == "share"
    metric = common_metric(own)
    figures = [m.share if by_share else m.mean for m in models]
    ends = _ends(figures)
    references = [
        (f.value, m.role)
        for m, f in zip(models, figures, strict=True)
        if m.role in ("base", "experts") and f.value is not None
    ]
    kind = "share" if by_share else metric
    rows = [
        {
            "name": m.name,
            "role": m.role,
            "best": m.name == own.best,
            "level": m.level,
            "note": m.note,
            "chart": whisker(f, ends, references),
            "cells": [
                _figure(m.share, "share"),
                _figure(m.mean, metric),
                _figure(m.nai, "nai"),
                _behind(m, kind),
            ],
        }
        for m, f in zip(models, figures, strict=True)
    ]
    ranked = [m for m in models if m.role == "model"]
    return {
        "key": f"s{index}",
        "name": own.name,
        "split": own.split,
        "metric": metric,
        "by": "share of the experts' figures" if by_share else f"mean {metric}",
        "ends": [format_value(end, kind) for end in ends],
        "has_base": any(kind == "base" for _, kind in references),
        "has_experts": any(kind == "experts" for _, kind in references),
        "rows": rows,
        "notes": own.notes,
        "panels": [_tasks(own, m, f"s{index}m{i}") for i, m in enumerate(ranked or models)],
        "matrix": score_matrix(own, models),
        "radar": _radar(own, ranked[:4], f"s{index}-radar"),
        "paired": all(m.paired for m in models),
        "resamples": own.resamples,
    }


def _ends(figures: Sequence[Figure]) -> tuple[float, float]:
    """Return a scale on which all intervals lie, with some room."""
    held = [v for f in figures for v in (f.interval or (f.value,)) if v is not None]
    if not held:
        return 0.0, 1.0
    low, high = min(held), max(held)
    room = (high - low or abs(high) or 1.0) * 0.05
    return low - room, high + room


def _figure(figure: Figure, metric: str) -> Cell:
    if metric == "nai":
        text = DASH if figure.value is None else _signed(f"{figure.value:.2f}")
        if figure.value is not None and figure.interval is not None:
            text += _signed(f" [{figure.interval[0]:.2f}, {figure.interval[1]:.2f}]")
        return Cell(text, figure.value)
    return Cell(with_interval(figure, metric), figure.value)


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _behind(model: ModelScore, metric: str) -> Cell:
    value, interval = model.behind.value, model.behind.interval
    if value is None:
        return Cell("", 0.0 if model.role == "model" else None)
    in_points = metric in IN_PERCENT
    show = points if in_points else (lambda v: f"{v:.3g}")
    text = _signed(show(value))
    if interval is not None:
        text += _signed(f" [{show(interval[0])}, {show(interval[1])}]")
    return Cell(text, value, "level" if model.level else "")


def _tasks(own: Scores, model: ModelScore, key: str) -> Panel:
    """Return a model's tasks: value with interval between base and expert."""
    mine = {s.task: s for s in own.scores if s.model == model.name}
    base = {s.task: s for s in own.scores if s.model == "base"}
    experts = {s.task: s for s in own.scores if s.model == "experts"}
    rows: list[dict[str, Any]] = []
    for task in own.tasks:
        score = mine.get(task.name)
        if score is None:
            continue
        references = [
            (held.value.value, kind)
            for kind, source in (("base", base), ("experts", experts))
            if (held := source.get(task.name)) is not None and held.value.value is not None
        ]
        everyone = [s.value for s in own.scores if s.task == task.name]
        rows.append(
            {
                "task": task.name,
                "metric": task.metric + ("" if task.higher_is_better else " ↓"),
                "rows": task.rows,
                "chart": whisker(score.value, _ends(everyone), references),
                "value": Cell(with_interval(score.value, task.metric), score.value.value),
                "share": Cell(with_interval(score.share, "share"), score.share.value),
                "references": [format_value(v, task.metric) for v, _ in references],
            }
        )
    return Panel(key, model.name, rows)


def _radar(own: Scores, models: Sequence[ModelScore], key: str) -> dict[str, Any] | None:
    tasks = [t.name for t in own.tasks]
    if not 3 <= len(tasks) <= 24 or own.by != "share":
        return None
    held = {(s.model, s.task): s.share.value for s in own.scores}
    series = [(m.name, [held.get((m.name, t)) for t in tasks]) for m in models]
    whole = [
        (n, [v for v in values if v is not None]) for n, values in series if None not in values
    ]
    if not whole:
        return None
    legend = [Legend(name, style_of(i)) for i, (name, _) in enumerate(whole)]
    return {"chart": radar(tasks, whole, key), "legend": legend}


# --- α ---


def _curve(curve: Curve, index: int) -> dict[str, Any]:
    names = list(dict.fromkeys(name for p in curve.points for name in p.parts))
    return {
        "curve": curve,
        "chart": curve_chart(curve, f"alpha-{index}"),
        "parts": _parts(curve, names, f"alpha-{index}-parts"),
        "legend": [Legend(name, style_of(i)) for i, name in enumerate(names)],
        "names": names,
        "rows": [
            {
                "scale": Cell(f"{p.scale:.4g}", p.scale),
                "value": Cell(DASH if p.value is None else f"{p.value:.4g}", p.value),
                "parts": [
                    Cell(DASH if v is None else f"{v:.4g}", v)
                    for v in (p.parts.get(name) for name in names)
                ],
                "chosen": p.scale == curve.chosen,
            }
            for p in curve.points
        ],
    }


def _parts(curve: Curve, names: Sequence[str], key: str) -> Any:
    """Return what each task changes by, against its own value at the chosen α."""
    chosen = next((p.parts for p in curve.points if p.scale == curve.chosen), {})
    series = [
        (name, [(p.scale, v - at) for p in curve.points
                if (v := p.parts.get(name)) is not None and p.scale > 0], style_of(i))
        for i, name in enumerate(names)
        if (at := chosen.get(name)) is not None
    ]  # fmt: skip
    every = [point for _, own, _ in series for point in own]
    if len(every) < 2:
        return None
    axes = (scale_axis([x for x, _ in every]), axes_of(every)[1])
    title = f"{curve.name}: each task's figure, less its own at the chosen α"
    return line_chart(title, series, axes, ("scale α", "change from the chosen α"), key)


# --- layers ---


def _layers(report: Report) -> dict[str, Any] | None:
    notes = [note for own in report.maps for note in own.notes]
    return {"panels": map_panels(report.maps), "notes": notes} if report.maps else None


# --- spectra ---


def _spectra(spectra: Sequence[Spectra], data: _Data) -> dict[str, Any] | None:
    """Return the first layer's chart; of the others only the paths, on the same axes."""
    every = [(float(p), v) for s in spectra for line in s.lines
             for p, v in zip(line.positions, line.values, strict=True)]  # fmt: skip
    if not every:
        return None
    axes = axes_of(every, log_x=True, log_y=True)
    top = max(v for _, v in every)
    x, y = axes[0], Axis(max(axes[1].low, top * 1e-4), top, axes[1].start, axes[1].stop, True)
    names = list(dict.fromkeys((line.name, line.role) for s in spectra for line in s.lines))
    kinds = {pair: _spectrum_kind(pair, i) for i, pair in enumerate(names)}

    def paths(own: Spectra) -> list[str]:
        held = {(line.name, line.role): line for line in own.lines}
        return [_path(line, x, y) if (line := held.get(pair)) is not None else "" for pair in names]

    first = spectra[0]
    data.spectra = [paths(own) for own in spectra]
    drawn = {(line.name, line.role): line for line in first.lines}
    lines: list[tuple[str, list[tuple[float, float]], str]] = []
    for pair in names:
        own = drawn.get(pair)
        dots = [] if own is None else [*zip(map(float, own.positions), own.values, strict=True)]
        # At least two points: the script gives this line the paths of other layers.
        lines.append((pair[0], dots * (2 if len(dots) == 1 else 1), f"spectrum {kinds[pair]}"))
    return {
        "layers": [own.layer for own in spectra],
        "chart": line_chart(
            "Singular values against their position in the chosen layer", lines, (x, y),
            ("position of the singular value", "singular value σ"), "spectra-chart",
        ),
        "legend": [
            Legend(name, kinds[name, role], {"expert": "", "sum": "", "merged": "merged"}[role])
            for name, role in names
        ],
    }  # fmt: skip


def _path(line: Line, x: Axis, y: Axis) -> str:
    ends = [(x.at(p), y.beyond(v)) for p, v in zip(line.positions, line.values, strict=True)]
    return clipped_path(ends * (2 if len(ends) == 1 else 1), y.stop, y.start)


def _spectrum_kind(pair: tuple[str, str], index: int) -> str:
    role = {"expert": style_of(index), "sum": "line sum", "merged": f"{style_of(index)} heavy"}
    return role[pair[1]]


# --- solvers ---


def _residuals(residuals: Sequence[Residuals]) -> dict[str, Any] | None:
    curves = [
        (r, [(float(i), v) for i, v in enumerate(r.residuals) if v is not None and v > 0])
        for r in residuals
    ]
    drawn = [(r, own) for r, own in curves if own]
    every = [point for _, own in drawn for point in own]
    if not every:
        return None
    ends = {id(r): r.residuals[-1] for r in residuals}

    def worst(r: Residuals) -> float:
        end = ends[id(r)]
        return math.inf if end is None else end

    ranked = sorted(residuals, key=worst, reverse=True)
    models = list(dict.fromkeys(r.model for r in residuals))
    marked = {id(r) for r in ranked[:3]}
    step = math.ceil(len(drawn) / MOST_RESIDUALS)
    shown = [pair for i, pair in enumerate(drawn) if i % step == 0 or id(pair[0]) in marked]
    series = [
        (f"{r.model}, {r.tensor}", own, f"{style_of(models.index(r.model))} faint")
        for r, own in shown
        if id(r) not in marked
    ]
    series += [
        (f"{r.model}, {r.tensor}", own, f"{style_of(models.index(r.model))} heavy")
        for r, own in shown
        if id(r) in marked
    ]
    chart = line_chart(
        "Relative residual against the step of conjugate gradients", series,
        axes_of(every, log_y=True), ("step", "relative residual"), "residual-chart",
    )  # fmt: skip
    return {
        "chart": chart,
        "legend": [Legend(name, style_of(i)) for i, name in enumerate(models)],
        "count": len(residuals),
        "rows": [
            {
                "model": r.model,
                "tensor": r.tensor,
                "status": r.status,
                "steps": Cell(str(len(r.residuals) - 1), len(r.residuals) - 1),
                "last": Cell("not finite" if ends[id(r)] is None else f"{ends[id(r)]:.1e}",
                             ends[id(r)]),
            }
            for r in ranked[:12]
        ],
    }  # fmt: skip


# --- routing ---


def _routing(own: Routing, index: int) -> dict[str, Any]:
    tasks = list(own.decisions) or list(own.confusion)
    chance = own.chance or 0.0
    depth = None
    if own.depth:
        x_last, (left, right, bottom, top) = len(own.depth) - 1, box()
        held = [v for d in own.depth for v in d.shares.values()]
        low = max(0.0, math.floor((min(*held, chance) - 0.02) * 10) / 10)
        axes = (Axis(0, max(x_last, 1), left, right), Axis(100 * low, 100, bottom, top))
        names = list(dict.fromkeys(n for d in own.depth for n in d.shares))
        series = [
            (name, [(float(i), 100 * d.shares[name]) for i, d in enumerate(own.depth)
                    if name in d.shares], style_of(i))
            for i, name in enumerate(names)
        ]  # fmt: skip
        if chance:
            ends = [(0.0, 100 * chance), (float(max(x_last, 1)), 100 * chance)]
            series.append(("by chance", ends, "line chance"))
        depth = {
            "chart": line_chart("Share routed right over the depth of the network", series, axes,
                                ("block, from the input on", "routed right, %"), f"r{index}-depth"),
            "legend": [Legend(name, style_of(i)) for i, name in enumerate(names)]
            + ([Legend("by chance", "line chance")] if chance else []),
        }  # fmt: skip
    return {
        "own": own,
        "key": f"r{index}",
        "how": None if own.measured is None else "measured on data" if own.measured
        else "estimated from statistics",
        "rows": [
            {
                "task": task,
                "share": Cell(format_share(own.decisions.get(task)), own.decisions.get(task)),
                "samples": Cell(f"{own.samples.get(task, 0):,}", own.samples.get(task)),
                "chart": whisker(Figure(value=own.decisions.get(task)), (0.0, 1.0),
                                 [(chance, "base")]),
            }
            for task in tasks
        ],
        "chance": format_share(own.chance),
        "confusion": confusion_table(own),
        "depth": depth,
    }  # fmt: skip


# --- the rest ---


def _tensors(report: Report) -> dict[str, Any] | None:
    if not report.tensors:
        return None
    rows = report.tensors[:MOST_TENSORS]
    several = len({row.model for row in report.tensors}) > 1
    return {
        "rows": rows,
        "left": len(report.tensors) - len(rows),
        "models": list(dict.fromkeys(row.model for row in rows)) if several else [],
        "treatments": sorted({row.treatment for row in rows}),
        "methods": sorted({row.method for row in rows}),
        "shapes": any(row.shape is not None for row in rows),
        "hashes": any(row.sha256 for row in rows),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    text = format_bytes(cost.value) if cost.unit == "bytes" else format_seconds(cost.value)
    return {"name": cost.name, "what": cost.what, "text": text}
