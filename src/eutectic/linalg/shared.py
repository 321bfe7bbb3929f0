"""Two bases of few directions that T matrices share: what is left of them is a small core each.

Tucker-2 decomposition by alternating SVDs (higher-order orthogonal iteration, De Lathauwer, De Moor
and Vandewalle, 2000).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg.core import CoreSpace, core_space
from eutectic.linalg.leading import leading_singular
from eutectic.linalg.lowrank import LowRankStack
from eutectic.linalg.svd import magnitude

GAIN = 1e-9  # of the energy, that a step has to gain for another to follow
STEPS = 30
ROUNDING = 1e-12  # of the energy


@dataclass(frozen=True, eq=False)
class SharedSpace:
    """T matrices near P·core_t·Qᵀ.

    Attributes:
        space: P `[out, m]`, Q `[in, n]` and the cores `[T, m, n]`, m and n at most R, in float64.
        lost: 1 − Σ‖w_t core_t‖² / Σ‖w_tΔ_t‖², the share of the energy outside; 0 for zeros.
    """

    space: CoreSpace
    lost: float


def shared_space(
    deltas: Tensor | LowRankStack,
    rank: int,
    *,
    weights: Sequence[float],
    tolerance: float,
    balance: float = 0.0,
    seed: int = 0,
) -> SharedSpace:
    """Return bases of at most R directions that keep most of Σ_t ‖w_t PᵀΔ_tQ‖², and the cores.

    Q starts as the R leading right singular vectors of the w_tΔ_t one above the other. Then P is
    made of the R leading left singular vectors of the w_tΔ_tQ side by side, and Q of those of the
    w_tΔ_tᵀP, in turn, until nothing is gained: no step loses energy. The axes of P and Q are those
    singular vectors, so that they depend on the matrices alone and not on their factors.

    Args:
        deltas: `[T, out, in]`, or thin factors, which are not multiplied out.
        rank: R.
        weights: w_t; an expert of weight 0 has no say.
        balance: b in 0 … 1: the bases are those of w_tΔ_t·(1 − b + b·ν/‖Δ_t‖), ν the mean norm of
            the Δ_t that have a say. At 1 an expert of small changes has as much of a say as others.
        tolerance: directions below this fraction of the first are rounding, and left out.
        seed: of Krylov starts; derive it from the tensor's name.

    Returns:
        The cores are those of Δ_t itself, without weights and balance. R ≥ the ranks of the
        matrices side by side and one above the other loses nothing; T = 1 gives the truncated SVD
        of Δ_1. The solution is a local optimum, and is not unique where singular values across the
        cut are equal. Zero deltas give m = n = 0.

    Cost: of thin factors two thin QR decompositions, then SVDs of `[Σ r_t, T·R]` for each step; of
    dense ones a partial SVD of `[T·out, in]` and 2·T·out·in·R multiplications a step.
    """
    outer = core_space(deltas) if isinstance(deltas, LowRankStack) else None
    matrices = deltas if outer is None else outer.cores
    assert isinstance(matrices, Tensor)
    unit = magnitude(matrices) or 1.0
    units = torch.tensor(weights, dtype=torch.float64, device=matrices.device) / unit
    plain = units
    if balance:
        units = units * _balanced(matrices, units != 0, balance)
    own = matrices * units.to(matrices.dtype)[:, None, None]
    turned = own.mT

    def leading(blocks: Sequence[Tensor]) -> Tensor:
        return leading_singular(torch.cat(list(blocks), 1), rank, tolerance=tolerance, seed=seed).U

    def step(sides: Tensor, basis: Tensor) -> Tensor:
        """Return the leading left singular vectors of the products with a basis, side by side."""
        return leading([side.double() @ basis for side in sides])

    total = sum(float(torch.linalg.vector_norm(m, dtype=torch.float64)) ** 2 for m in own)
    right, kept = leading(list(turned)), 0.0
    left = step(own, right)
    for _ in range(STEPS):
        right = step(turned, left)
        left = step(own, right)
        before, kept = kept, _energy(own, left, right)
        if kept - before <= GAIN * total:
            break
    cores = torch.stack([left.mT @ matrix.double() @ right for matrix in matrices])
    if balance:  # what is lost is told of the changes as they are
        sizes = torch.tensor([_square(m) for m in matrices], dtype=torch.float64)
        held = torch.tensor([_square(core) for core in cores], dtype=torch.float64)
        shares = plain.cpu().square()
        total, kept = float(shares @ sizes), float(shares @ held)
    lost = 1.0 - kept / total if total else 0.0
    lost = lost if lost > ROUNDING else 0.0
    if outer is not None:
        left, right = outer.left @ left, outer.right @ right
    return SharedSpace(CoreSpace(left, right, cores), lost)


def _balanced(matrices: Tensor, heard: Tensor, balance: float) -> Tensor:
    """Return what brings the norms of matrices nearer to their mean; 1 for those not heard."""
    norms = torch.tensor([_square(m) for m in matrices], dtype=torch.float64).sqrt()
    norms = norms.to(matrices.device)
    heard = heard & (norms > 0)
    if not bool(heard.any()):
        return torch.ones_like(norms)
    mean = norms[heard].mean()
    return torch.where(heard, 1 - balance + balance * mean / norms.clamp_min(1e-300), 1.0)


def _square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _energy(matrices: Tensor, P: Tensor, Q: Tensor) -> float:
    return sum(float(torch.linalg.vector_norm(P.mT @ m.double() @ Q)) ** 2 for m in matrices)
