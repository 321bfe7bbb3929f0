"""Principal directions of the output shift that a task matrix causes, from Grams alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import NumericalError, StatisticsError
from eutectic.linalg import lapack
from eutectic.linalg.gram import gram
from eutectic.linalg.rows_and_diagonal import few_rows
from eutectic.types import LayerStatistics

COLUMNS = 4096  # scaled at once
PANEL = 256  # rows multiplied at once where part of a product is known beforehand


@dataclass(frozen=True)
class EssentialSubspace:
    """Leading principal directions of X Δᵀ.

    Attributes:
        directions: E `[out, k]`, orthonormal columns.
        eigenvalues: λ `[k]` of Δ A Δᵀ, descending and positive.
    """

    directions: Tensor
    eigenvalues: Tensor


def essential_subspace(
    delta: Tensor,
    statistics: LayerStatistics,
    rank: int,
    *,
    rank_tolerance: float | None = None,
    where: str = "",
) -> EssentialSubspace:
    """Return the first `rank` principal directions of the output shift X Δᵀ, uncentred.

    They are the eigenvectors of Δ A Δᵀ with A = XᵀX. Of the two equivalent eigenproblems the
    smaller is solved: `[out, out]`, or `[m, m]` for R Δᵀ Δ Rᵀ with a root A = RᵀR of m rows (the
    stored factor, or the Cholesky factor of the Gram), then E = Δ Rᵀ V Λ^-½. Of a Gram in few rows
    and a diagonal the root is both, one above the other: no matrix of the width `in` is formed
    where there are fewer outputs.
    Directions without energy are left out, so fewer than `rank` columns come back when tokens or
    the task matrix do not reach that far; a zero delta or a zero Gram gives none.

    Args:
        delta: Δ `[out, in]`.
        statistics: with `gram` or `gram_factor`; their device and scale do not matter.
        rank: the most directions to return.
        rank_tolerance: keep λ above this fraction of the largest. Default: what entrywise
            rounding of Δ can cause, (eps (√out + √in))². Eigenvalues within the rounding of the
            stored Gram, as its negative ones show it, are left out at any tolerance.
        where: names the tensor and the expert in messages.

    Returns:
        Directions and eigenvalues in float64. Cost: products with Δ and A, and one symmetric
        eigenproblem of min(out, in, factor rows).

    Raises:
        StatisticsError: no Gram, or a Gram of another width than the matrix.
        NumericalError: NaN or Inf in the Gram.
    """
    out_features, in_features = delta.shape
    stored = statistics.gram if statistics.gram is not None else statistics.gram_factor
    if stored is None:
        raise StatisticsError(f"{where or 'the layer'}: the statistics hold no Gram.")
    if stored.shape[-1] != in_features or stored.ndim != 2:
        raise StatisticsError(
            f"{where or 'the layer'}: the Gram is for {stored.shape[-1]} inputs, the matrix has "
            f"{in_features}.\nThe statistics belong to another checkpoint; collect them again."
        )
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{where or 'the layer'}: NaN or Inf in the Gram; collect it again.")
    weight = delta.double()
    tolerance = rank_tolerance
    if tolerance is None:
        rounding = torch.finfo(delta.dtype).eps * (out_features**0.5 + in_features**0.5)
        tolerance = rounding**2
    tokens = statistics.count if statistics.gram_diagonal is None else 0
    limit = min(rank, tokens) if tokens else rank
    rest = statistics.gram_diagonal
    factored = statistics.gram is None
    if factored and rest is not None and few_rows(len(stored), in_features):
        rows = stored.to(weight) @ weight.T
        if out_features <= in_features:
            square = gram(rows).add_(_diagonal_product(weight, rest.to(weight)))
            return _leading(square, limit, tolerance)
        return _from_root(
            torch.cat([rows, rest.to(weight).sqrt()[:, None] * weight.T]), limit, tolerance
        )
    if factored and rest is None and min(out_features, len(stored)) <= in_features:
        root = stored.to(weight)
    else:
        dense = statistics.dense_gram()
        assert dense is not None  # there is a Gram or a factor
        matrix = dense.to(weight)
        if out_features <= in_features:
            return _leading(_lower_product(weight @ matrix, weight.T), limit, tolerance)
        root = _root(matrix)
    return _from_root(_trapezoidal_product(root, weight.T), limit, tolerance)


def _from_root(shift: Tensor, limit: int, tolerance: float) -> EssentialSubspace:
    """Return the directions of R Δᵀ `[m, out]`, from the smaller of the two eigenproblems."""
    if shift.shape[1] <= len(shift):
        return _leading(gram(shift), limit, tolerance)
    inner = _leading(gram(shift.T), limit, tolerance)
    return EssentialSubspace(
        shift.T @ (inner.directions / inner.eigenvalues.sqrt()), inner.eigenvalues
    )


def _root(matrix: Tensor) -> Tensor:
    """Return R with RᵀR = A: Cholesky, or the symmetric root of a semidefinite Gram."""
    lower = lapack.cholesky(matrix)
    if lower is not None:
        return lower.T
    whole = _leading(matrix, len(matrix), 0.0)
    return (whole.directions * whole.eigenvalues.sqrt()).T


def _diagonal_product(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Return Δ diag(e) Δᵀ `[out, out]`, some inputs at a time: no scaled copy of Δ is kept."""
    total = weight.new_zeros(len(weight), len(weight))
    for start in range(0, weight.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        total.addmm_(weight[:, part] * diagonal[part], weight[:, part].T)
    return total


def _lower_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the blocks on and below the diagonal of a product that is symmetric."""
    product = left.new_zeros(len(left), right.shape[1])
    for start in range(0, len(left), PANEL):
        stop = start + PANEL
        torch.mm(left[start:stop], right[:, :stop], out=product[start:stop, :stop])
    return product


def _trapezoidal_product(root: Tensor, right: Tensor) -> Tensor:
    """Return R·B, skipping what lies below the diagonal of R where that is zero.

    Cholesky factors and the factors that a collection stores are upper trapezoidal.
    """
    if len(root) <= PANEL or bool(root[PANEL:, :PANEL].any()) or bool(root.tril(-1).any()):
        return root @ right
    product = right.new_empty(len(root), right.shape[1])
    for start in range(0, len(root), PANEL):
        rows = root[start : start + PANEL, start:]
        torch.mm(rows, right[start:], out=product[start : start + PANEL])
    return product


def _leading(matrix: Tensor, rank: int, tolerance: float) -> EssentialSubspace:
    """Return the first eigenpairs of a semidefinite matrix that stand above rounding.

    Rounding of a stored Gram spreads eigenvalues around zero, so as much as lies below zero is
    not trusted above it either.
    """
    values, vectors = lapack.eigh(matrix)
    if not len(values) or float(values[0]) <= 0:
        return EssentialSubspace(vectors[:, :0], values[:0])
    own_rounding = torch.finfo(values.dtype).eps * len(values)
    floor = float(values[0]) * max(tolerance, own_rounding) + 2 * max(0.0, -float(values[-1]))
    kept = min(rank, int((values > floor).sum()))
    return EssentialSubspace(vectors[:, :kept], values[:kept])
