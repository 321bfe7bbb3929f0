"""From measurements per matrix to what they say about the whole model, and of accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eutectic.execution.norms import Growth, growth_of
from eutectic.reporting.layers import plain, rounded
from eutectic.reporting.schema import (
    CorrelationValue,
    Interference,
    Layer,
    MergedSummary,
    Pairs,
    SarNai,
    Summary,
    TaskSummary,
)

Nai = Mapping[str, Mapping[str, float | None]]
FEWEST = 3  # two points always lie on a line
FLAT = 1e-6  # values this close to each other, relatively, differ by rounding


def summarise(layers: Sequence[Layer], nai: Nai | None = None) -> Summary:
    """Return means over layers per task and per merged model, and whole-model interference.

    Every layer counts the same; undefined values are left out. `nai` is of merged models' experts.
    """
    names = list(layers[0].experts)
    pairs = _interference(layers, names)
    merged = {n: _merged(layers, n, names, (nai or {}).get(n, {})) for n in layers[0].merged}
    correlation = None
    if nai is not None:
        found = correlate({n: m.task_sar for n, m in merged.items()}, nai)
        correlation = SarNai(
            overall=_value(found.overall),
            within={n: _value(c) for n, c in found.within.items()},
            means=_value(found.means),
        )
    return Summary(
        tasks={n: _task(layers, n, names, pairs) for n in names},
        merged=merged,
        interference=pairs,
        correlation=correlation,
    )


def average(
    values: Iterable[float | None], of: Callable[[list[float]], float] = statistics.fmean
) -> float | None:
    """Return the mean, or what `of` makes, of the values that are defined; None without any."""
    kept = [v for v in values if v is not None]
    return plain(of(kept)) if kept else None


def _task(
    layers: Sequence[Layer], name: str, names: Sequence[str], pairs: Interference
) -> TaskSummary:
    own = [layer.experts[name] for layer in layers]
    t = names.index(name)
    norm = math.hypot(*(s.norm for s in own))
    base = math.hypot(*(layer.base_norm for layer in layers))
    column = [row[t] for row in pairs.activation or ()]
    by: Literal["activation", "singular"] = "activation"
    if all(value is None for value in column):
        by, column = "singular", [row[t] for row in pairs.singular]
    others = [(v, n) for n, v in zip(names, column, strict=True) if n != name and v is not None]
    value, other = max(others, default=(None, None))
    return TaskSummary(
        norm=rounded(norm),
        relative_norm=plain(norm / base) if base else None,
        stable_rank=average(s.stable_rank for s in own),
        effective_rank=average(s.effective_rank for s in own),
        most_interfering=other,
        interference=value,
        by=by,
    )


def _merged(
    layers: Sequence[Layer], name: str, names: Sequence[str], nai: Mapping[str, float | None]
) -> MergedSummary:
    sar = {n: average(layer.alignment[name].ratio[n] for layer in layers) for n in names}
    return MergedSummary(
        sar=average(sar.values()),
        task_sar=sar,
        nai={n: nai[n] for n in names if n in nai},
        mean_nai=average(nai.get(n) for n in names),
        growth=None if (found := growth(layers, name)[0]) is None else rounded(found.ratio),
        rank=average(float(layer.alignment[name].rank) for layer in layers) or 0.0,
        effective_rank=average(layer.merged[name].effective_rank for layer in layers),
    )


def growth(layers: Sequence[Layer], model: str) -> tuple[Growth | None, list[Growth]]:
    """Return how large a merged model's change is in the whole, and in every matrix."""
    single = [
        growth_of(
            layer.name,
            layer.merged[model].norm ** 2,
            [spectrum.norm**2 for spectrum in layer.experts.values()],
        )
        for layer in layers
    ]
    whole = growth_of(
        "",
        math.fsum(layer.merged[model].norm ** 2 for layer in layers),
        [math.fsum(layer.experts[n].norm ** 2 for layer in layers) for n in layers[0].experts],
    )
    return whole, [one for one in single if one is not None]


