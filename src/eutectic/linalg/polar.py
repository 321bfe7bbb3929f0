"""The polar factor U Vᵀ of a matrix M = U S Vᵀ, by the cheapest route that can be trusted.

| route | what it does | first choice for |
|---|---|---|
| `halley` | QDWH steps by Cholesky on the float64 Gram | shorter side from `HALLEY_SIDE` on |
| `gram` | float64 eigenproblem of the smaller Gram MᵀM | shorter sides below that |
| `products` | scaled Newton–Schulz, matrix products only | accelerators |
| `svd` | thin SVD in float64 | `precision="exact"` |

A route declines what it cannot do well, its result is checked on random vectors, and the next one
takes over: `gram` after `halley` and `products`, the thin SVD last. `halley` runs its steps in the
input's dtype and keeps to a condition of `CONDITION` (nearly flat spectra), which one Cholesky
decomposition certifies. Squaring M squares its condition: `gram` keeps singular values down to
`GRAM_FLOOR`·S₁, `products`, all float32, to `PRODUCTS_FLOOR`·S₁. Smaller ones that have to be kept
(full support, or a tighter tolerance) go to the thin SVD. Against the float64 SVD of the same input
the result agrees to 1e-4 in relative Frobenius norm (measured: below 3e-5, as far as a float32 SVD
is off; `products` 1e-4), for any number of threads to 1e-6.

Why not cheaper still: docs/linear_algebra.md counts it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.gram import gram, gram_pairs, images, short
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.qdwh import Ends, halley, newton_schulz, spectrum_ends
from eutectic.linalg.svd import default_tolerance, magnitude, numerical_rank, thin_svd

Support = Literal["numerical", "full"]
Precision = Literal["fast", "exact"]
Route = Literal["svd", "gram", "halley", "products"]
Gram = Callable[[], Tensor]
Matrix = TypeVar("Matrix", Tensor, LowRank)

HALLEY_SIDE = 128  # below, the eigenproblem is as cheap
CONDITION = 12  # to here I + cG and its inverse in float32 disturb the factor by less than 1e-6
ROUNDING = 1e-5  # estimate of what M·(MᵀM)^-½ may lose in the input's dtype; 2.5 times that is seen
NARROW = 1e-4  # S_n/S₁ from which the eigenvalues of a float64 Gram are exact enough for (MᵀM)^-½
PRODUCTS_FLOOR = 1e-3  # Newton–Schulz in float32 loses eps·S₁/s in the direction of s
MARGIN = 1.05  # estimates this near the rank tolerance are left to the eigenproblem
CHECK_PROBES = 4
CHECK_BOUND = 1e-5


@dataclass(frozen=True, eq=False)
class Polar(Generic[Matrix]):
    """A polar factor with its by-products.

    Attributes:
        factor: U Vᵀ `[out, in]` over the kept singular directions, in the input's form and dtype.
        nuclear_norm: Σ of the kept singular values.
        rank: how many directions were kept.
        route: the route that gave the result.
    """

    factor: Matrix
    nuclear_norm: float
    rank: int
    route: Route

    @property
    def mean_singular_value(self) -> float:
        """Nuclear norm over rank; 0 for a zero matrix."""
        return self.nuclear_norm / self.rank if self.rank else 0.0


@overload
def polar(
    matrix: Tensor,
    *,
    support: Support = ...,
    rank_tolerance: float | None = ...,
    precision: Precision = ...,
    route: Route | None = ...,
) -> Polar[Tensor]: ...
@overload
def polar(
    matrix: LowRank,
    *,
    support: Support = ...,
    rank_tolerance: float | None = ...,
    precision: Precision = ...,
    route: Route | None = ...,
) -> Polar[LowRank]: ...
def polar(
    matrix: Tensor | LowRank,
    *,
    support: Support = "numerical",
    rank_tolerance: float | None = None,
    precision: Precision = "fast",
    route: Route | None = None,
) -> Polar[Tensor] | Polar[LowRank]:
    """Return U Vᵀ of M = U S Vᵀ, the nuclear norm and the rank.

    Args:
        matrix: `[out, in]`, any floating dtype (half precision is computed as float32), or its
            thin factors. No NaN or Inf.
        support: "numerical" keeps the directions with singular values above
            `rank_tolerance`·S₁, "full" keeps min(out, in) of them, whatever they are (for thin
            factors: as many as the factors' inner size).
        rank_tolerance: None: eps of the dtype × min(max(out, in), 128).
        precision: "fast" chooses a route by shape and device; "exact" takes the thin SVD.
        route: take this one first; its check and the fall-backs stay.

    Returns:
        The factor with nuclear norm and rank. A zero matrix has rank 0 and a zero factor under
        numerical support; under full support its factor is an arbitrary partial isometry.

    Cost, with n the shorter side and m the longer: the Gram mn² in float64 and one product 2mn²;
    besides, `gram` about 9n³ flops in float64, `halley` about 6n³ in the input's dtype for each of
    one or two steps. Scratch: four matrices of float64.

    Example:
        >>> flat = polar(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        >>> round(flat.nuclear_norm, 6), flat.rank
        (4.0, 2)
    """
    if rank_tolerance is None:
        rank_tolerance = default_tolerance(matrix.dtype, matrix.shape)
    if isinstance(matrix, LowRank):
        P, core, Q, unit = matrix.bases()
        small = polar(
            core, support=support, rank_tolerance=rank_tolerance, precision=precision, route=route
        )
        factor = LowRank(P.times(small.factor, matrix.dtype), Q.times(None, matrix.dtype).mT)
        return Polar(factor, small.nuclear_norm * unit, small.rank, small.route)
    wide = matrix.shape[0] < matrix.shape[1]
    work = matrix.mT if wide else matrix
    if work.dtype not in (torch.float32, torch.float64):
        work = work.float()
    unit = magnitude(work)
    chosen = route or choose_route(matrix.shape, matrix.device.type, precision)
    tolerance = rank_tolerance if support == "numerical" else None
    scaled = work / (unit or 1.0)
    squared = functools.cache(lambda: gram(scaled))  # routes share it
    for kernel in _FALLBACKS[chosen] if unit else ():
        found = _KERNELS[kernel](scaled, squared, tolerance)
        if found is not None and _is_polar(scaled, found.factor):
            factor = found.factor.mT if wide else found.factor
            norm = found.nuclear_norm * unit
            return Polar(factor.to(matrix.dtype), norm, found.rank, found.route)
    return _by_svd(matrix, support, rank_tolerance)


def choose_route(shape: tuple[int, ...] | torch.Size, device: str, precision: Precision) -> Route:
    """Return the route that `polar` tries first."""
    if precision == "exact" or not min(shape):
        return "svd"
    if device != "cpu":
        return "products"
    return "halley" if min(shape) >= HALLEY_SIDE else "gram"


def explain_polar(
    shape: tuple[int, ...] | torch.Size, device: str = "cpu", precision: Precision = "fast"
) -> str:
    """Say in one sentence which route `polar` takes for a shape, and why."""
    side = min(shape)
    if not side:
        return "no polar factor"
    route = choose_route(shape, device, precision)
    reasons = {
        "svd": "thin SVD in float64 (exact precision)",
        "gram": f"float64 Gram eigenproblem of side {side} (shorter side below {HALLEY_SIDE})",
        "halley": f"Halley steps by Cholesky of side {side} (condition up to {CONDITION}, "
        "else float64 Gram eigenproblem)",
        "products": f"Newton–Schulz products (on {device}; singular values down to "
        f"{short(PRODUCTS_FLOOR)}·S₁, else float64 Gram eigenproblem)",
    }
    fallback = "" if route == "svd" else ", thin SVD if its check fails"
    return f"polar factor by {reasons[route]}{fallback}"


def _by_svd(matrix: Tensor, support: Support, rank_tolerance: float) -> Polar[Tensor]:
    triplets = thin_svd(matrix)
    if support == "numerical":
        triplets = triplets.first(numerical_rank(triplets.S, rank_tolerance))
    factor = (triplets.U @ triplets.V.mT).to(matrix.dtype)
    return Polar(factor, float(triplets.S.sum()), len(triplets.S), "svd")


def _by_halley(matrix: Tensor, squared: Gram, tolerance: float | None) -> Polar[Tensor] | None:
    if tolerance is not None and tolerance * CONDITION >= 1:
        return None
    factor = halley(matrix, squared(), 1 / CONDITION)
    if factor is None:
        return None
    norm = float(torch.sum(factor * matrix, dtype=torch.float64))
    return Polar(factor, norm, matrix.shape[1], "halley")


def _by_gram(matrix: Tensor, squared: Gram, tolerance: float | None) -> Polar[Tensor] | None:
    pairs = gram_pairs(squared(), tolerance)
    if pairs is None:
        return None
    values, V = pairs
    if _narrow(values, matrix.dtype):
        root = (V / values.sqrt()).to(matrix.dtype)
        factor = matrix @ (root @ root.mT)
        return Polar(factor, float(values.sum()), len(values), "gram")
    # The first product cancels and needs float64; the second has orthonormal columns.
    U, S = images(matrix, V)
    factor = U.to(matrix.dtype) @ V.mT.to(matrix.dtype)
    return Polar(factor, float(S.sum()), len(S), "gram")


def _narrow(values: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether M·(MᵀM)^-½ may be multiplied in the input's dtype.

    Its rounding is about eps·‖M‖·‖(MᵀM)^-½‖, spread over all n directions.
    """
    if float(values[-1]) < NARROW * float(values[0]):
        return False
    spread = lapack.norm(values) * lapack.norm(1 / values) / len(values)
    return torch.finfo(dtype).eps * spread <= ROUNDING


def _by_products(matrix: Tensor, squared: Gram, tolerance: float | None) -> Polar[Tensor] | None:
    factor = newton_schulz(matrix / lapack.norm(matrix))
    if factor is None:
        return None
    hermitian = matrix.double().mT @ factor.double()
    ends = spectrum_ends((hermitian + hermitian.mT) / 2)
    if ends is None:
        return None
    # The Gram of H's root: its singular values are square roots of M's.
    ends = Ends(ends.largest**2, ends.smallest**2, ends.vectors)
    dropped = _dropped(ends, tolerance)
    if dropped is None or float(ends.smallest[0]) < PRODUCTS_FLOOR * ends.largest:
        return None
    norm = float(torch.sum(factor * matrix, dtype=torch.float64))
    norm -= float(ends.smallest[:dropped].sum())
    if dropped:  # the last few directions are taken out again
        V = ends.vectors[:, :dropped].to(factor.dtype)
        factor = factor - (factor @ V) @ V.mT
    return Polar(factor, norm, matrix.shape[1] - dropped, "products")


def _dropped(ends: Ends, tolerance: float | None) -> int | None:
    """Return how many directions lie below the tolerance; None when the ends cannot tell."""
    limit = (tolerance or 0.0) * ends.largest
    unclear = ((ends.smallest > limit / MARGIN) & (ends.smallest < limit * MARGIN)).any()
    dropped = int((ends.smallest <= limit).sum())
    return None if bool(unclear) or dropped == len(ends.smallest) else dropped


_KERNELS = {"halley": _by_halley, "gram": _by_gram, "products": _by_products}
_FALLBACKS: dict[Route, tuple[Literal["halley", "gram", "products"], ...]] = {
    "svd": (),
    "gram": ("gram",),
    "halley": ("halley", "gram"),
    "products": ("products", "gram"),
}


def _is_polar(matrix: Tensor, factor: Tensor) -> bool:
    """Check on random vectors that FFᵀF = F and that FᵀM is symmetric: a polar factor's marks."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    probes = torch.randn(matrix.shape[1], CHECK_PROBES, generator=generator, dtype=matrix.dtype)
    probes = probes.to(matrix.device)
    image, shift = factor @ probes, matrix @ probes
    returned, turned = (factor.mT @ torch.cat([image, shift], 1)).split(CHECK_PROBES, 1)
    isometric = lapack.norm(factor @ returned - image)
    asymmetric = lapack.norm(turned - matrix.mT @ image)
    limit = CHECK_BOUND * math.sqrt(matrix.shape[1])
    return isometric <= limit * lapack.norm(image) and asymmetric <= limit * lapack.norm(shift)
