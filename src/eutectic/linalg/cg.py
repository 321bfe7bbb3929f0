"""Conjugate gradients on whole tensors, with the Frobenius inner product; preconditioners."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eutectic.linalg import lapack

Status = Literal[
    "converged", "iteration_limit", "trust_limit", "stagnated", "breakdown", "non_finite"
]
LinearMap = Callable[[Tensor], Tensor]

ROUNDING_ERRORS = 10  # eigenvalues below so many say nothing
NEGLIGIBLE = 0.1  # ε over the least eigenvalue, from which on its null space has to be left out
CHUNK = 1 << 16  # entries converted to float64 at a time: stays in the cache


@dataclass(frozen=True)
class CGResult:
    """What a run of conjugate gradients produced.

    Attributes:
        solution: the last good iterate, in the shape and dtype of the right side.
        iterations: steps taken.
        applications: how often the operator was applied, checks of the true residual included.
        residuals: ‖b − C(x_k)‖/‖b‖ before each step and after the last. The entries come from
            CG's recurrence; the last one is recomputed from its definition, unless the steps ran
            out above √eps, far from where rounding parts the two.
        status: why it stopped.
            converged: the recomputed residual is at most the tolerance.
            iteration_limit: the steps ran out, which is early stopping.
            trust_limit: the next step would have left the trusted ball; the solution lies on it.
            stagnated: the recurrence reached the tolerance but the recomputed residual does not
                follow: the dtype is too narrow for the condition of the operator.
            breakdown: a direction without positive curvature: the operator (or the
                preconditioner) is not positive definite on the directions searched, or the
                system has no solution.
            non_finite: NaN or Inf turned up; the solution is the iterate before it.
    """

    solution: Tensor
    iterations: int
    applications: int
    residuals: tuple[float, ...]
    status: Status


@dataclass(frozen=True)
class Trust:
    """The ball around `center` that no iterate leaves.

    Steps along directions of hardly any curvature are long: where the operator is estimated from
    few data, they follow its noise.

    Attributes:
        radius: in the Frobenius norm. An initial guess further out widens the ball to itself.
        center: None for zero.
    """

    radius: float
    center: Tensor | None = None


def conjugate_gradients(
    operator: LinearMap,
    right_side: Tensor,
    *,
    initial: Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-5,
    preconditioner: LinearMap | None = None,
    trust: Trust | None = None,
) -> CGResult:
    """Solve C(x) = b for a symmetric positive semidefinite linear map C on tensors.

    Stops when ‖b − C(x)‖ ≤ tolerance·‖b‖ (the test of `scipy.sparse.linalg.cg`). Before it reports
    success it recomputes the residual; when rounding has parted the two, it goes on from the
    recomputed one, and gives up once that no longer helps.

    Args:
        operator: x -> C(x); must not modify x and must return a new tensor.
        right_side: b, any shape, float32 or float64; the tensors of the run have its dtype,
            inner products are summed in float64.
        initial: x₀ (default zero); not modified.
        iterations: the most steps to take.
        tolerance: relative residual at which to stop.
        preconditioner: r -> M⁻¹(r), symmetric positive definite.
        trust: where to end: the first step that would leave this ball is cut off at its surface
            (Steihaug, SIAM J. Numer. Anal. 20, 1983).

    Returns:
        The result record. It never raises: the caller decides what a status means. b = 0 gives
        x = 0. On a rank-deficient consistent system x keeps x₀'s part in the null space.

    Cost: one application of C (and of M⁻¹) a step and at most two besides; five tensors of memory,
        six with a trusted ball around another point than zero.
    """
    b_norm = norm(right_side)
    x = torch.zeros_like(right_side) if initial is None else initial.to(right_side, copy=True)
    if not math.isfinite(b_norm):
        return CGResult(x, 0, 0, (math.nan,), "non_finite")
    if b_norm == 0:
        return CGResult(torch.zeros_like(right_side), 0, 0, (0.0,), "converged")
    applications = int(bool(x.any()))
    r = right_side - operator(x) if applications else right_side.clone()
    curve = [norm(r) / b_norm]
    p: Tensor | None = None
    rho = 0.0
    steps = 0
    if trust is not None:
        trust = replace(trust, radius=max(trust.radius, norm(_from_center(x, trust))))
    best_recomputed = math.inf
    status: Status
    while True:
        if not math.isfinite(curve[-1]):
            status = "non_finite"
            break
        done = curve[-1] <= tolerance
        if done or steps == iterations:
            if steps and (done or curve[-1] < torch.finfo(x.dtype).eps ** 0.5):
                r = right_side - operator(x)
                applications += 1
                curve[-1] = norm(r) / b_norm
            if curve[-1] <= tolerance:
                status = "converged"
                break
            if steps == iterations:
                status = "iteration_limit"
                break
            if curve[-1] > best_recomputed / 2:
                status = "stagnated"
                break
            best_recomputed = curve[-1]
            p = None
        z = r if preconditioner is None else preconditioner(r)
        rho, previous_rho = inner(r, z), rho
        p = z.clone() if p is None else p.mul_(rho / previous_rho).add_(z)
        q = operator(p)
        applications += 1
        curvature = inner(p, q)
        if not (math.isfinite(rho) and math.isfinite(curvature)):
            status = "non_finite"
            break
        # By Kantorovich's inequality a positive definite C keeps this ratio above 2/√cond(C).
        if rho <= 0 or curvature <= torch.finfo(p.dtype).eps * norm(p) * norm(q):
            status = "breakdown"
            break
        step = rho / curvature
        longest = math.inf if trust is None else _longest_step(x, p, trust)
        x.add_(p, alpha=min(step, longest))
        r.sub_(q, alpha=min(step, longest))
        steps += 1
        curve.append(norm(r) / b_norm)
        if step > longest and curve[-1] > tolerance:
            status = "trust_limit"
            break
    return CGResult(x, steps, applications, tuple(curve), status)


def _longest_step(x: Tensor, direction: Tensor, trust: Trust) -> float:
    """Return the largest t ≥ 0 with ‖x + t·direction − center‖ ≤ radius."""
    from_center = _from_center(x, trust)
    square = inner(direction, direction)
    along = inner(from_center, direction)
    inside = max(trust.radius**2 - inner(from_center, from_center), 0.0)
    return max((math.sqrt(along**2 + square * inside) - along) / square, 0.0)


def _from_center(x: Tensor, trust: Trust) -> Tensor:
    return x if trust.center is None else x - trust.center


def conjugate_gradients_by_eigenbasis(
    matrix: Tensor,
    right_side: Tensor,
    *,
    initial: Tensor,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> CGResult:
    """Return what `conjugate_gradients` returns for C(X) = X·A, without a product a step.

    Every iterate is X₀ + R₀·ψ(A) for a polynomial ψ which the eigenvalues of A and the norms of
    the columns of R₀Q decide (A = QΛQᵀ): CG runs on one row of length `in`, in float64, and ψ is
    applied once.

    Args:
        matrix: A `[in, in]`, symmetric positive semidefinite.
        right_side: B `[out, in]`, in the dtype of A.
        initial: X₀ `[out, in]`.
        iterations: the most steps to take.
        tolerance: relative residual at which to stop.

    Returns:
        The result record; `applications` counts what plain conjugate gradients would have needed.

    Cost: an eigen-decomposition of A and four products `[out, in]·[in, in]`, whatever the number
    of steps: cheaper than plain steps when `eigenbasis_pays`.
    """
    b_norm = norm(right_side)
    residual = right_side - initial @ matrix
    r_norm = norm(residual)
    if b_norm == 0 or r_norm == 0 or not math.isfinite(b_norm) or not math.isfinite(r_norm):
        return conjugate_gradients(
            lambda x: x @ matrix, right_side, initial=initial, iterations=0, tolerance=tolerance
        )
    eigenvalues, basis = lapack.eigh(matrix)
    coordinates = residual @ basis
    weights = lapack.column_norms(coordinates, torch.float64)
    spectrum = eigenvalues.double()
    row = conjugate_gradients(
        lambda v: spectrum * v,
        weights,
        iterations=iterations,
        tolerance=tolerance * b_norm / r_norm,
    )
    polynomial = torch.where(weights > 0, row.solution / weights, 0).to(residual)
    x = initial + (coordinates * polynomial) @ basis.T
    final = norm(right_side - x @ matrix) / b_norm
    curve = (*(value * r_norm / b_norm for value in row.residuals[:-1]), final)
    status = row.status
    if status == "converged" and final > tolerance:
        status = "stagnated"
    return CGResult(x, row.iterations, row.applications + 1, curve, status)


def eigenbasis_pays(rows: int, columns: int, iterations: int) -> bool:
    """Tell whether `conjugate_gradients_by_eigenbasis` is cheaper for that many steps.

    A symmetric eigen-decomposition takes as long as about 7·in/out products `[out, in]·[in, in]`;
    twice as many steps are asked for, because a run may stop early. Depends on shapes alone, so
    that the same request always takes the same path.
    """
    return iterations * rows >= 14 * columns


def inner(a: Tensor, b: Tensor) -> float:
    """Return Σ a·b, products and sum in float64."""
    x, y = a.reshape(-1), b.reshape(-1)
    if x.dtype == torch.float64:
        return float(torch.dot(x, y))
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        total += torch.dot(x[part].double(), y[part].double())
    return float(total)


def norm(x: Tensor) -> float:
    """Return the Frobenius norm, summed in float64."""
    return lapack.norm(x, torch.float64)


def jacobi(diagonal: Tensor) -> LinearMap:
    """Return r -> r / diag(C); entries where the diagonal is not positive pass unchanged.

    Args:
        diagonal: diag(C), broadcastable to the shape of r.
    """
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 1)
    return lambda r: r * inverse


def kronecker(
    left: Tensor | None, right: Tensor, dtype: torch.dtype, unit_roundoff: float = 0.0
) -> LinearMap:
    """Return R -> f(H) R f(A), f(λ) = λ²/(λ + ε)³, in place of H⁻¹ R A⁻¹.

    f is 1/λ where a Gram determines something and goes to 0 in its null space, where an inverse
    would blow up the rounding of residuals until no search direction has curvature any more.
    Gradients of a softmax, or before a layer norm, always lie in a subspace. Of one Gram alone that
    is not singular the ridged inverse is all but the operator's own, and Cholesky solves cost less
    than forming f(A); of a singular one f(A) is formed of its eigenvalues.

    Args:
        left: H `[out, out]`, or None for the identity.
        right: A `[in, in]`.
        dtype: of the tensors that it will be applied to.
        unit_roundoff: the largest eps among the dtypes that the Grams came in.

    Cost: of two factors a Cholesky inverse and two products each, in float64, and two products an
    application; of one factor n³/3 in float64 and two triangular solves an application, or an
        eigenproblem and one product.
    """
    unit_roundoff = max(unit_roundoff, torch.finfo(dtype).eps)
    if left is None:
        wide, ridge = _factor(right, ROUNDING_ERRORS * unit_roundoff)
        if _reaches(wide, ridge):
            values, vectors = lapack.eigh(right.double())
            inverse = ((vectors * _filtered(values, unit_roundoff)) @ vectors.mT).to(dtype)
            return lambda r: r @ inverse
        factor = wide.to(dtype)
        return lambda r: torch.cholesky_solve(r.mT, factor).mT
    left_inverse, right_inverse = (
        _filtered_inverse(gram, unit_roundoff).to(dtype) for gram in (left, right)
    )
    return lambda r: left_inverse @ r @ right_inverse


def of_rows(rows: Tensor, dtype: torch.dtype, unit_roundoff: float = 0.0) -> LinearMap:
    """Return R -> R f(FᵀF) for rows F `[k, in]`, f as in `kronecker`; it stays among the rows.

    Cost: an eigenproblem of side k in float64, and two products `[out, in]·[in, k]` an application.
    """
    unit_roundoff = max(unit_roundoff, torch.finfo(dtype).eps)
    wide = rows.double()
    values, vectors = lapack.eigh(wide @ wide.mT)
    kept = _filtered(values, unit_roundoff)
    # The directions Fᵀu/√λ have norm 1; their f goes with λ² to 0.
    scaled = torch.where(values > 0, kept / values.clamp_min(torch.finfo(values.dtype).tiny), 0)
    directions = (vectors.mT @ wide).to(dtype)
    scaled = scaled.to(dtype)
    return lambda r: ((r @ directions.mT) * scaled) @ directions


def _filtered(values: Tensor, unit_roundoff: float) -> Tensor:
    """Return λ²/(λ + ε)³ of a Gram's eigenvalues over their mean size, ε ten rounding errors."""
    size = float(lapack.norm(values))
    if not size:
        return torch.zeros_like(values)
    values = values.clamp_min(0) / size
    return values.square() / (values + ROUNDING_ERRORS * unit_roundoff) ** 3


