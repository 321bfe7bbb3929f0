"""How good the models are: the rows, panels and charts of one results file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eutectic.reporting.page.heat_tables import Cell, Panel, common_metric, score_matrix
from eutectic.reporting.page.page_record import Figure, ModelScore, Scores
from eutectic.reporting.page.shown_numbers import (
    DASH,
    IN_PERCENT,
    format_value,
    points,
    with_interval,
)
from eutectic.reporting.page.svg_charts import Legend, radar, style_of, whisker


def score_section(own: Scores, index: int) -> dict[str, Any]:
    """Return what the page shows of one results file; `index` keeps its keys apart from others'."""
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
