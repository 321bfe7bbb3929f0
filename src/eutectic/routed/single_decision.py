"""Routers that decide once per input, for the whole network, from one layer's features.

They stand for related work (see docs/routing.md) beside the routers that decide at every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eutectic.errors import StatisticsError
from eutectic.linalg import lapack
from eutectic.models.batches import without_autocast
from eutectic.routed.router import (
    DiscriminantRouter,
    PrototypeRouter,
    Router,
    RouterKind,
    discriminant_router,
    has_pooled,
)
from eutectic.types import LayerStatistics

SINGLE: tuple[RouterKind, ...] = ("mad", "sim")
ENERGY = 0.95  # of a task's pooled inputs that its subspace holds
MOST = 32  # directions of a subspace


class MadRouter(Router):
    """Log-posteriors of Gaussians with one covariance: the Gaussian discriminant of features."""

    kind: RouterKind = "mad"


class SimRouter(Router):
    """The share of a pooled input that lies in each task's subspace: 1 − (residual/‖x‖)².

    `weight` holds the subspaces' orthonormal rows `[T·k, in]`, task after task; rows of zeros
    where a task has fewer; `bias` `[T]` is zero.
    """

    kind: RouterKind = "sim"

    def forward(self, pooled: Tensor) -> Tensor:
        """Return scores `[N, T]` in [0, 1]; a pooled input of zero scores zero everywhere."""
        with without_autocast(pooled.device):
            unit = torch.nn.functional.normalize(pooled.float(), dim=-1)
            seen = unit @ self.weight.mT
            return seen.unflatten(-1, (len(self.bias), -1)).square().sum(-1) + self.bias


def mad_router(
    statistics: Sequence[LayerStatistics],
    where: str,
    shrinkage: float | None = None,
    names: Sequence[str] | None = None,
) -> MadRouter:
    """Return the Gaussian discriminant of the experts' pooled inputs; see `discriminant_router`.

    Of Gaussians with a common covariance and equally likely tasks it takes the Bayes decision.

    After MaD (OpenReview vufSqDI3Mz), which we know by its abstract: Gaussian discriminant analysis
    of features, one decision per input. Ours: one covariance for all tasks, shrunk.
    """
    found = discriminant_router(statistics, where, shrinkage, names)
    return MadRouter(found.weight, found.bias)


def sim_router(
    statistics: Sequence[LayerStatistics], where: str, names: Sequence[str] | None = None
) -> SimRouter:
    """Return the residual rule: the task whose subspace leaves least of the pooled input over.

    A task's subspace is spanned by the leading eigenvectors of its uncentred pooled Gram, as many
    as hold 95 % of it, at most 32; all tasks have as many as the one that needs most.

    After SiM (arXiv 2606.22589), which we know by its abstract: projection residuals to low-rank
    subspaces of the base's features, 32 examples a task, one decision per input. Deviation: the
    features are the merged model's, experts off, since a routed folder holds no base.
    """
    bases: list[Tensor] = []
    needed: list[int] = []
    for t, entry in enumerate(statistics):
        expert = f"expert {t}" if names is None else f"expert '{names[t]}'"
        if not has_pooled(entry):
            raise StatisticsError(
                f"{where}, {expert}: no pooled sums over at least one sample, which the sim router "
                "needs.\nCollect again, or use router='prototype'."
            )
        gram = entry.dense("pooled_gram")
        assert gram is not None
        gram = gram.double()
        if not bool(torch.isfinite(gram).all()) or not float(gram.trace()) > 0:
            raise StatisticsError(
                f"{where}, {expert}: its pooled inputs are zero or not finite; they span nothing.\n"
                "Leave this layer out, or check the proxy data."
            )
        values, vectors = lapack.eigh(gram)
        values = values.clamp_min(0)
        share = values.cumsum(0) / values.sum()
        needed.append(int((share < ENERGY).sum()) + 1)
        sound = values > len(values) * torch.finfo(torch.float32).eps * values[0]
        bases.append(vectors[:, : min(MOST, int(sound.sum()))])
    size = min(max(needed), MOST)
    rows = torch.zeros(len(bases), size, bases[0].shape[0], dtype=torch.float64)
    for t, basis in enumerate(bases):
        own = basis[:, :size]
        rows[t, : own.shape[1]] = own.mT
    return SimRouter(rows.flatten(0, 1), torch.zeros(len(bases)))


ROUTERS: dict[str, type[Router]] = {
    router.kind: router for router in (DiscriminantRouter, PrototypeRouter, MadRouter, SimRouter)
}