def _reaches(factor: Tensor, ridge: float) -> bool:
    """Tell whether (A + εI)⁻¹, of a Cholesky factor, is next to 1/ε somewhere: A is singular.

    By three steps of inverse iteration, which find the norm of an inverse that large.
    """
    start = torch.Generator().manual_seed(0)
    x = torch.randn(len(factor), 1, dtype=factor.dtype, generator=start).to(factor.device)
    largest = 0.0
    for _ in range(3):
        x = torch.cholesky_solve(x / lapack.norm(x), factor)
        largest = float(lapack.norm(x))
    return ridge * largest > NEGLIGIBLE


def _factor(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the Cholesky factor of A + εI and ε, raised tenfold where A is too far from positive.

    A is the Gram with a mean diagonal of 1 (a factor on M⁻¹ changes nothing for conjugate
    gradients). The identity, with ε = 0, where it is indefinite.
    """
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    while mean > 0 and ridge < 1:
        factor = lapack.cholesky(gram.double() / mean + ridge * identity)
        if factor is not None:
            return factor, ridge
        ridge *= 10
    return identity, 0.0


def _filtered_inverse(gram: Tensor, unit_roundoff: float) -> Tensor:
    """Return A²(A + εI)⁻³ of the Gram, ε being ten rounding errors of its norm; see `_factor`."""
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    level = lapack.norm(gram, torch.float64) / mean if mean > 0 else 0.0
    factor, ridge = _factor(gram, ROUNDING_ERRORS * unit_roundoff * level)
    inverse = torch.cholesky_inverse(factor)
    if ridge * lapack.norm(inverse) > NEGLIGIBLE:
        kept = torch.eye(len(gram)).to(inverse).sub_(inverse, alpha=ridge)  # A(A + εI)⁻¹
        inverse = kept @ inverse @ kept
    return inverse
