"""Products of two thin factors that shift a layer's outputs as nearly as a matrix does.

With C the second moment of the inputs x, ‖(M − N)C^{1/2}‖² is the mean of ‖Mx − Nx‖². Of all N of
rank r the nearest is UUᵀM, U the r leading left singular vectors of M·C^{1/2}: the best product for
M·C^{1/2}, mapped back. They are those of M·B for any B with BBᵀ = C, so that no root is taken and
nothing is inverted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.range_finder import Compressed, compressed

FLAT = 1.25  # times what is lost: metrics of polynomials leave a flat spectrum some per cent uneven


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = diag(`diagonal`) + rowsᵀ·rows + `matrix` `[in, in]`, positive definite; in float64.

    Attributes:
        diagonal: `[in]`, above 0.
        rows: `[k, in]`, or None.
        matrix: `[in, in]`, or None.
    """

    diagonal: Tensor
    rows: Tensor | None = None
    matrix: Tensor | None = None

    def image(self, matrix: Tensor) -> Tensor:
        """Return M·B for M `[n, in]`, with B·Bᵀ = C: `[n, in + k]`, or `[n, in]` of a matrix.

        Cost: O(n·in·k); with a matrix O(n·in²) and one Cholesky factor.
        """
        wide = matrix.double()
        if self.matrix is None:
            parts = [wide * self.diagonal.sqrt()]
            parts += [] if self.rows is None else [wide @ self.rows.mT]
            return torch.cat(parts, 1)
        return wide @ self._lower

    @cached_property
    def _lower(self) -> Tensor:
        assert self.matrix is not None
        total = self.matrix.double() + torch.diag(self.diagonal)
        if self.rows is not None:
            total.addmm_(self.rows.mT, self.rows)
        lower = lapack.cholesky(total)
        if lower is None:
            raise NumericalError("the second moment of the inputs is not positive definite.")
        return lower

    def core(self, rows: Tensor) -> Tensor:
        """Return R·B for thin R `[r, in]`, with B·Bᵀ = C, as a matrix `[r, r]`.

        Cost: O(r·in·k); with a matrix O(r·in²), and no decomposition of side `in`.
        """
        if self.matrix is None:
            return lapack.qr(self.image(rows).mT)[1].mT
        wide = rows.double()
        inner = (wide @ self.matrix.double() + wide * self.diagonal) @ wide.mT
        if self.rows is not None:
            seen = wide @ self.rows.mT
            inner = inner + seen @ seen.mT
        values, vectors = lapack.eigh((inner + inner.mT) / 2)
        return vectors * values.clamp_min(0).sqrt()


@dataclass(frozen=True, eq=False)
class CutShift:
    """M ≈ left·right, nearest in the outputs.

    Attributes:
        factors: the thin factors, with the share of ‖M‖² that is lost.
        lost: the share of the mean of ‖Mx‖² that is lost.
    """

    factors: Compressed
    lost: float


