"""The metrics of layers' inputs between the thin factors of adapters and the rows of Grams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eutectic.linalg.core import WideCoreSpace, core_root, core_space_beside, pseudo_inverse
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.metric import InputMetric, Metric
from eutectic.methods.input_metrics import input_metric
from eutectic.types import LayerStatistics

Entries = Sequence[LayerStatistics | None]


def times(metric: Metric, delta: Tensor | LowRank, exponent: float) -> Tensor:
    """Return Δ·C^p `[out, in]`; of a thin Δ the right factor alone meets the metric."""
    if isinstance(delta, LowRank):
        return delta.left @ metric.times(delta.right, exponent)
    return metric.times(delta, exponent)


def with_factors(entries: Entries) -> list[LayerStatistics | None]:
    """Return entries whose Gram between shared rows A is a factor `[k, in]`.

    Cost: an eigenproblem of side R once and one for each expert; O(in·R²) each.
    """
    made: tuple[Tensor, Tensor] | None = None
    found: list[LayerStatistics | None] = []
    for entry in entries:
        if entry is None or entry.core_gram is None or entry.core_rows is None:
            found.append(entry)
            continue
        if made is None or made[0] is not entry.core_rows:
            made = entry.core_rows, pseudo_inverse(entry.core_rows)
        factor = core_root(entry.core_gram) @ made[1]
        found.append(replace(entry, gram_factor=factor, core_gram=None, core_rows=None))
    return found


def in_core(
    deltas: LowRankStack, entries: Entries, ridge: float, how: tuple[int, int] | None
) -> tuple[WideCoreSpace, list[Metric]] | None:
    """Return a core of thin deltas and the metric C_t of each expert's inputs in it.

    Of a C_t = ε_t·I + (what lies within V) no part beside V reaches the core. None where there is
    no small core that holds all of the Grams.

    Args:
        deltas: T products of thin factors.
        entries: with a Gram in few rows, or between rows A that all experts share: then V spans A,
            and C_t = (A⁺)·`core_gram`·(A⁺)ᵀ/n + ε_t·I is a small matrix at once.
        ridge: ε.
        how: see `input_metric`.
    """
    shared = _shared_rows(entries)
    if shared is not None:
        space = core_space_beside(deltas, [shared.to(deltas.device)])
        return None if space is None else (space, _between(space, entries, ridge, len(shared.mT)))
    size = deltas.shape[2]
    own = with_factors(entries)
    few: list[InputMetric] = []
    for entry in own:
        if entry is not None and entry.gram is not None:
            return None
        metric = input_metric(entry, ridge, how, size, deltas.device)
        if not isinstance(metric, InputMetric) or metric.matrix is not None:
            return None
        few.append(metric)
    space = core_space_beside(deltas, [m.rows for m in few if m.rows is not None])
    if space is None:
        return None
    seen, width = iter(space.beside), space.width
    return space, [m.between(width, None if m.rows is None else next(seen)) for m in few]


def _shared_rows(entries: Entries) -> Tensor | None:
    """Return the rows that every Gram lies between; None where they are not all the same.

    On a device each expert has its own copy.
    """
    rows: Tensor | None = None
    for entry in entries:
        if entry is None or not entry.has("gram"):
            continue
        own = entry.core_rows
        if own is None or not (rows is None or own is rows or torch.equal(own, rows)):
            return None
        rows = own if rows is None else rows
    return rows


def _between(space: WideCoreSpace, entries: Entries, ridge: float, size: int) -> list[Metric]:
    (rows,) = space.beside
    width = space.width
    inverse = pseudo_inverse(rows) if space.inverse is None else space.inverse
    found: list[Metric] = []
    for entry in entries:
        metric = InputMetric(width, 1.0)
        if entry is not None and entry.count and entry.core_gram is not None:
            inner = entry.core_gram.to(inverse)
            moment = inverse.mT @ ((inner + inner.mT) @ inverse) / (2 * entry.count)
            energy = float(moment.trace()) / size
            if energy > 0:
                moment.diagonal().add_(ridge * energy)
                metric = InputMetric(width, matrix=(moment + moment.mT) / 2)
        found.append(metric)
    return found
