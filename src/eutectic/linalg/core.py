"""The core space of thin matrices: small matrices between bases that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.svd import magnitude, numerical_rank, thin_svd
from eutectic.linalg.thin_basis import ThinBasis, thin_basis

# Measured: from 0.7 of the shorter side on, the thin QR decompositions cost as much. A polar factor
# alone, whose bases need not be multiplied out, takes a third of the expanded one's time there
# and a half at 0.9 (sides 512 and 2048).
THIN = 2 / 3
THIN_SUM = 0.9


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """T matrices Δ_t = U·core_t·Vᵀ, all in float64.

    Attributes:
        left: U `[out, m]`, orthonormal columns.
        right: V `[in, n]`, orthonormal columns.
        cores: `[T, m, n]`.
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    def expand(self, core: Tensor) -> LowRank:
        """Return U·core·Vᵀ `[out, in]` as thin factors."""
        return LowRank(self.left @ core.double(), self.right.mT)


@dataclass(frozen=True, eq=False)
class WideCoreSpace:
    """T matrices Δ_t = U·core_t·Vᵀ whose cores stay thin, and rows beside them, all in float64.

    Attributes:
        outputs: U `[out, m]`, orthonormal columns.
        inputs: V `[in, n]`, orthonormal columns.
        thin: the T cores as factors `[m, r_t]` and `[r_t, n]`.
        beside: other rows `[k, in]` in the coordinates of V, `[k, n]` each.
        inverse: (A⁺)ᵀ `[k, n]` in the coordinates of V, where A, the only block beside, is the
            right factors themselves and well conditioned; else None.
    """

    outputs: ThinBasis
    inputs: ThinBasis
    thin: LowRankStack
    beside: tuple[Tensor, ...]
    inverse: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """V `[in, n]`."""
        return self.inputs.basis()

    @property
    def width(self) -> int:
        """How many columns V has."""
        return self.thin.shape[2]

    @property
    def cores(self) -> Tensor:
        """The cores multiplied out, `[T, m, n]`."""
        return self.thin.dense()

    def expand(self, core: Tensor, dtype: torch.dtype = torch.float64) -> LowRank:
        """Return U·core·Vᵀ `[out, in]` as thin factors; in float32 they are multiplied there."""
        left = self.outputs.times(core.double(), dtype)
        return LowRank(left, self.inputs.times(None, dtype).mT)


# Of a row's length: what lies beyond a span by less no float32 shows. It is seen by the difference
# of squares, whose own rounding in float64 is below it.
WITHIN = 1e-7


