"""Does alignment go with accuracy? SAR against NAI over methods and tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FEWEST = 3  # two points always lie on a line
FLAT = 1e-6  # values this close to each other, relatively, differ by rounding


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


def correlate(
    sar: Mapping[str, Mapping[str, float | None]], nai: Mapping[str, Mapping[str, float | None]]
) -> Correlations:
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
        (math.fsum(x for x, _ in own) / len(own), math.fsum(y for _, y in own) / len(own))
        for own in by_method.values()
    ]
    return Correlations(
        points,
        correlation([(x, y) for _, _, x, y in points]),
        {method: correlation(own) for method, own in by_method.items()},
        correlation(means),
    )


def correlation(points: Sequence[tuple[float, float]]) -> Correlation:
    """Return Pearson's and Spearman's correlation of (x, y) points."""
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
