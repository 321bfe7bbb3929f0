"""What one number says of task matrices: of a spectrum, of a pair, of a merged matrix."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eutectic.errors import RequestError
from eutectic.linalg import lapack
from eutectic.linalg.leading import leading_singular
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets, default_tolerance, thin_svd
from eutectic.types import LayerStatistics


def significant_triplets(delta: Tensor | LowRank) -> Triplets:
    """Return the singular triplets of Δ that are not rounding: S > eps·min(max(out, in), 128)·S₁.

    Shapes: `[out, in]` -> U `[out, r]`, S `[r]`, V `[in, r]`, float64. A zero matrix has r = 0.
    Cost: one float64 eigenproblem of the shorter side; of thin factors, of their rank.
    """
    tolerance = default_tolerance(delta.dtype, delta.shape)
    return leading_singular(delta, min(delta.shape), tolerance=tolerance)


def stable_rank(values: Tensor) -> float:
    """Return ‖Δ‖_F² / ‖Δ‖₂² = Σσ² / σ₁² of descending singular values; NaN for zero."""
    if not len(values) or float(values[0]) == 0:
        return math.nan
    return float((values.double() / values[0].double()).square().sum())


def effective_rank(values: Tensor) -> float:
    """Return exp(−Σ p log p) with p = σ/Σσ, the entropy of a spectrum as a rank; NaN for zero.

    r equal singular values give r. Source: The effective rank, Roy and Vetterli, EUSIPCO 2007.
    """
    wide = values.double()
    total = float(wide.sum())
    if total == 0:
        return math.nan
    shares = wide / total
    return math.exp(-float(torch.xlogy(shares, shares).sum()))


def energy(values: Tensor, count: int) -> float:
    """Return Σ_{i≤k} σ_i² / Σσ² of descending singular values, k = `count`; NaN for zero."""
    if not len(values) or float(values[0]) == 0:
        return math.nan
    squares = (values.double() / values[0].double()).square()
    return float(squares[:count].sum() / squares.sum())


def cosine(first: Tensor, second: Tensor) -> float:
    """Return ⟨Δ_s, Δ_t⟩ / (‖Δ_s‖_F ‖Δ_t‖_F), summed in float64; NaN where either is zero."""
    a, b = first.double(), second.double()
    norms = lapack.norm(a) * lapack.norm(b)
    return float((a * b).sum()) / norms if norms else math.nan


def sign_conflicts(first: Tensor, second: Tensor) -> float:
    """Return the share of entries of opposite sign among those where neither is zero.

    Unrelated matrices have 0.5. NaN where no entry is non-zero in both.
    """
    signs = first.sign() * second.sign()
    both = int((signs != 0).sum())
    return int((signs < 0).sum()) / both if both else math.nan


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Return ‖U_sᵀ U_t‖_F² / k of orthonormal columns `[n, k_s]`, `[n, k_t]`, k = min(k_s, k_t).

    The mean squared cosine of the principal angles: 1 where one space holds the other, 0 where
    they are orthogonal, max(k_s, k_t)/n for random ones. NaN for an empty space.
    """
    count = min(first.shape[1], second.shape[1])
    return lapack.norm(first.mT @ second) ** 2 / count if count else math.nan


def singular_task_interference(tasks: Sequence[Triplets]) -> float:
    """Return STI = ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the sum of absolute entries.

    U `[out, Tk]`, Σ and V hold the tasks' leading triplets side by side. 0 where all singular
    vectors are orthogonal across tasks on either side, and for one task.

    Args:
        tasks: the leading triplets of each task matrix; TSV-M takes k = int(r/T) of each.

    Cost: (Tk)²·(out + in + Tk), float64.

    Reference: Task singular vectors: reducing task interference in model merging,
    arXiv 2412.00081. It scales with the deltas; divide by Σσ to compare layers.
    """
    U, V = (torch.cat(parts, 1) for parts in zip(*((t.U, t.V) for t in tasks), strict=True))
    S = torch.cat([t.S for t in tasks])
    identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
    return float((((U.mT @ U - identity) * S) @ (V.mT @ V - identity)).abs().sum())


def output_energy(delta: Tensor | LowRank, record: LayerStatistics) -> float:
    """Return tr(Δ A Δᵀ) = Σ‖Δx‖² over the inputs that `record` summed up, in float64.

    The Gram A `[in, in]` may be its factor; thin factors of Δ are not multiplied out.
    """
    stored = record.gram if record.gram is not None else record.gram_factor
    width = None if stored is None else stored.shape[-1]
    if width != delta.shape[1]:
        raise RequestError(
            f"a Gram of {width} inputs does not belong to a matrix {list(delta.shape)}.\n"
            "Collect the statistics on this architecture, with Grams."
        )
    if isinstance(delta, LowRank):
        left, right = delta.left.double(), delta.right.double()
        return float((left.mT @ left * _form(right, record)).sum())
    wide = delta.double()
    factor = record.gram_factor
    if record.gram is None and factor is not None:
        squares = lapack.norm(wide @ factor.double().mT) ** 2
        if record.gram_diagonal is not None:
            squares += float(wide.square().sum(0) @ record.gram_diagonal.double())
        return squares
    gram = record.dense_gram()
    assert gram is not None
    return float((wide @ gram * wide).sum())


def _form(right: Tensor, record: LayerStatistics) -> Tensor:
    """Return R A Rᵀ."""
    if record.gram is not None or record.gram_factor is None:
        gram = record.dense_gram()
        assert gram is not None
        return right @ gram @ right.mT
    images = right @ record.gram_factor.double().mT
    form = images @ images.mT
    if record.gram_diagonal is not None:
        form += right * record.gram_diagonal.double() @ right.mT
    return form


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
    return projected_shares(triplets.first(rank_within(triplets.S, error)), task_deltas)


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
        part, whole = lapack.norm(leading.U.mT @ wide), lapack.norm(wide)
        shares.append(min(1.0, part / whole) if whole else math.nan)
    return torch.tensor(shares, dtype=torch.float64)


def check_error(error: float) -> None:
    """Refuse a relative error that is not between 0 and 1."""
    if not 0 < error < 1:
        raise RequestError(f"the relative error must lie between 0 and 1, got {error}.")
