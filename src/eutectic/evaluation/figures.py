"""From outcomes to results: metrics with paired bootstrap intervals, relative to the experts."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from eutectic.errors import Note
from eutectic.evaluation.checkpoints import (
    EXPERTS_MEAN,
    Checkpoint,
    Checkpoints,
)
from eutectic.evaluation.identities import fingerprint, head_hashes, versions
from eutectic.evaluation.metrics import (
    LOWER_IS_BETTER,
    Array,
    Outcomes,
    metric_value,
    resampled_values,
)
from eutectic.evaluation.pairs import Pairs
from eutectic.evaluation.results import (
    CheckpointRecord,
    Difference,
    Mean,
    Result,
    Results,
    TaskRecord,
)
from eutectic.evaluation.task_files import Task
from eutectic.words import public_path

CONFIDENCE = (2.5, 97.5)
_BLOCK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Draws:
    """A figure and its bootstrap replicates `[resamples]`; NaN where undefined."""

    value: float
    replicates: Array

    def error(self) -> float | None:
        """Return the standard error: the deviation of the replicates that are defined, or None."""
        known = self.replicates[np.isfinite(self.replicates)]
        return float(known.std(ddof=1)) if np.isfinite(self.value) and len(known) > 1 else None

    def interval(self) -> tuple[float, float] | None:
        """Return the percentile interval over the replicates that are defined, or None."""
        known = self.replicates[np.isfinite(self.replicates)]
        if not np.isfinite(self.value) or not len(known):
            return None
        low, high = np.percentile(known, CONFIDENCE)
        return float(low), float(high)


def draw(task: Task, outcomes: Outcomes, seed: int, resamples: int) -> Draws:
    """Return the task's metric and its replicates.

    Rows are drawn with replacement, by a generator of (seed, task name) alone: every checkpoint is
    scored on the same resamples, so that ratios and differences are paired. Time and memory:
    resamples × rows, in blocks.
    """
    rows = len(outcomes.predictions)
    generator = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    step = max(1, _BLOCK_ELEMENTS // rows)
    blocks: list[Array] = [np.empty(0)]
    for start in range(0, resamples, step):
        drawn = generator.integers(0, rows, (min(step, resamples - start), rows))
        blocks.append(resampled_values(task.formula, outcomes, drawn))
    return Draws(metric_value(task.formula, outcomes), np.concatenate(blocks))


def compare(
    task: Task, own: Draws, expert: Draws | None, base: Draws | None
) -> tuple[Draws, Draws]:
    """Return the value normalised by the expert's, and NAI = (own − base) / (expert − base).

    A share of an expert that is not above 0 (a correlation may be below) is undefined. Where the
    expert is worse than the base, a larger NAI is a worse model.
    """
    if expert is None:
        return _undefined(own), _undefined(own)
    if task.formula in LOWER_IS_BETTER:
        normalized = _quotient(expert, own)
    else:
        above = np.where(expert.replicates > 0, expert.replicates, np.nan)
        normalized = _quotient(own, Draws(expert.value if expert.value > 0 else np.nan, above))
    if base is None:
        return normalized, _undefined(own)
    return normalized, _quotient(_difference(own, base), _difference(expert, base))


def over_tasks(
    tasks: Sequence[Task], figures: Mapping[str, Sequence[Draws]]
) -> tuple[Draws, Draws, Draws]:
    """Return the means over tasks; each replicate averages one resample of every task.

    The mean of values is undefined when some metrics are better high and others better low; a mean
    of normalised values or NAI is undefined when one of them is.
    """

    def averaged(parts: Sequence[Draws]) -> Draws:
        value = float(np.mean([part.value for part in parts]))
        return Draws(value, np.mean([part.replicates for part in parts], axis=0))

    value, normalized, nai = map(averaged, zip(*(figures[t.name] for t in tasks), strict=True))
    mixed = len({task.formula in LOWER_IS_BETTER for task in tasks}) > 1
    return _undefined(value) if mixed else value, normalized, nai


def _described(figures: Sequence[Draws]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, figure in zip(("value", "normalized", "nai"), figures, strict=False):
        found[key] = figure.value if np.isfinite(figure.value) else None
        found["interval" if key == "value" else f"{key}_interval"] = figure.interval()
    return found


def _with_error(figures: Sequence[Draws]) -> dict[str, Any]:
    return _described(figures) | {"standard_error": figures[0].error()}


def _as_difference(figures: Sequence[Draws]) -> dict[str, Any]:
    errors = {"normalized_standard_error": figures[1].error()}
    return _with_error(figures) | errors


def _undefined(like: Draws) -> Draws:
    return Draws(float("nan"), np.full(len(like.replicates), np.nan))


def _difference(left: Draws, right: Draws) -> Draws:
    return Draws(left.value - right.value, left.replicates - right.replicates)


def _quotient(left: Draws, right: Draws) -> Draws:
    value = left.value / right.value if right.value != 0 else float("nan")
    unknown = np.full(len(left.replicates), np.nan)
    known = right.replicates != 0
    return Draws(value, np.divide(left.replicates, right.replicates, out=unknown, where=known))


def _checkpoint_record(checkpoint: Checkpoint, among: Checkpoints) -> CheckpointRecord:
    return CheckpointRecord(
        name=checkpoint.name,
        role=checkpoint.role,
        path=public_path(checkpoint.folder),
        fingerprint=fingerprint(checkpoint.folder, among.base),
        routing=among.routing if checkpoint.routed else None,
    )


def results_of(
    pairs: Pairs,
    outcomes: Mapping[tuple[str, str], Outcomes],
    known: Mapping[str, CheckpointRecord] | None = None,
) -> Results:
    """Return the results of an evaluation; `known` are checkpoints that are no longer there."""
    settings, tasks, checkpoints = pairs.settings, pairs.tasks, pairs.checkpoints
    draws = {
        (c.name, t.name): draw(t, outcomes[c.name, t.name], settings.seed, settings.resamples)
        for c, t in pairs
    }
    figures: dict[str, dict[str, tuple[Draws, Draws, Draws]]] = {}
    without_gain: dict[str, tuple[float, float]] = {}
    records: list[Result] = []
    for checkpoint, task in pairs:
        own = draws[checkpoint.name, task.name]
        named = task.expert_name in checkpoints.experts
        expert = draws.get((task.expert_name, task.name)) if named else None
        below = draws.get(("base", task.name))
        relative = compare(task, own, expert, below)
        sign = -1 if task.formula in LOWER_IS_BETTER else 1
        if expert is own and below is not None and sign * (own.value - below.value) <= 0:
            without_gain[task.name] = (own.value, below.value)
        row = EXPERTS_MEAN if checkpoint.role == "expert" else checkpoint.name
        figures.setdefault(row, {})[task.name] = (own, *relative)
        rows = len(outcomes[checkpoint.name, task.name].predictions)
        described = _with_error(figures[row][task.name])
        records.append(Result(checkpoint=checkpoint.name, task=task.name, n=rows, **described))
    together = {
        row: over_tasks([tasks[name] for name in found], found) for row, found in figures.items()
    }
    compared = [row for row in together if row != EXPERTS_MEAN]
    scored = {r.task: r.n for r in records}
    return Results(
        **{n: getattr(settings, n) for n in ("split", "limit", "dtype", "seed", "resamples")},
        versions=versions(with_harness=any(t.kind == "lm-eval" for t in tasks.values())),
        checkpoints=tuple(
            (known or {}).get(c.name) or _checkpoint_record(c, checkpoints) for c in checkpoints.all
        ),
        tasks=tuple(
            TaskRecord(
                name=t.name,
                kind=t.kind,
                expert=t.expert_name,
                metric=t.metric_name,
                higher_is_better=t.formula not in LOWER_IS_BETTER,
                split=settings.split,
                n=scored.get(t.name, 0),
                data_hash=pairs.hashes.get(t.name, ""),
                splits=pairs.rows[t.name],
                head_hashes=head_hashes(t),
            )
            for t in tasks.values()
        ),
        results=tuple(records),
        means=tuple(
            Mean(checkpoint=row, tasks=tuple(figures[row]), **_with_error(found))
            for row, found in together.items()
        ),
        differences=tuple(
            # The interval is that of the paired replicates.
            Difference(
                checkpoint=row,
                other=other,
                **_as_difference([*map(_difference, together[row][:2], together[other][:2])]),
            )
            for row, other in permutations(compared, 2)
        ),
        notes=(str(Note("no_gain", numbers=without_gain)),) if without_gain else (),
    )
