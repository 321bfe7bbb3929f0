"""The metric of a layer's inputs, from the statistics of one expert."""

import torch
from torch import Tensor

from eutectic.linalg.metric import InputMetric, Leading, leading_pairs, truncates
from eutectic.linalg.svd import magnitude
from eutectic.types import LayerStatistics


def input_metric(
    entry: LayerStatistics | None, ridge: float, rank: int | None, size: int, device: torch.device
) -> InputMetric:
    """Return A/n + ε·tr(A/n)/in·I of one expert's inputs; the identity where there are none.

    Args:
        entry: with a Gram A in any form, and the tokens n.
        ridge: ε.
        rank: how many directions of A are kept beside an even rest, where that is less work than
            all (`truncates`); None keeps all.
        size: in.
        device: of the result, which is in float64.
    """
    identity = InputMetric(size, 1.0)
    if entry is None or not entry.count or not entry.has("gram"):
        return identity
    rest = entry.gram_diagonal
    if entry.gram is None and (rest is None or bool((rest == rest[0]).all())):
        assert entry.gram_factor is not None
        rows = entry.gram_factor.to(device, torch.float64) / entry.count**0.5
        even = 0.0 if rest is None else float(rest[0]) / entry.count
        energy = float(rows.square().sum()) / size + even
        given = InputMetric(size, ridge * energy + even, rows).leading(rank)
        if given.thin:
            return given if energy else identity
    if rank is not None and truncates(rank, size):
        found, unit, trace = _leading(entry, rank, device)
        if not trace:
            return identity
        scale = unit / entry.count
        even = (found.even + ridge * trace / size) * scale
        return InputMetric(size, even, found.rows * scale**0.5)
    moment = entry.dense_gram()
    assert moment is not None
    moment = moment.to(device) / entry.count
    energy = float(moment.trace()) / size
    if not energy:
        return identity
    moment.diagonal().add_(ridge * energy)
    return InputMetric(size, matrix=moment)


def _leading(
    entry: LayerStatistics, rank: int, device: torch.device
) -> tuple[Leading, float, float]:
    """Return the leading directions of A/unit, the unit, and tr A/unit.

    Products are in the stored dtype, and A is never formed of a factor.
    """
    gram, factor, rest = entry.gram, entry.gram_factor, entry.gram_diagonal
    stored = gram if gram is not None else factor
    assert stored is not None
    size, unit = stored.shape[1], magnitude(stored) or 1.0
    scaled = stored.to(device) / unit
    if gram is not None:
        trace = float(scaled.diagonal().sum(dtype=torch.float64))
        return leading_pairs(lambda x: scaled @ x, (size, rank), trace, like=scaled), unit, trace
    beside = scaled.new_zeros(size) if rest is None else rest.to(device, torch.float64) / unit**2
    trace = float(scaled.square().sum(dtype=torch.float64) + beside.sum(dtype=torch.float64))
    column = beside.to(scaled.dtype)[:, None]

    def product(x: Tensor) -> Tensor:
        return scaled.mT @ (scaled @ x) + column * x

    return leading_pairs(product, (size, rank), trace, like=scaled), unit**2, trace
