"""Guards what the page of `flow` says: steps of conjugate gradients keep near its path."""

from __future__ import annotations

import torch

from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

SIDE, OUT, EXPERTS = 48, 12, 4


def test_early_stopping_is_near_the_path_and_ends_at_its_end():
    """Grams with a spectrum that falls as measured ones do: like 1/i, a common large direction."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator).double())[0]
    scales = (1 / torch.arange(1, SIDE + 1)).double().sqrt()
    statistics = []
    for _ in range(EXPERTS):
        own = torch.randn(200, SIDE, generator=generator).double() * scales
        mixed = torch.eye(SIDE) + 0.2 * torch.randn(SIDE, SIDE, generator=generator)
        x = own @ basis @ mixed.double()
        statistics.append(LayerStatistics(gram=x.T @ x, count=len(x)))
    deltas = torch.randn(EXPERTS, OUT, SIDE, generator=generator).double()
    start = {"init": "task_arithmetic", "init_scale": 0.3}

    def flow(tau: float) -> torch.Tensor:
        return merge_matrices("flow", deltas, statistics=statistics, tau=tau, **start)

    taus = [10**e for e in torch.linspace(-2, 4, 91).tolist()]
    points = [flow(tau) for tau in taus]
    begin, nearest, off = 0.3 * deltas.sum(0), [], []
    for steps in (1, 3, 10, 30):
        found = merge_matrices(
            "mats",
            deltas,
            statistics=statistics,
            operator="gram",
            iterations=steps,
            tolerance=1e-12,
            **start,
        )
        distances = [float((found - point).norm() / (found - begin).norm()) for point in points]
        off.append(min(distances))
        nearest.append(taus[distances.index(min(distances))])
    assert nearest == sorted(nearest) and nearest[0] < nearest[-1] / 20
    assert off == sorted(off, reverse=True)
    assert off[0] < 0.45 and off[1] < 0.25 and off[2] < 0.12 and off[3] < 0.05
