"""Leading singular triplets, without the rest of the spectrum.

Everything happens on the Gram of the shorter side, formed in float64, and is accepted by a bound:
with R = GV − VΘ the residual of the k wanted Ritz pairs, the subspace is off by at most
‖R‖ / gap (Davis and Kahan, 1970), which has to stay below `SUBSPACE_BOUND` per direction.

Routes, each falling back on the next:

1. block Krylov in float64: k at most 1/`KRYLOV_SHARE` of the side;
2. float32 eigenproblem, its leading vectors corrected in float64: k at most 1/`CORRECTED_SHARE`
   of the side, beyond which the corrections cost what the float64 problem costs;
3. float64 eigenproblem: k beyond that, or the gap is too small for the bound;
4. thin SVD in float64: exact precision, or triplets below `GRAM_FLOOR`·S₁ have to be kept.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.gram import GRAM_FLOOR, gram, images
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets, magnitude, numerical_rank, thin_svd

Precision = Literal["fast", "exact"]

SMALL_SIDE = 64  # below this the whole eigenproblem is free
KRYLOV_SHARE = 64
CORRECTED_SHARE = 6
KRYLOV_LIMIT = 5  # beyond 1/5 of the side the Krylov space costs more than the eigenproblem
SUBSPACE_BOUND = 1e-6
CORRECTIONS = 3


def leading_singular(
    matrix: Tensor | LowRank,
    k: int,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    precision: Precision = "fast",
) -> Triplets:
    """Return the first k singular triplets of M, or those of them above `tolerance`·S₁.

    Args:
        matrix: `[out, in]`, or its thin factors, which are not multiplied out.
        k: how many; at most min(out, in) are returned, of thin factors at most their inner size.
        tolerance: relative bound below which a singular value counts as zero and is dropped;
            None keeps all k, zero ones with arbitrary orthonormal vectors.
        seed: of the Krylov start; derive it from the tensor's name.
        precision: "exact" takes the thin SVD in float64.

    Returns:
        U `[out, k']`, S `[k']`, V `[in, k']` in float64. Equal singular values across the cut make
        the answer a matter of choice; it is then one of the valid ones.
    """
    if isinstance(matrix, LowRank):
        P, core, Q, unit = matrix.core()
        small = leading_singular(core, k, tolerance=tolerance, seed=seed, precision=precision)
        return Triplets(P @ small.U, small.S * unit, Q @ small.V)
    k = max(0, min(k, *matrix.shape))
    if not k:
        return _none(matrix)
    unit = magnitude(matrix)
    found = None
    if unit and precision == "fast":
        found = _from_gram(_divided(matrix, unit), k, tolerance, seed)
    if found is None:
        found = thin_svd(matrix).first(k)
        return found if tolerance is None else found.first(numerical_rank(found.S, tolerance))
    return Triplets(found.U, found.S * unit, found.V)


def leading_singular_stack(
    matrices: Iterable[Tensor | LowRank],
    k: int,
    *,
    orthogonal_to: Tensor | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    precision: Precision = "fast",
) -> list[Triplets]:
    """Return `leading_singular` of M_t, or of (I − PPᵀ)M_t, for each matrix of a stack.

    Without `orthogonal_to` this is a loop and shares nothing between the matrices.

    Args:
        matrices: T matrices `[out, in]`, or their thin factors, which are not multiplied out.
        k: triplets per matrix.
        orthogonal_to: P `[out, c]`, orthonormal columns. When they nearly fill the space the work
            is done in coordinates of their complement, found once for all matrices; otherwise
            only P itself is shared.
        tolerance: as in `leading_singular`, relative to the larger of the projected matrix's S₁
            and the root mean square singular value of M_t itself, so that the rounding left by a
            projection that removes everything does not count as a direction.
        seed: as in `leading_singular`.
        precision: as in `leading_singular`.
    """
    if orthogonal_to is None or k < 1:
        return [
            leading_singular(m, k, tolerance=tolerance, seed=seed, precision=precision)
            for m in matrices
        ]
    P = orthogonal_to.double()
    out, c = P.shape
    basis = complement(P, seed) if 2 * c >= out else None
    triplets: list[Triplets] = []
    for matrix in matrices:
        left, right, unit = _in_units(matrix)
        if basis is not None:
            projected = basis.to(left.dtype).mT @ left
        else:
            narrow = P.to(left.dtype)
            projected = left - narrow @ (narrow.mT @ left)
        rest = projected if right is None else LowRank(projected, right)
        found = leading_singular(rest, k, tolerance=tolerance, seed=seed, precision=precision)
        if tolerance is not None:
            level = lapack.norm(left if right is None else right) / min(matrix.shape) ** 0.5
            found = found.first(int((tolerance * level < found.S).sum()))
        U = found.U if basis is None else basis @ found.U
        triplets.append(Triplets(U, found.S * unit, found.V))
    return triplets


def _in_units(matrix: Tensor | LowRank) -> tuple[Tensor, Tensor | None, float]:
    """Return M/unit and None, or its factors, the left one orthonormal; and the unit."""
    if isinstance(matrix, LowRank):
        P, core, Q, unit = matrix.core()
        return P, core @ Q.mT, unit
    unit = magnitude(matrix) or 1.0
    return _divided(matrix, unit), None, unit


def _divided(matrix: Tensor, unit: float) -> Tensor:
    """Return M/unit, widened before: small entries would leave the range of float16."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / unit


def complement(P: Tensor, seed: int = 0) -> Tensor:
    """Return an orthonormal basis `[n, n − c]` of the complement of P `[n, c]`, in float64."""
    n, c = P.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)
    basis = torch.randn(n, n - c, generator=generator, dtype=torch.float64).to(P.device)
    for _ in range(2):  # the second pass removes what rounding left of the first
        basis = lapack.orthonormal(basis - P @ (P.mT @ basis))
    return basis


