"""Cholesky factors of Grams that may be singular."""

from dataclasses import dataclass

from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack

LARGEST_RIDGE = 1e-2  # relative to the mean diagonal; more would no longer be the same system
LARGEST_NOISE = 1e-3  # a pivot above this share of its diagonal entry is never called noise


@dataclass(frozen=True)
class RidgedCholesky:
    """A Cholesky factor and what it took to get it.

    Attributes:
        factor: lower triangular L `[n, n]`, float64.
        ridge: what was added to the diagonal, relative to its mean.
        escalated: whether that is more than was asked for.
        dead: number of rows and columns that are zero.
    """

    factor: Tensor
    ridge: float
    escalated: bool
    dead: int


def ridged_cholesky(gram: Tensor, *, ridge: float, unit_roundoff: float) -> RidgedCholesky:
    """Decompose A + ρ·mean(diag A)·I = LLᵀ, with a larger ρ only where A is singular.

    A counts as singular when a pivot is at most 4√n rounding errors of its diagonal entry, with
    `unit_roundoff` that of the dtype the Gram was *stored* in: below it the pivot is noise. Then ρ
    starts at n rounding errors, which is large enough to silence the noise of a right side formed
    with the same Gram, and grows tenfold until the pivots are sound. A zero row and column
    (an input that is never active) is set aside with a unit pivot and asks for no ridge.

    Args:
        gram: A `[n, n]`, float64, symmetric positive semidefinite, not zero; not modified.
        ridge: the ρ to start with.
        unit_roundoff: eps of the dtype that the Gram came in.

    Raises:
        NumericalError: A is not positive semidefinite: the largest ridge (1e-2) did not help.

    Cost: n³/3 a trial, one trial for a Gram of full rank.
    """
    n = len(gram)
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    dead = diagonal == 0
    sound = min(4 * n**0.5 * unit_roundoff, LARGEST_NOISE)
    largest = max(LARGEST_RIDGE, ridge)
    rho = ridge
    while True:
        matrix = gram.clone()
        matrix.diagonal().add_(rho * mean).add_(dead.to(matrix), alpha=mean)
        factor = lapack.cholesky(matrix)
        if factor is not None:
            pivots = factor.diagonal().square() / matrix.diagonal()
            if rho == largest or float(pivots.min()) >= sound:
                return RidgedCholesky(factor, rho, rho > ridge, int(dead.sum()))
        if rho == largest:
            smallest = float(lapack.eigh(gram)[0][-1])
            raise NumericalError(
                "the summed Gram matrix is not positive semidefinite: its smallest eigenvalue is "
                f"{smallest:.3g}, the mean of its diagonal {mean:.3g}.\n"
                "Collect the statistics again; if they are right, set a larger ridge."
            )
        rho = min(max(10 * rho, n * unit_roundoff), largest)
