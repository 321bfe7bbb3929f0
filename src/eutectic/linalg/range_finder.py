"""Products of two thin factors near a matrix, by a randomised range finder with a checked error.

Halko, Martinsson and Tropp (arXiv 0909.4061): Y = (MMᵀ)^q M Ω, Q = orth(Y), M ≈ Q(QᵀM). What is
lost is known, not estimated: ‖M − QQᵀM‖² = ‖M‖² − ‖QᵀM‖². Whether it is the least possible is seen
by another power step; where that still gains, the exact decomposition takes over.

Of a short side the power steps are products with its Gram, which cost a fraction of those with M.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.leading import leading_singular
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets, magnitude

GAIN = 5e-3  # of what is lost, that a power step may still gain
NOTHING = 1e-12  # of the whole energy: so little is rounding
POWER_STEPS = 6
START = 16  # directions looked at first, where the energy says how many there shall be
WIDEST = 4  # a sketch of more than 1/4 of the side costs what the decomposition costs
SHORT = 12  # up to so many sketches' width, the Gram of a side costs less than the steps without it
STRIPS = 4  # of such a Gram; measured: two thirds of the whole product's time
SEEN = 1e-3  # of the whole energy: below it, a Gram in float32 does not show what is lost


@dataclass(frozen=True, eq=False)
class Compressed:
    """M ≈ left·right.

    Attributes:
        left: U·√S `[out, r]`.
        right: √S·Vᵀ `[r, in]`.
        lost: 1 − ‖left·right‖² / ‖M‖², the share of the energy that is lost; 0 for a zero matrix.
    """

    left: Tensor
    right: Tensor
    lost: float

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.left.shape[-1]


def compressed(
    matrix: Tensor | LowRank, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> Compressed:
    """Return thin factors of M: the best of rank r, or the fewest that keep a share of ‖M‖².

    Args:
        matrix: `[out, in]`, or its thin factors, which are not multiplied out.
        rank: most directions; None for as many as the energy asks for.
        energy: share of ‖M‖² in (0, 1] that is kept, as far as `rank` allows; None keeps `rank`.
        seed: of the sketch; derive it from the tensor's name.

    Returns:
        Factors in float64, of rank 0 for a zero matrix. Directions that are rounding are left out,
        so that the rank may be smaller than asked for. The error is within 3 % of the least
        possible, or the factors are those of the exact decomposition.

    Cost: O(out·in·r) per power step, in float32 for float32; factors O((out + in)·r²).
    """
    if rank is None and energy is None:
        raise ValueError("say how many directions, or how much energy")
    if isinstance(matrix, LowRank):
        P, core, Q, unit = matrix.core()
        small = compressed(core, rank=rank, energy=energy, seed=seed)
        root = unit**0.5
        return Compressed(P @ small.left * root, small.right @ Q.mT * root, small.lost)
    out, width = matrix.shape
    unit = magnitude(matrix)
    most = min(out, width) if rank is None else min(rank, out, width)
    if not unit or not most:
        return _factors(_none(matrix), 1.0, 0.0 if not unit else 1.0)
    scaled = matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / unit
    total = float(lapack.column_norms(scaled.mT).square().sum(dtype=torch.float64))
    exact = False  # to the rounding of float32, which what is seen in a Gram can stand
    wanted = most if energy is None else min(START, most)
    side = _ShortSide(scaled, total, seed)
    while True:
        found = side.leading(wanted)
        if found is None and not exact:
            total, exact = lapack.norm(scaled, torch.float64) ** 2, True
        if found is None:
            found = _sketched(scaled, wanted, total, seed)
        if found is None:
            found = leading_singular(scaled, most if energy is not None else wanted, seed=seed)
            wanted = most
        kept = _needed(found.S, total, energy)
        if kept is not None or wanted >= most:
            break
        wanted = min(2 * wanted, most)
    count = len(found.S) if kept is None else kept
    count = min(count, int((found.S**2 > NOTHING * total / len(found.S)).sum()))
    own = found.first(count)
    lost = max(0.0, 1.0 - float((own.S**2).sum()) / total)
    return _factors(own, unit, 0.0 if lost < NOTHING else lost)


def _needed(values: Tensor, total: float, energy: float | None) -> int | None:
    """Return how many values keep the energy; None where all of them do not, or none is asked."""
    if energy is None:
        return None
    reached = (values**2).cumsum(0) >= energy * total * (1 - NOTHING)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


@dataclass(frozen=True, eq=False)
class _ShortSide:
    """A matrix whose leading directions are sought in the Gram of its shorter side."""

    matrix: Tensor
    total: float  # ‖M‖²
    seed: int

    @cached_property
    def _wide(self) -> Tensor:
        out, width = self.matrix.shape
        return self.matrix if out <= width else self.matrix.mT

    @cached_property
    def _gram(self) -> Tensor:
        """MMᵀ of the shorter side, in the matrix's dtype; strips of it, the rest mirrored."""
        side = len(self._wide)
        result = self.matrix.new_empty(side, side)
        for start in range(0, side, max(side // STRIPS, 1)):
            stop = min(start + max(side // STRIPS, 1), side)
            strip = self._wide[start:stop] @ self._wide[:stop].mT
            result[start:stop, :stop] = strip
            result[:start, start:stop] = strip[:, :start].mT
        return result

    def leading(self, rank: int) -> Triplets | None:
        """Return the leading triplets, of a measured error.

        None where the side is long or the sketch wide, where it has not settled, or where so little
        is lost that the Gram does not show it.
        """
        side, width = len(self._wide), rank + max(16, rank // 2)
        if WIDEST * width > side or side > SHORT * width:
            return None
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        start = torch.randn(side, width, generator=generator, dtype=self.matrix.dtype)
        # Two steps at once, and another: before them no sketch has settled.
        basis = lapack.orthonormal(self._gram @ (self._gram @ start.to(self.matrix.device)))
        basis = lapack.orthonormal(self._gram @ basis)
        before = None
        for _ in range(POWER_STEPS):
            image = self._gram @ basis
            values, turned = lapack.eigh(basis.mT @ image)
            captured = float(values[:rank].sum(dtype=torch.float64))
            lost = self.total - captured
            if lost < SEEN * self.total:
                return None
            if before is not None and captured - before <= GAIN * lost:
                return self._triplets(basis @ turned[:, :rank])
            before = captured
            basis = lapack.orthonormal(image)
        return None

    def _triplets(self, basis: Tensor) -> Triplets:
        """Return M as its part in a basis of the shorter side, whose images are orthogonal."""
        images = (self._wide.mT @ basis).double()
        values = lapack.column_norms(images)
        here, there = basis.double(), images / values.clamp_min(torch.finfo(values.dtype).tiny)
        out, width = self.matrix.shape
        return Triplets(here, values, there) if out <= width else Triplets(there, values, here)


def _sketched(matrix: Tensor, rank: int, total: float, seed: int) -> Triplets | None:
    """Return the leading triplets; None where the sketch would be wide or has not settled."""
    side = min(matrix.shape)
    width = rank + max(8, rank // 4)
    if WIDEST * width > side:
        return None
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    basis = lapack.orthonormal(matrix @ sketch.to(matrix.device))
    before = None
    for _ in range(POWER_STEPS):
        turned = matrix.mT @ basis  # (QᵀM)ᵀ
        wide = turned.double()
        captured = float(lapack.eigh(wide.mT @ wide)[0][:rank].sum())
        lost = max(total - captured, 0.0)
        if before is not None and captured - before <= max(GAIN * lost, NOTHING * total):
            return _triplets(basis, wide, rank)
        before = captured
        basis = lapack.orthonormal(matrix @ lapack.orthonormal(turned))
    return None


def _triplets(basis: Tensor, turned: Tensor, rank: int) -> Triplets:
    """Return the leading triplets of Q(QᵀM), with (QᵀM)ᵀ given in float64."""
    basis = basis.double()
    lower = lapack.cholesky(basis.mT @ basis)  # of what is orthonormal in float32
    if lower is not None:
        basis = lapack.solve_lower(lower, basis.mT).mT
        turned = lapack.solve_lower(lower, turned.mT).mT
    right, R = lapack.qr(turned)
    left, values, inner = lapack.svd(R.mT)  # of QᵀM·right
    return Triplets(basis @ left[:, :rank], values[:rank], right @ inner[:, :rank])


def _factors(found: Triplets, unit: float, lost: float) -> Compressed:
    root = (found.S * unit).sqrt()
    return Compressed(found.U * root, root[:, None] * found.V.mT, lost)


def _none(matrix: Tensor) -> Triplets:
    empty = torch.empty(0, dtype=torch.float64, device=matrix.device)
    return Triplets(empty.new_empty(len(matrix), 0), empty, empty.new_empty(matrix.shape[1], 0))
