"""From outcomes to the results that are published: figures, means and differences."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

from eutectic.errors import Note
from eutectic.evaluation.bootstrap import (
    Draws,
    compare,
    difference,
    draw,
    gain,
    mean,
    over_tasks,
    result,
)
from eutectic.evaluation.checkpoints import EXPERTS_MEAN
from eutectic.evaluation.identities import fingerprint, head_hashes, versions
from eutectic.evaluation.lm_eval_harness import harness_version
from eutectic.evaluation.metrics import LOWER_IS_BETTER, Outcomes
from eutectic.evaluation.pairs import Pairs
from eutectic.evaluation.results import CheckpointRecord, Results, TaskRecord


def results_of(pairs: Pairs, outcomes: Mapping[tuple[str, str], Outcomes]) -> Results:
    """Return the results of an evaluation.

    Args:
        pairs: all pairs, in order, with the settings.
        outcomes: (checkpoint, task) names -> what the checkpoint did with each row.
    """
    settings, tasks, checkpoints = pairs.settings, pairs.tasks, pairs.checkpoints
    draws = {
        (c.name, t.name): draw(t, outcomes[c.name, t.name], settings.seed, settings.resamples)
        for c, t in pairs
    }
    figures: dict[str, dict[str, tuple[Draws, Draws, Draws]]] = {}
    without_gain: dict[str, tuple[float, float]] = {}
    for checkpoint, task in pairs:
        own = draws[checkpoint.name, task.name]
        named = task.expert_name in checkpoints.experts
        expert = draws.get((task.expert_name, task.name)) if named else None
        below = draws.get(("base", task.name))
        relative = compare(task, own, expert, below)
        if expert is own and below is not None and gain(task, own, below) <= 0:
            without_gain[task.name] = (own.value, below.value)
        row = EXPERTS_MEAN if checkpoint.role == "expert" else checkpoint.name
        figures.setdefault(row, {})[task.name] = (own, *relative)
    records = [
        result(
            c.name,
            t,
            len(outcomes[c.name, t.name].predictions),
            figures[EXPERTS_MEAN if c.role == "expert" else c.name][t.name],
        )
        for c, t in pairs
    ]
    own_tasks = {row: [tasks[name] for name in found] for row, found in figures.items()}
    together = {row: over_tasks(own_tasks[row], found) for row, found in figures.items()}
    compared = [row for row in together if row != EXPERTS_MEAN]
    scored = {r.task: r.n for r in records}
    return Results(
        split=settings.split,
        limit=settings.limit,
        dtype=settings.dtype,
        seed=settings.seed,
        resamples=settings.resamples,
        versions=versions() | harness_version(tasks.values()),
        checkpoints=tuple(
            CheckpointRecord(
                name=c.name,
                role=c.role,
                path=str(c.folder),
                fingerprint=fingerprint(c.folder, checkpoints.base),
                routing=checkpoints.routing if c.routed else None,
            )
            for c in checkpoints.all
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
        means=tuple(mean(row, own_tasks[row], found) for row, found in together.items()),
        differences=tuple(
            difference(row, other, together[row], together[other])
            for row, other in permutations(compared, 2)
        ),
        notes=(str(Note("no_gain", numbers=without_gain)),) if without_gain else (),
    )
