"""Grams, in float64 by default: their eigenproblem, and Cholesky factors of singular ones."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack
from eutectic.linalg.svd import numerical_rank

# Eigenvalues of a Gram carry an error of a few 1e-16·λ₁, which at this floor of singular values is
# a few 1e-4 of λ and was measured to disturb vectors and polar factors by less than 1e-5. What lies
# below cannot be trusted, only told apart from what lies far above.
GRAM_FLOOR = 1e-6
BLOCK_SIDE = 256
PANEL_BYTES = 64 << 20


def gram(tall: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return MᵀM `[n, n]`, formed in `dtype`, for `[m, n]` of any floating dtype.

    Only the upper blocks are multiplied; rows are converted panel by panel, so that no wider
    copy of a long matrix exists.
    """
    m, n = tall.shape
    rows = max(n, PANEL_BYTES // (dtype.itemsize * max(n, 1)))
    edges = [*range(0, n, BLOCK_SIDE), n] if n > BLOCK_SIDE else [0, n]
    result = torch.zeros(n, n, dtype=dtype, device=tall.device)
    for start in range(0, m, rows):
        panel = tall[start : start + rows].to(dtype)
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            result[low:high, low:].addmm_(panel[:, low:high].mT, panel[:, low:])
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        result[high:, low:high] = result[low:high, high:].mT
    return result


def images(tall: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and S with M·V = U·diag(S), in float64, for right singular vectors V."""
    U = tall.double() @ V
    S = lapack.column_norms(U)
    return U.div_(S), S


def gram_pairs(squared: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor] | None:
    """Return singular values above `tolerance`·S₁ and right vectors of M, from MᵀM in float64.

    None when singular values below `GRAM_FLOOR`·S₁ would have to be
    kept or told apart, and for a zero matrix. The entries should be of order 1.
    """
    eigenvalues, V = lapack.eigh(squared)
    S = eigenvalues.clamp_min(0).sqrt()
    first, last = float(S[0]), float(S[-1])
    if first == 0 or (last < GRAM_FLOOR * first and (tolerance is None or tolerance < GRAM_FLOOR)):
        return None
    kept = len(S) if tolerance is None else numerical_rank(S, tolerance)
    return S[:kept], V[:, :kept]


def explain_routes(parts: Iterable[str], precision: str) -> str:
    """Join sentences on routes over Grams, and name what sends any of them to the thin SVD."""
    floor = (
        f"thin SVD in float64 where singular values below {short(GRAM_FLOOR)}·S₁ have to be kept "
        "(full support, a tighter tolerance, float64 input)"
    )
    return "; ".join([*parts, *([floor] if precision == "fast" else [])])


def short(bound: float) -> str:
    """Return 1e-6 for 1e-06."""
    return f"{bound:.0e}".replace("e-0", "e-")


LARGEST_RIDGE = 1e-2  # relative to the mean diagonal; more would no longer be the same system
OWN_NOISE = 1e-11  # least ridge an input, or solving costs more digits than float32 has
LARGEST_NOISE = 1e-3  # a pivot above this share of its diagonal entry is never called noise


def noise_share(size: int, unit_roundoff: float) -> float:
    """Return the share of its diagonal entry below which a pivot of a Gram is noise."""
    return min(4 * size**0.5 * unit_roundoff, LARGEST_NOISE)


def next_ridge(ridge: float, size: int, unit_roundoff: float, largest: float) -> float:
    """Return the ridge to try after one that did not help: `size` rounding errors, then tenfold."""
    return min(max(10 * ridge, size * unit_roundoff), largest)


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
    `unit_roundoff` that of the dtype the Gram was *stored* in, or that of the sums and products
    here if it is larger: below it the pivot is noise. Then ρ
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
    unit_roundoff = max(unit_roundoff, OWN_NOISE)
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    dead = diagonal == 0
    sound = noise_share(n, unit_roundoff)
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
        rho = next_ridge(rho, n, unit_roundoff, largest)