def _interference(layers: Sequence[Layer], names: Sequence[str]) -> Interference:
    size = range(len(names))
    every = [layer.interference for layer in layers]
    activations = [i.activation for i in every if i.activation is not None]

    def over(
        tables: Sequence[Pairs], of: Callable[[list[float]], float] = statistics.fmean
    ) -> Pairs:
        return [[average((table[s][t] for table in tables), of) for t in size] for s in size]

    return Interference(
        cosine=_cosine(layers, names),
        overlap_left=over([i.overlap_left for i in every]),
        overlap_right=over([i.overlap_right for i in every]),
        sign_conflicts=over([i.sign_conflicts for i in every]),
        singular=over([i.singular for i in every]),
        # Medians: a layer that an expert hardly moves makes ratios of any size.
        activation=over(activations, statistics.median) if activations else None,
    )


def _cosine(layers: Sequence[Layer], names: Sequence[str]) -> Pairs:
    """Return the cosine of whole task vectors, matrices only: ⟨,⟩ and ‖‖² add up over layers."""

    def product(s: int, t: int) -> float:
        return math.fsum(
            (layer.interference.cosine[s][t] or 0.0)
            * layer.experts[names[s]].norm
            * layer.experts[names[t]].norm
            for layer in layers
        )

    size = range(len(names))
    norms = [math.sqrt(product(t, t)) for t in size]
    return [
        [
            plain(product(s, t) / (norms[s] * norms[t])) if norms[s] * norms[t] else None
            for t in size
        ]
        for s in size
    ]


def _value(found: Correlation) -> CorrelationValue:
    return CorrelationValue(
        pearson=plain(found.pearson), spearman=plain(found.spearman), count=found.count
    )


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's ρ; None for fewer than three points, or a constant side.

    Attributes:
        pearson: r.
        spearman: r of the ranks; ties take their mean rank.
        count: number of points.
    """

    pearson: float | None
    spearman: float | None
    count: int


@dataclass(frozen=True)
class Correlations:
    """SAR against NAI, pooled and apart.

    Attributes:
        points: (method, task, SAR, NAI) of every pair that has both.
        overall: over all points.
        within: method -> over its tasks.
        means: over the methods, of their means over tasks.
    """

    points: tuple[tuple[str, str, float, float], ...]
    overall: Correlation
    within: Mapping[str, Correlation]
    means: Correlation


def correlate(sar: Nai, nai: Nai) -> Correlations:
    """Correlate mean subspace alignment with normalised accuracy improvement.

    NAI(t) = (acc_merged − acc_base)/(acc_expert − acc_base). The isotropic paper finds that it
    goes with the mean SAR over layers.

    Args:
        sar: method -> task -> mean SAR over layers.
        nai: method -> task -> NAI. What is absent, None or not finite on either side is left out.

    Returns:
        All points and their correlations. Pooled points of one method are not independent, so no
        p-value is given.

    Reference: arXiv 2502.04959, its section on subspace alignment.

    Example:
        >>> sar = {"ta": {"a": 0.5, "b": 0.6}, "iso_c": {"a": 0.8, "b": 0.9}}
        >>> nai = {"ta": {"a": 0.4, "b": 0.3}, "iso_c": {"a": 0.7, "b": 0.9}}
        >>> round(correlate(sar, nai).overall.spearman, 6)
        0.8
    """
    points = tuple(
        (method, task, x, y)
        for method, tasks in sar.items()
        for task, x in tasks.items()
        if x is not None
        and (y := nai.get(method, {}).get(task)) is not None
        and math.isfinite(x)
        and math.isfinite(y)
    )
    by_method: dict[str, list[tuple[float, float]]] = {}
    for method, _, x, y in points:
        by_method.setdefault(method, []).append((x, y))
    means = [
        (statistics.fmean(x for x, _ in own), statistics.fmean(y for _, y in own))
        for own in by_method.values()
    ]
    return Correlations(
        points,
        _correlation([(x, y) for _, _, x, y in points]),
        {method: _correlation(own) for method, own in by_method.items()},
        _correlation(means),
    )


def _correlation(points: Sequence[tuple[float, float]]) -> Correlation:
    first, second = [x for x, _ in points], [y for _, y in points]
    # Correlations and ranks would make much of differences that are rounding.
    if len(points) < FEWEST or _is_flat(first) or _is_flat(second):
        return Correlation(None, None, len(points))
    return Correlation(
        _pearson(first, second), _pearson(_ranks(first), _ranks(second)), len(points)
    )


def _pearson(first: Sequence[float], second: Sequence[float]) -> float:
    return max(-1.0, min(1.0, statistics.correlation(first, second)))


def _is_flat(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= FLAT * max(map(abs, values))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]
