"""What the numbers say, in sentences: the best model, what is level with it, what to try next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eutectic.reporting.page.findings import POOR, WEAK, finding, named
from eutectic.reporting.page.next_steps import what_next
from eutectic.reporting.page.page_record import (
    Curve,
    Finding,
    LayerMap,
    Merge,
    ModelScore,
    Residuals,
    Routing,
    Scores,
)
from eutectic.reporting.page.shown_numbers import (
    format_share,
    format_value,
    points,
    with_interval,
)
from eutectic.reporting.page.source_views import ClosedFormView
from eutectic.words import counted, few, percent

SOLVED = 1e-2  # a relative residual above it is not solved
_MOST = 3
_WARNING = "warning: "  # how a merge's notes begin where its result may be wrong
_UNPAIRED = (
    " The results hold no paired differences, so that this is cautious: models that were scored on "
    "the same rows differ more surely than their intervals say."
)


def verdict(
    scores: Sequence[Scores],
    curves: Sequence[Curve],
    merges: Sequence[Merge],
    rest: Mapping[str, Any],
) -> list[Finding]:
    """Return the sentences, the headline first and what to try next last.

    `rest` holds `routing`, `residuals`, `maps` and `statistics` (whether there are any).
    """
    routing: Sequence[Routing] = rest["routing"]
    maps: Sequence[LayerMap] = rest["maps"]
    found: list[Finding] = []
    for own in scores:
        found += _of_scores(own, alone=len(scores) == 1)
    found += _of_merges(merges, bool(scores))
    found += _of_curves(curves)
    found += _of_closed_forms(rest["closed"])
    found += _of_residuals(rest["residuals"])
    for routed in routing:
        found += _of_routing(routed)
    found += _of_maps(maps)
    found += what_next(scores, merges, curves, rest)
    order: dict[str, int] = {"headline": 0, "bad": 1, "good": 2, "info": 3, "next": 4}
    once = {(finding.level, finding.text): finding for finding in reversed(found)}
    told = [finding for finding in found if once[finding.level, finding.text] is finding]
    return sorted(told, key=lambda finding: order[finding.level])


def _of_scores(own: Scores, *, alone: bool) -> Iterator[Finding]:
    models = {m.name: m for m in own.models}
    merged = [m for m in own.models if m.role == "model"]
    if own.best is None:
        yield finding(
            "no_model", "headline",
            "Only the base and the experts were measured: no merged model is among these results.",
        )  # fmt: skip
        return
    best = models[own.best]
    yield finding(
        "best", "headline", ("" if alone else f"{own.name}: ") + _headline(own, best, len(merged)),
        (best.name,),
        share=best.share.value, mean=best.mean.value, models=len(merged),
    )  # fmt: skip
    # Beside other results, whose sentences come between, every sentence names its model.
    it = "it" if alone else best.name
    yield from _of_level(own, it, [m for m in merged if m is not best])
    yield from _of_tasks(own, best, it)


def _headline(own: Scores, best: ModelScore, count: int) -> str:
    metric, higher = _metric(own)
    text = f"{best.name} is the best of {count} models" if count > 1 else f"{best.name}"
    mean = f"a mean {metric} of {with_interval(best.mean, metric)}"
    joined = "with" if count > 1 else "has"
    if best.share.value is not None:
        text += f" {'with' if count > 1 else 'reaches'} {with_interval(best.share, 'share')} of " \
            "the experts' figures"  # fmt: skip
        text += f", {mean}" if best.mean.value is not None else ""
    else:
        text += f" {joined} {mean}"
    references = [
        f"{name} {format_value(m.mean.value, metric)}"
        for name, m in (("base", named(own, "base")), ("experts", named(own, "experts")))
        if m is not None and m.mean.value is not None
    ]
    beside = f" ({', '.join(references)})" if references else ""
    lower = "" if higher else "; lower is better"
    tasks = counted(len(own.tasks), "task")
    return f"{text}{beside}, on {tasks}, {own.split} rows{lower}."


def _metric(own: Scores) -> tuple[str, bool]:
    """Return the metric that all tasks share, or the word for several, and its direction."""
    names = list(dict.fromkeys(task.metric for task in own.tasks))
    return (names[0] if len(names) == 1 else "metric"), all(t.higher_is_better for t in own.tasks)


def _of_level(own: Scores, it: str, others: Sequence[ModelScore]) -> Iterator[Finding]:
    if not others:
        return
    level = [m for m in others if m.level]
    known = [m for m in others if m.behind.value is not None and m.behind.interval is not None]
    paired = all(m.paired for m in known)
    how = "" if paired else _UNPAIRED
    if level:
        names = few([m.name for m in level])
        verb = "is" if len(level) == 1 else "are"
        yield finding(
            "level", "info",
            f"{names} {verb} not distinguishable from {it}: the 95 % interval of the "
            f"difference holds 0.{how} Take the one that is cheapest to make.",
            [m.name for m in level], count=len(level),
        )  # fmt: skip
        return
    if not known:
        return
    next_best = known[0]
    shown = _difference(own, next_best)
    rest = "every other model" if it == "it" else f"every other model of {own.name}"
    yield finding(
        "ahead", "good",
        f"{_first(it)} is ahead of {rest}; the closest, {next_best.name}, is {shown} behind.{how}",
        (next_best.name,), behind=next_best.behind.value,
    )  # fmt: skip


def _first(it: str) -> str:
    return "It" if it == "it" else it


def _difference(own: Scores, model: ModelScore) -> str:
    value, interval = model.behind.value, model.behind.interval
    assert value is not None and interval is not None
    if own.by == "share" or _metric(own)[0] in ("accuracy", "macro_f1", "exact_match"):
        low, high = sorted(abs(v) for v in interval)
        return f"{points(abs(value))} points [{points(low)}, {points(high)}]"
    return f"{abs(value):.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _of_tasks(own: Scores, best: ModelScore, it: str) -> Iterator[Finding]:
    mine = {s.task: s for s in own.scores if s.model == best.name}
    below = {s.task: s for s in own.scores if s.model == "base"}
    shares = {t: s.share.value for t, s in mine.items() if s.share.value is not None}
    # Where no task lacks anything of its expert's, none is weak.
    if len(shares) > 1 and min(shares.values()) < 1:
        worst = min(shares, key=lambda t: shares[t])
        figure = mine[worst].share
        poor = shares[worst] < POOR
        yield finding(
            "worst_task", "bad" if poor else "info",
            f"The weakest task of {best.name} is {worst}, with {with_interval(figure, 'share')} of "
            "its expert's figure.",
            (worst,), share=shares[worst],
        )  # fmt: skip
    lost = [
        task.name
        for task in own.tasks
        if (one := _quality(mine.get(task.name), task.higher_is_better)) is not None
        and (other := _quality(below.get(task.name), task.higher_is_better)) is not None
        and one < other
    ]
    surely = [t for t in lost if not _within(mine[t].value.interval, below[t].value.value)]
    if surely:
        yield finding(
            "below_base", "bad",
            f"On {few(surely)}, {it} is below the base itself: there, merging lost what was known.",
            surely, count=len(surely),
        )  # fmt: skip
    perhaps = [t for t in lost if t not in surely]
    if perhaps:
        yield finding(
            "perhaps_below_base", "info",
            f"On {few(perhaps)}, {it} is below the base, which still lies within its 95 % "
            "interval.",
            perhaps, count=len(perhaps),
        )  # fmt: skip
    beats = [t for t, share in shares.items() if share > 1]
    if beats:
        text = "one task" if len(beats) == 1 else f"{len(beats)} of {len(shares)} tasks"
        yield finding(
            "above_expert", "good",
            f"{_first(it)} is above the task's own expert on {text} ({few(beats)}).",
            beats, count=len(beats),
        )  # fmt: skip


def _within(interval: Sequence[float] | None, value: float | None) -> bool:
    return interval is not None and value is not None and interval[0] <= value <= interval[1]


def _quality(score: Any, higher: bool) -> float | None:
    if score is None or score.value.value is None:
        return None
    return score.value.value if higher else -score.value.value


def _of_merges(merges: Sequence[Merge], measured: bool) -> Iterator[Finding]:
    """Yield what was merged, unless models were measured, which says more; and what is wrong."""
    if len(merges) > _MOST and not measured:
        done = sum(not merge.planned for merge in merges)
        plans = len(merges) - done
        parts = [counted(done, "merged model")] if done else []
        parts += [counted(plans, "plan")] if plans else []
        names = few([merge.name for merge in merges])
        yield finding(
            "merges", "headline", f"{' and '.join(parts)}: {names}.", [m.name for m in merges],
            merged=done, planned=plans,
        )  # fmt: skip
    elif not measured:
        for merge in merges:
            yield finding(
                "merge", "headline", _merge_text(merge), (merge.name,), growth=merge.growth
            )
    for merge in merges:
        yield from _faults_of(merge)
    yield from _warnings_of(merges)


def _warnings_of(merges: Sequence[Merge]) -> Iterator[Finding]:
    """Yield what the merges warned of, each once; the rest of many is counted."""
    warned: dict[str, list[str]] = {}
    for merge in merges:
        for note in merge.notes:
            if note.startswith(_WARNING):
                warned.setdefault(note.removeprefix(_WARNING), []).append(merge.name)
    for text, names in list(warned.items())[:_MOST]:
        yield finding("warning", "bad", f"{few(names)}: {text}", names)
    if len(warned) > _MOST:
        more = counted(len(warned) - _MOST, "more warning")
        verb = "stands" if len(warned) == _MOST + 1 else "stand"
        yield finding(
            "more_warnings", "bad", f"{more} {verb} under “Where it comes from”.",
            count=len(warned) - _MOST,
        )  # fmt: skip


def _merge_text(merge: Merge) -> str:
    many = sum(merge.treatments.values())
    copied = merge.merged_by.get("copy", 0)
    scale = "" if merge.scale is None else f" at α = {merge.scale:.3g}"
    would = "would merge" if merge.planned else "merged"
    experts = len([p for p in merge.parents if p.role not in ("base", "initial")])
    of = f" of {experts} experts" if experts else ""
    rest = f"; {copied:,} are copied from the base" if copied else ""
    size = ""
    if merge.growth is not None:
        size = f" The change is {merge.growth:.3g} times the experts' mean norm."
    name = "" if merge.name == merge.method else f"{merge.name}: "
    taken = f"{many - copied:,} of {many:,} tensors{of}{scale}"
    return f"{name}{merge.method} {would} {taken}{rest}.{size}"


def _faults_of(merge: Merge) -> Iterator[Finding]:
    if merge.growth is not None and merge.bound is not None and merge.growth > merge.bound:
        yield finding(
            "exploded", "bad",
            f"{merge.name}: the change is {merge.growth:.3g} times the experts' mean norm, above "
            f"the bound of {merge.bound:.3g}: α is most likely too large.",
            (merge.name,), growth=merge.growth,
        )  # fmt: skip
    left = merge.shares.get("left", 0.0)
    if left > 0:
        yield finding(
            "left", "bad",
            f"{merge.name}: {percent(left)} of the experts' numbers were left behind; the table "
            "of tensors says which.",
            (merge.name,), share=left,
        )  # fmt: skip
    if merge.fallback:
        by = "" if merge.mostly_by == merge.method else f" to {merge.mostly_by}"
        yield finding(
            "fallback", "bad",
            f"{merge.name}: {percent(merge.fallback)} of what {merge.method} is for fell back{by}.",
            (merge.name,), share=merge.fallback,
        )  # fmt: skip


def _of_curves(curves: Sequence[Curve]) -> Iterator[Finding]:
    edges = [curve for curve in curves if curve.at_edge]
    inside = [curve for curve in curves if not curve.at_edge]
    for curve in edges if len(edges) <= _MOST else ():
        side = "smallest" if curve.chosen == curve.points[0].scale else "largest"
        yield finding(
            "edge", "bad",
            f"{curve.name}: {curve.symbol} = {curve.chosen:.3g} is the {side} value that was "
            "tried; the optimum may lie outside.",
            (curve.name,), scale=curve.chosen,
        )  # fmt: skip
    if len(edges) > _MOST:
        yield finding(
            "edges", "bad",
            f"{len(edges)} searches ended at the smallest or largest value that was tried, beyond "
            f"which the optimum may lie: {_values(edges)}.",
            [curve.name for curve in edges], count=len(edges),
        )  # fmt: skip
    for curve in inside if len(inside) <= _MOST else ():
        by = f" by {curve.search}" if curve.search else ""
        yield finding(
            "scale", "info",
            f"{curve.name}: {curve.symbol} = {curve.chosen:.3g} was chosen{by} among "
            f"{len(curve.points)} values.",
            (curve.name,), scale=curve.chosen,
        )  # fmt: skip
    if len(inside) > _MOST:
        yield finding(
            "scales", "info",
            f"{len(inside)} searches found their best value: {_values(inside)}.",
            [curve.name for curve in inside], count=len(inside),
        )  # fmt: skip


def _values(curves: Sequence[Curve]) -> str:
    """Say what several searches chose."""
    return few([f"{c.name} {c.symbol} = {c.chosen:.3g}" for c in curves], 12)


def _of_closed_forms(closed: Sequence[tuple[str, ClosedFormView]]) -> Iterator[Finding]:
    for name, own in closed if len(closed) <= _MOST else ():
        text = f"{name}: α = {own.scale:.3g} was computed by {own.search}, without trying values."
        yield finding("closed_form", "info", text, (name,), scale=own.scale)
    if len(closed) > _MOST:
        found = few([f"{name} α = {own.scale:.3g} ({own.search})" for name, own in closed], 12)
        yield finding(
            "closed_forms", "info",
            f"{len(closed)} values of α were computed, without trying values: {found}.",
            [name for name, _ in closed], count=len(closed),
        )  # fmt: skip


def _of_residuals(residuals: Sequence[Residuals]) -> Iterator[Finding]:
    ends = {f"{r.model}, {r.tensor}": r.residuals[-1] for r in residuals}
    bad = {n: v for n, v in ends.items() if v is None or v > SOLVED}
    if bad:
        sizes = {n: math.inf if v is None else v for n, v in bad.items()}
        worst = max(sizes, key=lambda n: sizes[n])
        value = bad[worst]
        shown = "not finite" if value is None else f"{value:.1e}"
        yield finding(
            "unsolved", "info",
            f"{len(bad)} of {len(ends)} linear systems stopped at a relative residual above "
            f"{SOLVED:g}, the worst at {shown} ({worst}). Matching stops early on purpose: see "
            "the curves.",
            (worst,), count=len(bad),
        )  # fmt: skip


def _of_routing(own: Routing) -> Iterator[Finding]:
    if not own.decisions or own.chance is None:
        return
    mean = sum(own.decisions.values()) / len(own.decisions)
    weakest = min(own.decisions, key=lambda t: own.decisions[t])
    bound = own.chance + WEAK * (1 - own.chance)
    how = "measured on data" if own.measured else "estimated from statistics"
    low = own.decisions[weakest] < bound
    yield finding(
        "routing", "bad" if low else "good",
        f"{own.name}: routers send {format_share(mean)} of the samples to the right expert on "
        f"average ({how}, by chance {format_share(own.chance)}); weakest is {weakest} with "
        f"{format_share(own.decisions[weakest])}.",
        (own.name, weakest), mean=mean, weakest=own.decisions[weakest],
    )  # fmt: skip


def _of_maps(maps: Sequence[LayerMap]) -> Iterator[Finding]:
    for own in maps:
        for measure in own.measures:
            if not measure.key.startswith("growth "):
                continue
            cells = [
                (value, row, column)
                for row, line in zip(own.rows, measure.values, strict=True)
                for column, value in zip(own.columns, line, strict=True)
                if value is not None
            ]
            value, row, column = max(cells)
            if value > _MOST:
                model = measure.key.removeprefix("growth ")
                yield finding(
                    "large_layer", "bad",
                    f"{model}: the largest change is {value:.3g} times the experts' mean, at {row}"
                    f" {column}; see the map.",
                    (model, row), growth=value,
                )  # fmt: skip