def beyond(stack: LowRankStack, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return those of some rows `[k, in]`, block by block, that the right factors do not span."""
    if not rows or not stack.rank:
        return list(rows)
    basis, _, _ = _basis(stack.right)
    found: list[Tensor] = []
    for block in rows:
        wide = block.double()
        rest = wide - (wide @ basis) @ basis.mT
        apart = lapack.column_norms(rest.mT) > WITHIN * lapack.column_norms(wide.mT)
        if bool(apart.any()):
            found.append(wide[apart])
    return found


def core_space(stack: LowRankStack, beside: Sequence[Tensor] = ()) -> CoreSpace:
    """Return bases of the stacked factors (thin QR decompositions) and the T cores.

    Args:
        stack: T products of factors `[out, r_t]` and `[r_t, in]`.
        beside: further rows `[k, in]` that V shall span, such as those of input metrics.

    Returns:
        m = min(out, Σ r_t) and n = min(in, Σ r_t + Σ k). Factors that depend on each other get
        arbitrary directions, in which the cores are zero to rounding. Cost: two thin QR
        decompositions, O((out + in)·(Σ r_t)²).
    """
    ranks = [factor.shape[1] for factor in stack.left]
    U, left, left_unit = _basis([factor.mT for factor in stack.left])
    V, right, right_unit = _basis([*stack.right, *beside])
    starts = [sum(ranks[:t]) for t in range(len(ranks))]
    cores = [
        left[:, start : start + rank] @ right[:, start : start + rank].mT
        for start, rank in zip(starts, ranks, strict=True)
    ]
    return CoreSpace(U, V, torch.stack(cores) * (left_unit * right_unit))


def output_space(stack: LowRankStack) -> tuple[Tensor, Tensor]:
    """Return U `[out, m]`, an orthonormal basis of the left factors, and UᵀΔ_t `[T, m, in]`.

    In float64; m = min(out, Σ r_t). Cost: a thin QR decomposition and products of inner size r_t.
    """
    U, left, unit = _basis([factor.mT for factor in stack.left])
    ranks = [factor.shape[1] for factor in stack.left]
    starts = [sum(ranks[:t]) for t in range(len(ranks))]
    parts = zip(starts, ranks, stack.right, strict=True)
    inner = [left[:, start : start + rank] @ own.double() for start, rank, own in parts]
    return U, torch.stack(inner) * unit


def core_space_beside(stack: LowRankStack, rows: Sequence[Tensor]) -> WideCoreSpace | None:
    """Return a core whose V spans some other rows too, with these in its coordinates.

    Args:
        stack: as for `core_space`.
        rows: blocks `[k, in]`, such as the rows of input metrics.

    Returns:
        n = Σ r_t and as many as there are rows beyond the right factors' span; None where that is
        no small core (`stays_thin`). Every row is multiplied once, and not at all where a block is
        the right factors themselves, one above the other.
    """
    if not stays_thin(stack):
        return None
    outputs, left_unit = _found([factor.mT for factor in stack.left])
    inputs, right_unit = _found(stack.right)
    own_rows = torch.cat([factor.double() for factor in stack.right])
    blocks = [block.double() for block in rows]
    inverse = None
    if all(torch.equal(block, own_rows) for block in blocks):
        seen = [inputs.triangle.mT * right_unit for _ in blocks]
        if len(blocks) == 1 and inputs.inverse is not None:
            inverse = inputs.inverse / right_unit
    else:
        found = _widened(stack, inputs, blocks)
        if found is None:
            return None
        inputs, seen = ThinBasis(found[0], None, inputs.triangle), found[1]
    ranks = [factor.shape[1] for factor in stack.left]
    width = inputs.columns.shape[1]
    left, right = outputs.triangle, inputs.triangle
    spanned = torch.zeros(sum(ranks), width, dtype=torch.float64, device=stack.device)
    spanned[:, : len(right)] = right.mT * (left_unit * right_unit)
    thin = LowRankStack(left.split(ranks, 1), spanned.split(ranks))
    return WideCoreSpace(outputs, inputs, thin, tuple(seen), inverse)


def _widened(
    stack: LowRankStack, inputs: ThinBasis, blocks: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]] | None:
    """Return a basis `[in, n]` that spans some rows too, and their coordinates in it."""
    basis = inputs.basis()
    seen = [block @ basis for block in blocks]
    rest: list[Tensor] = []
    for block, own in zip(blocks, seen, strict=True):
        whole = block.square().sum(1)
        apart = whole - own.square().sum(1) > WITHIN**2 * whole
        if bool(apart.any()):
            rest.append(block[apart] - own[apart] @ basis.mT)
    if not stays_thin(stack, sum(map(len, rest))):
        return None
    if not rest:
        return basis, seen
    more = lapack.orthonormal(torch.cat(rest).mT)
    # Once more: what rounding left of V in short remainders would be made long.
    more = lapack.orthonormal(more - basis @ (basis.mT @ more))
    seen = [torch.cat([own, block @ more], 1) for block, own in zip(blocks, seen, strict=True)]
    return torch.cat([basis, more], 1), seen


DEPENDENT = 1e-12  # of the largest eigenvalue of rows' products: rows that are others' sums


def pseudo_inverse(rows: Tensor) -> Tensor:
    """Return (A⁺)ᵀ = (AAᵀ)⁺A `[R, in]` of few rows A `[R, in]`, in float64.

    Rows that depend on each other to rounding count once. Cost: O(in·R²).
    """
    wide = rows.double()
    values, vectors = lapack.eigh(wide @ wide.mT)
    kept = values > values[:1] * len(values) * DEPENDENT
    return (vectors[:, kept] / values[kept]) @ (vectors[:, kept].mT @ wide)


def core_root(core: Tensor) -> Tensor:
    """Return F `[k, R]` with FᵀF = G for a semidefinite G `[R, R]`, in float64."""
    wide = core.double()
    energies, directions = lapack.eigh((wide + wide.mT) / 2)
    positive = energies > 0
    return (directions[:, positive] * energies[positive].sqrt()).mT


def singular_core(
    deltas: Tensor | LowRankStack, members: Sequence[int], tolerance: float
) -> CoreSpace:
    """Return the cores between singular vectors of the members' deltas.

    U are the left ones of their Δ_t side by side, V the right ones of the same one above the
    other: determined up to signs by the matrices alone, however they are factored. Directions below
    `tolerance` of the first are left out; without any, m or n is 0.

    Args:
        deltas: `[T, out, in]`, or thin factors.
        members: the experts whose directions are looked at; others have cores like them.
        tolerance: relative bound below which a direction is rounding.
    """
    space, matrices = None, deltas
    if isinstance(matrices, LowRankStack):
        space = core_space(matrices)
        matrices = space.cores
    matrices = matrices.double()
    P, Q = _singular_bases(matrices, members, tolerance)
    turned = P.mT @ matrices @ Q
    if space is None:
        return CoreSpace(P, Q, turned)
    return CoreSpace(space.left @ P, space.right @ Q, turned)


def _singular_bases(
    matrices: Tensor, members: Sequence[int], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors side by side, and the right ones one above the other."""
    _, out, inner = matrices.shape
    chosen = [matrices[t] for t in members]
    if not any(bool(matrix.any()) for matrix in chosen):
        return matrices.new_zeros(out, 0), matrices.new_zeros(inner, 0)
    sides = (torch.cat(chosen, 1), torch.cat([matrix.mT for matrix in chosen], 1))
    left, right = (_left_vectors(side, tolerance) for side in sides)
    return left, right


def stays_thin(stack: LowRankStack, beside: int = 0, share: float = THIN) -> bool:
    """Tell whether a core costs less than the expanded matrices.

    `beside` counts further rows, `share` is that of the shorter side from which it does not.
    """
    return stack.rank + beside <= share * min(stack.shape[1:])


def _basis(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Return Q `[n, r]`, R `[r, k]` and a unit with unit·Q·R the blocks' rows side by side."""
    found, unit = _found(blocks)
    return found.basis(), found.triangle, unit


def _found(blocks: Sequence[Tensor]) -> tuple[ThinBasis, float]:
    """Return the same with a basis that is not multiplied out."""
    rows = torch.cat(list(blocks))
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    unit = magnitude(rows) or 1.0
    return thin_basis((rows / unit).mT), unit


def _left_vectors(matrix: Tensor, tolerance: float) -> Tensor:
    """Return the left singular vectors of a matrix that stand above a tolerance."""
    if matrix.shape[1] > matrix.shape[0]:  # from the triangle of its transpose, which is smaller
        matrix = lapack.qr(matrix.mT)[1].mT
    triplets = thin_svd(matrix)
    return triplets.U[:, : numerical_rank(triplets.S, tolerance)]
