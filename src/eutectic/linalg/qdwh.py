"""Polar factors by iterations: dynamically weighted Halley on the Gram, and Newton–Schulz.

QDWH: Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration for computing the matrix polar
decomposition", SIAM J. Matrix Anal. Appl. 31 (2010). Newton–Schulz scaling: Chen and Chow,
"A stable scaling of Newton–Schulz for improving the sign function computation" (2014).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.gram import gram

HALLEY_STEPS = 4
# Largest distance (root mean square) of G from I for 1, 2, 3 terms of G^-½.
SERIES = (1e-3, 0.01, 0.04)
PROBES = 12
POWER_STEPS = 8
TOP_STEPS = 4


@dataclass(frozen=True, eq=False)
class Ends:
    """Both ends of the singular spectrum of M.

    Attributes:
        largest: estimate of S₁, from below.
        smallest: the last few singular values, ascending, from above.
        vectors: their right singular vectors, one column each.
    """

    largest: float
    smallest: Tensor
    vectors: Tensor


def spectrum_ends(squared: Tensor) -> Ends | None:
    """Estimate both ends of the spectrum of M from its float64 Gram MᵀM.

    Block power iteration on the Gram, and on its inverse through one Cholesky factor, from a fixed
    seed, with a Rayleigh–Ritz step at the end. None when the Gram is not numerically positive
    definite.
    """
    lower = lapack.cholesky(squared)
    if lower is None:
        return None
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = min(PROBES, len(squared))
    start = torch.randn(len(squared), width, generator=generator, dtype=torch.float64)
    start = start.to(squared)
    top, _ = _power(lambda x: squared @ x, start, POWER_STEPS)
    bottom, vectors = _power(lambda x: torch.cholesky_solve(x, lower), start, POWER_STEPS)
    if not bool(torch.isfinite(bottom).all()) or float(bottom[-1]) <= 0:
        return None
    return Ends(math.sqrt(float(top[0])), bottom.rsqrt(), vectors)


def _power(apply: Callable[[Tensor], Tensor], vectors: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the leading Ritz values and vectors of a symmetric map after a few block steps."""
    for _ in range(steps):
        vectors = lapack.orthonormal(apply(vectors))
    small = vectors.mT @ apply(vectors)
    values, rotation = lapack.eigh((small + small.mT) / 2)
    return values, vectors @ rotation


def halley_weights(low: float) -> tuple[float, float, float]:
    """Return a, b, c of x(a + bx²)/(1 + cx²), which lifts the interval [low, 1] best."""
    square = low * low
    d = (4 * (1 - square) / (square * square)) ** (1 / 3)
    root = math.sqrt(1 + d)
    a = root + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root))
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def halley(matrix: Tensor, squared: Tensor, low: float) -> Tensor | None:
    """Return the polar factor of `[m, n]`, m ≥ n, or None if its condition is above 1/low.

    Each step multiplies M from the right by a function of its Gram G: (b/c)I + (a − b/c)K with
    K = (I + cG)⁻¹ by Cholesky. The steps are gathered in one `[n, n]` matrix, and the next Gram is
    a polynomial in G and K as well, so M itself is multiplied once.

    Args:
        matrix: M, float32 or float64.
        squared: MᵀM.
        low: what the smallest singular value must exceed, relative to the largest.

    Cost, in the matrix's dtype: two Cholesky decompositions of side n to bound the smallest
    singular value; for each step a Cholesky inverse and two products; one product of M's size.
    """
    g = squared.to(matrix.dtype)
    scale = 1.05 * _largest(g)
    g = g / scale**2
    low = _lower_bound(g, low / 1.05)
    if not low:
        return None
    gathered = None
    for _ in range(HALLEY_STEPS):
        a, b, c = halley_weights(low)
        shifted = g * c
        shifted.diagonal().add_(1)
        lower = lapack.cholesky(shifted)
        if lower is None:
            return None
        K = torch.cholesky_inverse(lower)
        first, second = b / c, a - b / c
        step = K * second
        step.diagonal().add_(first)
        gathered = step if gathered is None else gathered @ step
        # G·step² with GK = (I − K)/c
        g = first * first * g + (second * second - 2 * first * second) / c * K
        g -= second * second / c * gram(K, K.dtype)
        g.diagonal().add_(2 * first * second / c)
        root = inverse_root(g)
        if root is not None:
            return matrix @ ((gathered @ root) / scale)
        low = min(low * (a + b * low * low) / (1 + c * low * low), 1.0)
    return None


def inverse_root(near: Tensor) -> Tensor | None:
    """Return G^-½ by its series around I; None when G is too far from I."""
    excess = near.clone()
    excess.diagonal().sub_(1)
    distance = lapack.norm(excess) / math.sqrt(len(excess))
    if not distance <= SERIES[-1]:
        return None
    root = excess * -0.5
    if distance > SERIES[1]:
        inner = excess * (-5 / 16)
        inner.diagonal().add_(3 / 8)
        root.addmm_(excess, excess @ inner)
    elif distance > SERIES[0]:
        root += 3 / 8 * gram(excess, excess.dtype)
    root.diagonal().add_(1)
    return root


def _largest(squared: Tensor) -> float:
    """Estimate the largest singular value from the Gram, from below and within a few percent."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    probes = torch.randn(len(squared), PROBES, generator=generator).to(squared)
    values, _ = _power(lambda x: squared @ x, probes, TOP_STEPS)
    return math.sqrt(float(values[0]))


def _lower_bound(squared: Tensor, low: float) -> float:
    """Return 4·low or low, the larger that lies below all singular values; 0 if neither does.

    G − l²I has a Cholesky factor if and only if it is positive definite.
    """
    proven = 0.0
    for bound in (low, 4 * low):
        shifted = squared.clone()
        shifted.diagonal().sub_(bound**2)
        if lapack.cholesky(shifted) is None:
            break
        proven = bound
    return proven


def newton_schulz(matrix: Tensor, *, low: float = 1e-3, steps: int = 40) -> Tensor | None:
    """Return the polar factor of `[m, n]`, m ≥ n, with products alone; None if it stalls.

    X ← ½·ρX(3I − ρ²XᵀX), a true polar factor in the limit, unlike quintics whose coefficients only
    bring singular values near 1. ρ² = 3/(1 + l + l²) lifts the interval [l, 1] fastest. Singular
    values below the assumed `low` cost steps, nothing else.

    Args:
        matrix: singular values at most a little above 1.
        low: assumed lower bound of its singular values.
        steps: limit.
    """
    x, n = matrix, matrix.shape[1]
    tolerance = (50 if matrix.dtype == torch.float32 else 1e4) * torch.finfo(matrix.dtype).eps
    for _ in range(steps):
        excess = x.mT @ x
        excess.diagonal().sub_(1)
        distance = lapack.norm(excess) / math.sqrt(n)
        if not math.isfinite(distance):
            return None
        scaled = distance > 0.1 and low < 0.9
        rho2 = 3 / (1 + low + low * low) if scaled else 1.0
        rho = math.sqrt(rho2)
        # ½ρX(3I − ρ²(E + I)) with E = XᵀX − I
        x = torch.addmm(x, x, excess, beta=0.5 * rho * (3 - rho2), alpha=-0.5 * rho * rho2)
        if distance <= math.sqrt(tolerance):
            return x
        low = min(0.5 * rho * low * (3 - rho2 * low * low), 1.0)
    return None
