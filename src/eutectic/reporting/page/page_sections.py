"""From the record to what the templates lay out: rows, panels and charts, section by section."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eutectic.recipes.units import format_bytes
from eutectic.reporting.page.heat_tables import Cell, confusion_table, map_panels, pair_panel
from eutectic.reporting.page.page_record import (
    Cost,
    Curve,
    Figure,
    Line,
    Report,
    Residuals,
    Routing,
    Spectra,
)
from eutectic.reporting.page.score_section import score_section
from eutectic.reporting.page.shown_numbers import DASH, format_seconds, format_share, gram_row
from eutectic.reporting.page.svg_charts import (
    Axis,
    Legend,
    axes_of,
    box,
    clipped_path,
    curve_chart,
    line_chart,
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


@dataclass
class _Data:
    """What scripts are given."""

    spectra: list[list[str]] = field(default_factory=list[list[str]])  # layer -> line -> path


def sections(report: Report) -> Sections:
    """Return the sections for which a report has data, in the order of the page."""
    data = _Data()
    known: list[tuple[str, str, Any]] = [
        (
            "models",
            "How good the models are",
            [score_section(s, i) for i, s in enumerate(report.scores)],
        ),
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