def explain_leading(
    shape: tuple[int, ...] | torch.Size, k: int, precision: Precision = "fast"
) -> str:
    """Say in one sentence how `leading_singular` goes about k triplets of a shape."""
    side = min(shape)
    if k < 1:
        return "no leading triplets"
    if precision == "exact":
        return f"{k} leading triplets by the thin SVD in float64 (exact precision)"
    routes = {
        "krylov": "block Krylov on the float64 Gram",
        "corrected": "float32 eigenproblem of the Gram, corrected in float64",
        "full": "float64 eigenproblem of the Gram",
    }
    route = _route(side, k)
    fallback = "" if route == "full" else ", all of it in float64 if the gap is too small"
    return f"{k} of {side} leading triplets by {routes[route]}{fallback}"


def _none(matrix: Tensor) -> Triplets:
    out, inner = matrix.shape
    empty = torch.empty(0, dtype=torch.float64, device=matrix.device)
    return Triplets(empty.new_empty(out, 0), empty, empty.new_empty(inner, 0))


def _route(side: int, k: int) -> Literal["krylov", "corrected", "full"]:
    if side < SMALL_SIDE or CORRECTED_SHARE * k > side:
        return "full"
    return "krylov" if KRYLOV_SHARE * k <= side else "corrected"


def _from_gram(matrix: Tensor, k: int, tolerance: float | None, seed: int) -> Triplets | None:
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    G = gram(tall)
    route = _route(len(G), k)
    pairs = _krylov(G, k, tolerance, seed) if route == "krylov" else None
    if pairs is None and route != "full":
        pairs = _corrected(G, k, tolerance)
    if pairs is None:
        eigenvalues, vectors = lapack.eigh(G)
        pairs = eigenvalues[:k], vectors[:, :k]
    eigenvalues, vectors = pairs
    values = eigenvalues.clamp_min(0).sqrt()
    kept = _kept(values, len(values), tolerance)
    if float(values[kept - 1]) <= GRAM_FLOOR * float(values[0]):
        return None
    V = vectors[:, :kept]
    U, S = images(tall, V)
    return Triplets(V, S, U) if wide else Triplets(U, S, V)


def _kept(values: Tensor, k: int, tolerance: float | None) -> int:
    """Return how many of the k leading singular values are worth keeping."""
    return k if tolerance is None else max(1, min(k, numerical_rank(values, tolerance)))


def _converged(residual: Tensor, gap: float, k: int) -> bool:
    return gap > 0 and lapack.norm(residual) <= SUBSPACE_BOUND * k**0.5 * gap


def _krylov(G: Tensor, k: int, tolerance: float | None, seed: int) -> tuple[Tensor, Tensor] | None:
    """Return k leading eigenpairs by block Lanczos with full re-orthogonalisation, or None."""
    n, block = len(G), k + max(4, k // 4)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=G.dtype).to(G.device)
    space = lapack.orthonormal(G @ start)
    applied = G @ space
    while True:
        fresh = applied[:, -block:]
        for _ in range(2):
            fresh = lapack.orthonormal(fresh - space @ (space.mT @ fresh))
        space = torch.cat([space, fresh], 1)
        applied = torch.cat([applied, G @ fresh], 1)
        small = space.mT @ applied
        values, Y = lapack.eigh((small + small.mT) / 2)
        kept = _kept(values.clamp_min(0).sqrt(), k, tolerance)
        V = space @ Y[:, :kept]
        residual = applied @ Y[:, :kept] - V * values[:kept]
        if _converged(residual, float(values[kept - 1] - values[kept]), kept):
            return values[:kept], V
        if space.shape[1] + block > n // KRYLOV_LIMIT:
            return None


def _corrected(G: Tensor, k: int, tolerance: float | None) -> tuple[Tensor, Tensor] | None:
    """Return k leading eigenpairs: float32 eigenvectors, leading ones corrected in float64.

    The float32 problem leaves a window of m > k vectors V with small components along the
    others, W. To first order those are Wᵀ(GV − VΘ)/(θ_j − λ_i): subtract them, solve the small
    problem inside the window exactly, repeat until the residual bound holds.
    """
    n = len(G)
    m = min(n - 1, k + max(16, k // 2))
    scale = float(G.diagonal().max())
    values, vectors = lapack.eigh((G / scale).float())
    values = values.double() * scale
    window, others, outside = vectors[:, :m].double(), vectors[:, m:], values[m:]
    for _ in range(CORRECTIONS):
        ritz = _rayleigh_ritz(G, window)
        if ritz is None:
            return None
        window, theta, applied = ritz
        kept = _kept(theta.clamp_min(0).sqrt(), k, tolerance)
        residual = applied - window * theta
        if _converged(residual[:, :kept], float(theta[kept - 1] - outside[0]), kept):
            return theta[:kept], window[:, :kept]
        gaps = (theta.unsqueeze(0) - outside.unsqueeze(1)).clamp_min(1e-9 * float(theta[0]))
        size = float(residual.abs().max()) or 1.0
        along = (others.mT @ (residual / size).float()).double() / gaps
        window = window + (others @ (along * size).float()).double()
    return None


def _rayleigh_ritz(G: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return orthonormal Ritz vectors of span V, their values, and G·vectors; None if V is not
    of full rank.
    """
    lower = lapack.cholesky(V.mT @ V)
    if lower is None:
        return None
    basis = lapack.solve_lower(lower, V.mT).mT
    applied = G @ basis
    small = basis.mT @ applied
    theta, Y = lapack.eigh((small + small.mT) / 2)
    return basis @ Y, theta, applied @ Y
