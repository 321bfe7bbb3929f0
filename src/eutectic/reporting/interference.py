"""How task matrices of one layer get in each other's way, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eutectic.errors import RequestError
from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets
from eutectic.types import LayerStatistics


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

    Args:
        delta: Δ `[out, in]`, or its thin factors, which are not multiplied out.
        record: with the Gram A `[in, in]`, or its factor.

    Raises:
        RequestError: the Gram has another number of inputs than Δ, or there is none.
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
    factor = record.gram_factor
    if record.gram is None and factor is not None:
        wide = delta.double()
        squares = lapack.norm(wide @ factor.double().mT) ** 2
        if record.gram_diagonal is not None:
            squares += float(wide.square().sum(0) @ record.gram_diagonal.double())
        return squares
    gram = record.dense_gram()
    assert gram is not None
    wide = delta.double()
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