def compressed_by_shift(
    matrix: Tensor | LowRank,
    moment: SecondMoment,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    among: Sequence[Tensor] = (),
) -> CutShift:
    """Return thin factors of M: of rank r the best for inputs of a second moment C.

    Args:
        matrix: `[out, in]`, or its thin factors, which are not multiplied out.
        moment: C `[in, in]`, positive definite.
        rank: most directions; None for as many as the energy asks for.
        energy: share of the mean of ‖Mx‖² in (0, 1] that is kept, as far as `rank` allows; None
            keeps `rank`.
        seed: of the sketch; derive it from the tensor's name.
        among: F_t `[out, k]` for an M·C^{1/2} that is flat, whose directions are all as good:
            taken are the r of its range with the most of Σ_t ‖F_t‖², such as `shift_of` experts.
            Those of the closed form if there are none, too few of them, or if these lose more
            than `FLAT` times as much, or more than the energy allows: then it is not flat.

    Returns:
        Balanced factors in float64, of rank 0 for a zero matrix. C = c·I gives those of
        `compressed`, up to rounding; a rank that M has no more of loses nothing; M·O and OᵀCO, for
        orthogonal O, give the product times O.

    Cost: M·B (see `SecondMoment`), and `compressed` of that; of thin factors of inner size r no
    more than O((out + in)·r²) beside `SecondMoment.core`.
    """
    inner = min(matrix.shape)
    if isinstance(matrix, LowRank):
        inner = min(inner, matrix.left.shape[1])
    if energy is None and rank is not None and rank >= inner:  # nothing is cut
        return CutShift(compressed(matrix, rank=rank, seed=seed), 0.0)
    seen: Tensor | LowRank
    if isinstance(matrix, LowRank):
        seen = LowRank(matrix.left.double(), moment.core(matrix.right))
    else:
        seen = moment.image(matrix).to(torch.promote_types(matrix.dtype, torch.float32))
    found = compressed(seen, rank=rank, energy=energy, seed=seed)
    basis, lost = lapack.orthonormal(found.left), found.lost
    if among and found.rank and lost:
        preferred = _preferred(seen, among, found.rank, seed)
        beyond = _lost(preferred, seen)
        most = FLAT * lost
        if energy is not None and lost <= 1 - energy:
            most = min(most, 1 - energy)
        if preferred.shape[1] == found.rank and beyond <= most:
            basis, lost = preferred, beyond
    if isinstance(matrix, LowRank):
        right = (basis.mT @ matrix.left.double()) @ matrix.right.double()
        whole = _energy(lapack.qr(matrix.left.double())[1] @ matrix.right.double())
    else:
        right = basis.mT @ matrix.double()
        whole = _energy(matrix)
    plain = max(0.0, 1.0 - _energy(right) / whole) if whole else 0.0
    Q, lower = lapack.qr(right.mT)
    turned, values, inside = lapack.svd(lower.mT)
    root = values.sqrt()
    factors = Compressed((basis @ turned) * root, root[:, None] * (Q @ inside).mT, plain)
    return CutShift(factors, lost)


def shift_of(matrix: Tensor | LowRank, moment: SecondMoment) -> Tensor:
    """Return F `[out, k]` with FFᵀ = ΔCΔᵀ, the second moment of what Δ adds to the outputs.

    k is min(out, in) at most, of thin factors their inner size. Cost: `SecondMoment.core`.
    """
    if isinstance(matrix, LowRank):
        return matrix.left.double() @ moment.core(matrix.right)
    out, width = matrix.shape
    return moment.core(matrix) if out <= width else moment.image(matrix)


def _preferred(flat: Tensor | LowRank, others: Sequence[Tensor], rank: int, seed: int) -> Tensor:
    """Return r orthonormal directions in the range of a flat N = s·UVᵀ, most of others' energy.

    NNᵀF/s² = UUᵀF, with F the others side by side. Fewer than r where they have no more.
    """
    side = torch.cat([other.double() for other in others], 1)
    if isinstance(flat, LowRank):
        inner = flat.right.double() @ flat.right.double().mT
        side = flat.left.double() @ (inner @ (flat.left.double().mT @ side))
    else:
        side = flat.double() @ (flat.double().mT @ side)
    return lapack.orthonormal(compressed(side, rank=rank, seed=seed).left)


def _lost(basis: Tensor, seen: Tensor | LowRank) -> float:
    """Return the share of ‖N‖² beyond a basis."""
    if isinstance(seen, LowRank):
        whole = _energy(lapack.qr(seen.left)[1] @ seen.right)
        return max(0.0, 1.0 - _energy((basis.mT @ seen.left) @ seen.right) / whole)
    return max(0.0, 1.0 - _energy(basis.mT @ seen.double()) / _energy(seen))


def _energy(matrix: Tensor) -> float:
    return lapack.norm(matrix, torch.float64) ** 2
