"""The metric of a layer's inputs, from the statistics of one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.linalg.metric import FEW_ROWS, InputMetric, Metric, WideMetric, is_wide
from eutectic.linalg.remembered import digest
from eutectic.types import LayerStatistics


def input_metric(
    entry: LayerStatistics | None,
    ridge: float,
    how: tuple[int, int] | None,
    size: int,
    device: torch.device,
) -> Metric:
    """Return A/n + ε·tr(A/n)/in·I of one expert's inputs; the identity where there are none.

    Args:
        entry: with a Gram A in any form, and the tokens n.
        ridge: ε.
        how: the leading directions and the degree of the polynomial that powers of wide metrics are
            made of, where that is less work than an eigenproblem, and eigenproblems in the Gram's
            dtype where that is sound; None for eigenproblems in float64 always.
        size: in.
        device: of the result.
    """
    identity = InputMetric(size, 1.0)
    if entry is None or not entry.count or not entry.has("gram"):
        return identity
    rest = entry.gram_diagonal
    wide = how is not None and is_wide(size, how[0])
    if entry.gram is None and (rest is None or bool((rest == rest[0]).all())):
        assert entry.gram_factor is not None
        rows = entry.gram_factor.to(device, torch.float64) / entry.count**0.5
        even = 0.0 if rest is None else float(rest[0]) / entry.count
        energy = float(rows.square().sum()) / size + even
        given = InputMetric(size, ridge * energy + even, rows)
        if given.thin and not (wide and len(rows) > FEW_ROWS):
            return given if energy else identity
    if wide:
        assert how is not None
        held = WideMetric(
            size,
            0.0,
            matrix=_computed(entry.gram, device),
            rows=_computed(entry.gram_factor, device),
            diagonal=_computed(rest, device),
            scale=1 / entry.count,
            rank=how[0],
            degree=how[1],
            key=_key(entry),
        ).in_range()
        energy = held.trace * held.scale / size
        return held.ridged(ridge * energy) if energy else identity
    moment = _computed(entry.gram, device) if how is not None else None
    if moment is None:
        moment = entry.dense_gram()
        assert moment is not None
    moment = moment.to(device) / entry.count
    energy = float(moment.diagonal().sum(dtype=torch.float64)) / size
    if not energy:
        return identity
    moment.diagonal().add_(ridge * energy)
    key = digest(_key(entry), entry.count, ridge, moment.dtype)
    return InputMetric(size, matrix=moment, key=key)


def _computed(stored: Tensor | None, device: torch.device) -> Tensor | None:
    """Return it on a device, in the dtype of products with it: its own, or float32 for less."""
    if stored is None:
        return None
    return stored.to(device, torch.promote_types(stored.dtype, torch.float32))


def _key(entry: LayerStatistics) -> str:
    """Return what says which Gram it is."""
    held = (entry.gram, entry.gram_factor, entry.gram_diagonal)
    return digest(*(part for part in held if part is not None))
