"""The report as Markdown: its sentences and tables, for a terminal, a card or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from eutectic.execution.model_card import written
from eutectic.recipes.units import format_bytes
from eutectic.reporting.page.page_record import Cost, Curve, Merge, PairTable, Report, Scores
from eutectic.reporting.page.shown_numbers import (
    DASH,
    format_seconds,
    format_share,
    format_value,
    gram_row,
    with_interval,
)
from eutectic.words import plain

MARK = "<!-- eutectic report -->"
MOST_TENSORS = 400  # rows of the table of tensors; the JSON has all
_FENCES = re.compile("`{3,}")


def markdown_page(report: Report) -> str:
    """Return a report as Markdown; what is a picture on the page is left out or is a table."""
    parts = [MARK, f"# {written(report.title)}"]
    headline = [f.text for f in report.verdict if f.level == "headline"]
    parts += [f"**{written(text)}**" for text in headline]
    signs = {"bad": "Look at: ", "good": "", "info": ""}
    told = [f"- {signs[f.level]}{written(f.text)}" for f in report.verdict if f.level in signs]
    parts += ["\n".join(told)] if told else []
    following = [f for f in report.verdict if f.level == "next"]
    if following:
        lines = [
            f"{i}. {written(f.text)}" + (f" `{f.command}`" if f.command else "")
            for i, f in enumerate(following, start=1)
        ]
        parts += ["## What to try next", "\n".join(lines)]
    for scores in report.scores:
        parts += _scores(scores)
    parts += _curves(report.curves)
    for pairs in report.pairs:
        parts += _pairs(pairs)
    parts += _routing(report)
    parts += _tensors(report)
    for merge in report.merges:
        parts += _merge(merge)
    if report.data:
        rows = [[r.name, r.use, r.examples, r.fingerprint[:16]] for r in report.data]
        parts += ["## Data", _table(["name", "use", "rows", "fingerprint"], rows)]
    if report.grams:
        keys = ("of", "layer", "width", "tokens", "kept", "left", "size")
        rows = [[row[key] for key in keys] for row in map(gram_row, report.grams)]
        parts += ["## How inputs are kept", _table(["of", *_GRAM_COLUMNS], rows)]
    if report.costs:
        parts += ["## Costs", _table(["of", "what", "how much"], map(_cost, report.costs))]
    sources = [[s.name, s.kind, s.path] for s in report.sources]
    parts += ["## Sources", _table(["name", "kind", "path"], sources)]
    parts.append(f"Made by eutectic {written(report.eutectic)}.")
    return "\n\n".join(parts) + "\n"


_GRAM_COLUMNS = ("layer", "inputs", "tokens", "kept", "beside directions", "size")


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headers, ["---"] * len(headers)]
    lines += [[DASH if cell is None else written(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(own: Scores) -> list[str]:
    metrics = list(dict.fromkeys(task.metric for task in own.tasks))
    metric = metrics[0] if len(metrics) == 1 else "metric"
    rows = [
        [m.name + (" (best)" if m.name == own.best else " (level)" if m.level else ""),
         with_interval(m.share, "share"), with_interval(m.mean, metric),
         DASH if m.nai.value is None else f"{m.nai.value:.2f}"]
        for m in own.models
    ]  # fmt: skip
    held = {(s.model, s.task): s for s in own.scores}
    each = [
        [m.name]
        + [
            format_value(s.value.value, t.metric) if (s := held.get((m.name, t.name))) else DASH
            for t in own.tasks
        ]
        for m in own.models
    ]
    title = f"## Models, {written(own.split)} rows of {written(own.name)}"
    headers = ["model", "of the experts [95 %]", f"mean {written(metric)} [95 %]", "NAI"]
    tasks = [f"{written(t.name)}{'' if t.higher_is_better else ' ↓'}" for t in own.tasks]
    notes = [f"- {written(note)}" for note in own.notes]
    found = [title, _table(headers, rows), _table(["model", *tasks], each)]
    return [*found, *(["\n".join(notes)] if notes else [])]


def _curves(curves: Sequence[Curve]) -> list[str]:
    if not curves:
        return []
    rows = [
        [c.name if c.symbol == "α" else f"{c.name} ({c.symbol})",
         f"{c.chosen:.4g}{' (at the edge)' if c.at_edge else ''}", len(c.points),
         f"{c.points[0].scale:.3g} to {c.points[-1].scale:.3g}", c.objective]
        for c in curves
    ]  # fmt: skip
    return ["## The scale α", _table(["search", "α", "values", "range", "objective"], rows)]


def _pairs(pairs: PairTable) -> list[str]:
    rows = [
        [name, *(None if value is None else f"{value:.3g}" for value in line)]
        for name, line in zip(pairs.names, pairs.values, strict=True)
    ]
    headers = ["", *map(written, pairs.names)]
    return [f"## {pairs.label}", pairs.meaning, _table(headers, rows)]


def _routing(report: Report) -> list[str]:
    parts: list[str] = []
    for own in report.routing:
        how = "" if own.measured is None else "measured" if own.measured else "estimated"
        parts.append(f"## Routing of {written(own.name)}")
        told = f"{own.layers} layers, router: {written(own.router)}"
        parts.append(f"{told}; {how}, by chance {format_share(own.chance)}." if how else told + ".")
        if own.decisions:
            rows = [[t, format_share(v)] for t, v in own.decisions.items()]
            parts.append(_table(["task", "routed right"], rows))
    return parts


def _tensors(report: Report) -> list[str]:
    if not report.tensors:
        return []
    rows = [
        [t.model, t.name, t.treatment, t.method, None if t.scale is None else f"{t.scale:.4g}"]
        for t in report.tensors[:MOST_TENSORS]
    ]
    left = len(report.tensors) - len(rows)
    more = [f"{left:,} further tensors are in the JSON."] if left else []
    return ["## Tensors", _table(["model", "tensor", "treatment", "method", "α"], rows), *more]


def _merge(merge: Merge) -> list[str]:
    parts = [f"## Where {written(merge.name)} comes from"]
    if merge.parents:
        rows = [[p.role, p.path, p.licence, p.fingerprint[:16]] for p in merge.parents]
        parts.append(_table(["role", "model", "licence", "fingerprint"], rows))
    if merge.versions:
        told = [f"{name} {written(version)}" for name, version in merge.versions.items()]
        parts.append(f"Made with {', '.join(told)}.")
    if merge.recipe:
        recipe = plain(merge.recipe)
        fence = "`" * max(3, 1 + max(map(len, _FENCES.findall(recipe)), default=0))
        parts.append(f"{fence}yaml\n{recipe}{fence}")
    parts += ["\n".join(f"- {written(note)}" for note in merge.notes)] if merge.notes else []
    return parts


def _cost(cost: Cost) -> list[str]:
    shown = format_bytes(int(cost.value)) if cost.unit == "bytes" else format_seconds(cost.value)
    return [cost.name, cost.what, shown]
