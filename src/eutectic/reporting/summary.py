"""From measurements per matrix to what they say about the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

from eutectic.reporting.correlation import Correlation, correlate
from eutectic.reporting.measure import plain, rounded
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


def summarise(layers: Sequence[Layer], nai: Nai | None = None) -> Summary:
    """Return means over layers per task and per merged model, and whole-model interference.

    Every layer counts the same; undefined values are left out of means.

    Args:
        layers: at least one.
        nai: merged model -> expert -> NAI; None leaves correlations out.
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


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are defined, or None without any."""
    kept = [v for v in values if v is not None]
    return plain(math.fsum(kept) / len(kept)) if kept else None


def _task(
    layers: Sequence[Layer], name: str, names: Sequence[str], pairs: Interference
) -> TaskSummary:
    own = [layer.experts[name] for layer in layers]
    norm = math.hypot(*(s.norm for s in own))
    base = math.hypot(*(layer.base_norm for layer in layers))
    t = names.index(name)
    column = [row[t] for row in pairs.activation] if pairs.activation is not None else []
    by: Literal["activation", "singular"] = "activation"
    if all(value is None for value in column):
        by, column = "singular", [row[t] for row in pairs.singular]
    others = [(v, n) for n, v in zip(names, column, strict=True) if n != name and v is not None]
    value, other = max(others, default=(None, None))
    return TaskSummary(
        norm=rounded(norm),
        relative_norm=plain(norm / base) if base else None,
        stable_rank=mean(s.stable_rank for s in own),
        effective_rank=mean(s.effective_rank for s in own),
        most_interfering=other,
        interference=value,
        by=by,
    )


def _merged(
    layers: Sequence[Layer], name: str, names: Sequence[str], nai: Mapping[str, float | None]
) -> MergedSummary:
    sar = {n: mean(layer.alignment[name].ratio[n] for layer in layers) for n in names}
    return MergedSummary(
        sar=mean(sar.values()),
        task_sar=sar,
        nai={n: nai[n] for n in names if n in nai},
        mean_nai=mean(nai.get(n) for n in names),
        rank=mean(float(layer.alignment[name].rank) for layer in layers) or 0.0,
        effective_rank=mean(layer.merged[name].effective_rank for layer in layers),
    )


def _interference(layers: Sequence[Layer], names: Sequence[str]) -> Interference:
    def over(pick: Callable[[Interference], Pairs]) -> Pairs:
        tables = [pick(layer.interference) for layer in layers]
        size = range(len(names))
        return [[mean(table[s][t] for table in tables) for t in size] for s in size]

    return Interference(
        cosine=_cosine(layers, names),
        overlap_left=over(lambda i: i.overlap_left),
        overlap_right=over(lambda i: i.overlap_right),
        sign_conflicts=over(lambda i: i.sign_conflicts),
        singular=over(lambda i: i.singular),
        activation=_activation(layers, len(names)),
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


def _activation(layers: Sequence[Layer], count: int) -> Pairs | None:
    """Return medians: a layer that an expert hardly moves makes ratios of any size."""
    tables = [t for layer in layers if (t := layer.interference.activation) is not None]
    if not tables:
        return None

    def middle(s: int, t: int) -> float | None:
        kept = [v for table in tables if (v := table[s][t]) is not None]
        return plain(median(kept)) if kept else None

    return [[middle(s, t) for t in range(count)] for s in range(count)]


def _value(found: Correlation) -> CorrelationValue:
    return CorrelationValue(
        pearson=None if found.pearson is None else plain(found.pearson),
        spearman=None if found.spearman is None else plain(found.spearman),
        count=found.count,
    )
