"""The inverse of a matrix in few rows and a diagonal, without the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack
from eutectic.linalg.gram import LARGEST_RIDGE, OWN_NOISE, next_ridge, noise_share

FEW = 0.5  # of the width: so many rows are multiplied faster than the matrix that they make


def few_rows(count: float, width: int) -> bool:
    """Tell whether rows are so few that no matrix of their width is formed."""
    return count < FEW * width


@dataclass(frozen=True, eq=False)
class Inverse:
    """B -> B·A⁻¹ for A = FᵀF + diag(e) `[n, n]`, in float64, by `invert`.

    Inputs with hardly anything on the diagonal are solved for by themselves, in the Schur
    complement of the others (Woodbury's identity divides by the diagonal).

    Attributes:
        inner: L⁻¹F `[k, n]`, L the Cholesky factor of I + F_L diag(e_L)⁻¹ F_Lᵀ, of the others.
        inverse: 1/e `[n]`; 0 for the inputs by themselves.
        alone: positions `[s]` of these.
        schur: the Cholesky factor `[s, s]` of their Schur complement.
    """

    inner: Tensor
    inverse: Tensor
    alone: Tensor
    schur: Tensor

    def times(self, right: Tensor) -> Tensor:
        """Return B·A⁻¹ `[m, n]`. Cost: O(m·n·k)."""
        right = right.double()
        own = self.inner[:, self.alone]
        seen = (right * self.inverse) @ self.inner.mT
        if not len(self.alone):
            return right * self.inverse - (seen @ self.inner) * self.inverse
        solved = torch.cholesky_solve((right[:, self.alone] - seen @ own).mT, self.schur).mT
        # (B − y·A_SL)·A_LL⁻¹: what is left to the others once y is known; A_SL = F_SᵀF_L.
        shadow = seen + solved @ own.mT
        result = right * self.inverse - (shadow @ self.inner) * self.inverse
        result[:, self.alone] = solved
        return result


def invert(rows: Tensor, diagonal: Tensor, alone: Tensor) -> tuple[Inverse, Tensor] | None:
    """Return the inverse of FᵀF + diag(e), and the pivots of what is solved for by itself.

    Args:
        rows: F `[k, n]`, float64.
        diagonal: e `[n]`, float64, positive for all inputs but those in `alone`.
        alone: positions of the inputs that are solved for by themselves.

    Returns:
        None where the matrix is not positive definite to rounding. Cost: O(n·k²), and s³ for s
        inputs by themselves; memory k·n.
    """
    inverse = 1 / diagonal.clamp_min(torch.finfo(torch.float64).tiny)
    inverse[alone] = 0.0
    middle = (rows * inverse) @ rows.mT
    middle.diagonal().add_(1.0)
    lower = lapack.cholesky(middle)
    if lower is None:
        return None
    inner = lapack.solve_lower(lower, rows)
    own = inner[:, alone]
    square = own.mT @ own
    square.diagonal().add_(diagonal[alone])
    schur = lapack.cholesky(square)
    if schur is None:
        return None
    return Inverse(inner, inverse, alone, schur), schur.diagonal().square()


@dataclass(frozen=True, eq=False)
class RidgedInverse:
    """An inverse and what it took to get it; see `gram.RidgedCholesky`."""

    inverse: Inverse
    ridge: float
    escalated: bool
    dead: int


def ridged_inverse(
    rows: Tensor, diagonal: Tensor, *, ridge: float, unit_roundoff: float
) -> RidgedInverse:
    """Return (A + ρ·mean(diag A)·I)⁻¹ for A = FᵀF + diag(e), with a larger ρ where A is singular.

    The rule is that of `gram.ridged_cholesky`, and so is ρ: a pivot of at most 4√n rounding errors
    of its diagonal entry is noise. An input with more than that on the diagonal has a sound pivot
    whatever the rows are; the others are solved for by themselves and show theirs. More of these
    than rows make A singular. Inputs that are never active are set aside.

    Args:
        rows: F `[k, n]`, float64; not modified.
        diagonal: e `[n]`, float64, at least 0; not modified.
        ridge: the ρ to start with.
        unit_roundoff: eps of the dtype that the Grams came in.

    Raises:
        NumericalError: the rows hold numbers that overflow; no ridge helps.

    Cost: O(n·k²) a trial; no `[n, n]` matrix is formed.
    """
    n = rows.shape[1]
    unit_roundoff = max(unit_roundoff, OWN_NOISE)
    whole = rows.square().sum(0) + diagonal
    mean = float(whole.mean())
    dead = whole == 0
    sound = noise_share(n, unit_roundoff)
    largest = max(LARGEST_RIDGE, ridge)
    rho = ridge
    while True:
        added = rho * mean + dead.to(rows) * mean
        own, sum_ = diagonal + added, whole + added
        last = rho == largest
        alone = (own < sound * sum_).nonzero()[:, 0]
        if last and len(alone) > len(rows):
            alone = alone[:0]
        if len(alone) <= len(rows):
            found = invert(rows, own, alone)
            if found is not None:
                inverse, pivots = found
                if last or bool((pivots >= sound * sum_[alone]).all()):
                    return RidgedInverse(inverse, rho, rho > ridge, int(dead.sum()))
        if last:
            raise NumericalError(
                "the summed Gram matrix cannot be inverted: its rows are too large or too uneven, "
                f"the mean of its diagonal is {mean:.3g}.\n"
                "Collect the statistics again; if they are right, set a larger ridge."
            )
        rho = next_ridge(rho, n, unit_roundoff, largest)


def times_without(right: Tensor, inverse: Inverse, taken: Tensor) -> Tensor | None:
    """Return B·(A − MᵀM)⁻¹ from the inverse of A.

    Args:
        right: B `[m, n]`.
        inverse: of A `[n, n]`.
        taken: M `[t, n]`, float64.

    Returns:
        None where A − MᵀM is not positive definite. Cost: O(n·k·(m + t)).
    """
    # (A − MᵀM)⁻¹ = A⁻¹ + A⁻¹Mᵀ(I − MA⁻¹Mᵀ)⁻¹MA⁻¹
    images = inverse.times(taken)
    inner = torch.eye(len(taken), dtype=images.dtype, device=images.device) - images @ taken.mT
    lower = lapack.cholesky((inner + inner.mT) / 2)
    if lower is None:
        return None
    solved = inverse.times(right)
    return solved + torch.cholesky_solve((solved @ taken.mT).mT, lower).mT @ images
