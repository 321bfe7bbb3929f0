"""From results to what a page says of models: who is best, and who cannot be told from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from eutectic.evaluation.results import Difference, Mean, Results
from eutectic.reporting.page.page_record import (
    Figure,
    ModelScore,
    Role,
    Score,
    Scores,
    TaskInfo,
)
from eutectic.reporting.page.public_texts import without_private_paths
from eutectic.reporting.page.source_views import ComparisonView

_EXPERTS = "experts"  # the mean of the experts, each on its own tasks


def scores_of(results: Results, name: str, compared: ComparisonView | None = None) -> Scores:
    """Return the models, ranked by their share of the experts' figures.

    Where a model has no share, all are ranked by the mean of the metric. Differences to the best
    are the file's paired ones; where it has none, they are made of the two intervals as if the
    models had been measured on different rows, which is cautious.
    """
    roles: dict[str, Role] = {c.name: c.role for c in results.checkpoints}
    means = {m.checkpoint: m for m in results.means}
    models = [n for n in means if roles.get(n) == "model"]
    shares = all(means[n].normalized is not None for n in models)
    higher = all(t.higher_is_better for t in results.tasks)
    sign = 1.0 if shares or higher else -1.0

    def quality(n: str) -> float:
        value = means[n].normalized if shares else means[n].value
        return -math.inf if value is None else sign * value

    ranked = sorted(models, key=quality, reverse=True)
    best = ranked[0] if ranked and quality(ranked[0]) > -math.inf else None
    notes = {} if compared is None else _notes(compared)
    paired = {d.checkpoint: d for d in results.differences if d.other == best}
    order = [n for n in ("base", _EXPERTS) if n in means] + ranked
    told = [
        _model(
            means[n],
            roles.get(n, "experts"),
            _behind(means, paired.get(n), (n, best), shares),
            notes.get(n, ""),
        )
        for n in order
    ]
    experts = {c.name for c in results.checkpoints if c.role == "expert"}
    return Scores(
        name=name,
        split=results.split,
        tasks=[
            TaskInfo(
                name=t.name,
                expert=t.expert,
                metric=t.metric,
                higher_is_better=t.higher_is_better,
                rows=t.n,
                data_hash=t.data_hash,
            )
            for t in results.tasks
        ],
        models=told,
        scores=[
            Score(
                model=_EXPERTS if r.checkpoint in experts else r.checkpoint,
                task=r.task,
                value=_figure(r.value, r.interval),
                share=_figure(r.normalized, r.normalized_interval),
            )
            for r in results.results
        ],
        best=best,
        resamples=results.resamples,
        by="share" if shares else "mean",
        notes=[without_private_paths(note) for note in _all_notes(results, compared)],
    )


def _all_notes(results: Results, compared: ComparisonView | None) -> list[str]:
    """Return the notes of results and of the comparison that they are of, each once."""
    if compared is None:
        return list(results.notes)
    failed = [f"{row.name} has no figures: {row.error}" for row in compared.rows if row.error]
    left = [f"{name} was left out: {why}" for name, why in compared.left_out.items()]
    return list(dict.fromkeys([*compared.notes, *results.notes, *failed, *left]))


def _notes(compared: ComparisonView) -> dict[str, str]:
    """Return row -> how its α was chosen."""
    return {
        row.name: f"α = {row.scale:.3g}" + (f", by {row.search}" if row.search else "")
        for row in compared.rows
        if row.scale is not None
    }


def _model(mean: Mean, role: Role, behind: tuple[Figure, bool, bool], note: str) -> ModelScore:
    figure, paired, level = behind
    return ModelScore(
        name=mean.checkpoint,
        role=role,
        mean=_figure(mean.value, mean.interval),
        share=_figure(mean.normalized, mean.normalized_interval),
        nai=_figure(mean.nai, mean.nai_interval),
        behind=figure,
        paired=paired,
        level=level,
        note=note,
    )


def _behind(
    means: Mapping[str, Mean],
    paired: Difference | None,
    names: tuple[str, str | None],
    shares: bool,
) -> tuple[Figure, bool, bool]:
    """Return (difference to the best, whether it is paired, whether its interval holds 0)."""
    name, best = names
    if best is None or name in (best, _EXPERTS):
        return Figure(), True, False
    if paired is not None:
        value, interval = paired.value, paired.interval
        if shares:
            value, interval = paired.normalized, paired.normalized_interval
        return _figure(value, interval), True, _holds_zero(interval)
    one, other = means[name], means[best]
    pair = [(m.normalized, m.normalized_interval) if shares else (m.value, m.interval)
            for m in (one, other)]  # fmt: skip
    (left, own), (right, its) = pair
    if left is None or right is None or own is None or its is None:
        return Figure(), False, False
    error = math.hypot(own[1] - own[0], its[1] - its[0]) / 2
    value = left - right
    interval = (value - error, value + error)
    return _figure(value, interval), False, _holds_zero(interval)


def _figure(value: float | None, interval: tuple[float, float] | None) -> Figure:
    """Return a figure; of a file of others, a number may not be finite."""
    if value is None or not math.isfinite(value):
        return Figure()
    known = interval is not None and all(map(math.isfinite, interval))
    return Figure(value=value, interval=interval if known else None)


def _holds_zero(interval: Sequence[float] | None) -> bool:
    return interval is not None and interval[0] <= 0 <= interval[1]
