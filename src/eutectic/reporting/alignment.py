"""How much of each task matrix lies in the subspace of the merged one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eutectic.errors import RequestError
from eutectic.linalg import lapack
from eutectic.linalg.svd import Triplets, thin_svd


def subspace_alignment_ratio(
    merged_delta: Tensor, task_deltas: Iterable[Tensor], error: float = 0.05
) -> Tensor:
    """Return SAR(t) = ‖U_q U_qᵀ Δ_t‖_F / ‖Δ_t‖_F for each task.

    U_q are the first q left singular vectors of Δ_M, q of `alignment_rank`. It is 1 where the
    merged matrix spans all that the task writes to, and does not depend on any scale. Where
    singular values are equal (a flat spectrum) and `error` leaves some out, U_q is not unique.

    Args:
        merged_delta: Δ_M `[out, in]`, any floating dtype.
        task_deltas: T matrices Δ_t `[out, in]`, or a stack `[T, out, in]`; taken one at a time.
        error: relative error of Δ_M that U_q may leave.

    Returns:
        `[T]`, float64. NaN for a zero task matrix, which has no direction; 0 for every other task
        where Δ_M is zero.

    Raises:
        RequestError: `error` is not between 0 and 1, or matrices of different shapes.

    Cost: one thin SVD in float64, and q·out·in per task.

    Reference: No task left behind: isotropic model merging with common and task-specific
    subspaces, arXiv 2502.04959.

    Example:
        >>> tasks = torch.stack([torch.diag(torch.tensor(d)) for d in ([1.0, 0.0], [3.0, 4.0])])
        >>> subspace_alignment_ratio(torch.diag(torch.tensor([2.0, 0.01])), tasks)
        tensor([1.0000, 0.6000], dtype=torch.float64)
    """
    check_error(error)
    triplets = thin_svd(merged_delta)
    leading = triplets.first(rank_within(triplets.S, error))
    return projected_shares(leading, task_deltas)


def alignment_rank(delta: Tensor, error: float = 0.05) -> int:
    """Return the smallest q with ‖Δ − U_q U_qᵀ Δ‖_F ≤ error·‖Δ‖_F; 0 for a zero matrix.

    Args:
        delta: `[out, in]`, any floating dtype.
        error: between 0 and 1.

    Raises:
        RequestError: `error` is not between 0 and 1.

    Cost: one thin SVD in float64. Source: arXiv 2502.04959, whose published script for its figure
    stops at √(Σ_{i≤q} σ_i²/Σσ_i²) > 0.95 instead, an `error` of 0.312.
    """
    check_error(error)
    return rank_within(thin_svd(delta).S, error)


def rank_within(values: Tensor, error: float) -> int:
    """Return the smallest q with √(Σ_{i>q} σ_i²) ≤ error·√(Σσ_i²) of descending values."""
    if not len(values) or float(values[0]) == 0:
        return 0
    # From the small end, so that the tail keeps its digits.
    tails = (values.double() / values[0].double()).square().flip(0).cumsum(0).flip(0)
    return int((tails > error * error * tails[0]).sum())


def projected_shares(leading: Triplets, task_deltas: Iterable[Tensor]) -> Tensor:
    """Return ‖U Uᵀ Δ_t‖_F / ‖Δ_t‖_F `[T]` in float64 for orthonormal U `[out, q]`; NaN for zero."""
    shares: list[float] = []
    for delta in task_deltas:
        if delta.ndim != 2 or delta.shape != (len(leading.U), len(leading.V)):
            raise RequestError(
                f"a task matrix is {list(delta.shape)}, the merged one "
                f"{[len(leading.U), len(leading.V)]}; they must be the same matrix of one model."
            )
        wide = delta.double()
        whole = lapack.norm(wide)
        part = lapack.norm(leading.U.mT @ wide)
        shares.append(min(1.0, part / whole) if whole else float("nan"))
    return torch.tensor(shares, dtype=torch.float64)


def check_error(error: float) -> None:
    """Refuse a relative error that is not between 0 and 1.

    Raises:
        RequestError: it is not.
    """
    if not 0 < error < 1:
        raise RequestError(f"the relative error must lie between 0 and 1, got {error}.")
