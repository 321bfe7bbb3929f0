"""Polar factors by iterations: dynamically weighted Halley, and scaled Newton–Schulz.

QDWH: Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration for computing the matrix polar
decomposition", SIAM J. Matrix Anal. Appl. 31 (2010). Newton–Schulz scaling: Chen and Chow,
"A stable scaling of Newton–Schulz for improving the sign function computation" (2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack

# Above this weight the Cholesky form loses sqrt(weight)·eps, so those steps run in float64.
WIDE_WEIGHT = 100.0
# A predicted distance to 1 that one Newton–Schulz step takes below float32's rounding.
CLOSE = 1e-3
PROBES = 12
POWER_STEPS = 8


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


def spectrum_ends(gram: Tensor) -> Ends | None:
    """Estimate both ends of the spectrum of M from its float64 Gram MᵀM.

    Block power iteration on the Gram, and on its inverse through one Cholesky factor, from a fixed
    seed, with a Rayleigh–Ritz step at the end. None when the Gram is not numerically positive
    definite.
    """
    lower = lapack.cholesky(gram)
    if lower is None:
        return None
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = min(PROBES, len(gram))
    start = torch.randn(len(gram), width, generator=generator, dtype=torch.float64)
    start = start.to(gram.device)
    top, _ = _power(lambda x: gram @ x, start)
    bottom, vectors = _power(lambda x: torch.cholesky_solve(x, lower), start)
    if not bool(torch.isfinite(bottom).all()) or float(bottom[-1]) <= 0:
        return None
    return Ends(math.sqrt(float(top[0])), bottom.rsqrt(), vectors)


def _power(apply: Callable[[Tensor], Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading Ritz values and vectors of a symmetric map after a few block steps."""
    for _ in range(POWER_STEPS):
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


def halley(matrix: Tensor, gram: Tensor, largest: float, smallest: float) -> Tensor | None:
    """Return the polar factor of `[m, n]` with m ≥ n and full column rank, or None.

    X ← (b/c)X + (a − b/c)·X(I + cXᵀX)⁻¹ by Cholesky. The first steps, while their weight c is
    large, run in float64; the others in the input's dtype.

    Args:
        matrix: M, float32 or float64.
        gram: MᵀM in float64.
        largest: estimate of the largest singular value.
        smallest: estimate of the smallest.
    """
    scale = 1.05 * largest
    low = min(0.8 * smallest / scale, 1.0)
    x, g = matrix.double() / scale, gram / scale**2
    while 1 - low > CLOSE:
        a, b, c = halley_weights(low)
        if c <= WIDE_WEIGHT:
            x = x.to(matrix.dtype)
        shifted = g.to(x.dtype) * c
        shifted.diagonal().add_(1)
        lower = lapack.cholesky(shifted)
        if lower is None:
            return None
        if c > WIDE_WEIGHT:  # an explicit inverse of this condition would lose c·eps
            x = x * (b / c) + torch.cholesky_solve(x.mT, lower).mT * (a - b / c)
        else:
            x = torch.addmm(x, x, torch.cholesky_inverse(lower), beta=b / c, alpha=a - b / c)
        low = min(low * (a + b * low * low) / (1 + c * low * low), 1.0)
        if 1 - low > CLOSE:
            narrow = x.to(matrix.dtype) if halley_weights(low)[2] <= WIDE_WEIGHT else x
            g = narrow.mT @ narrow
    return newton_schulz(x.to(matrix.dtype), low=low)


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
