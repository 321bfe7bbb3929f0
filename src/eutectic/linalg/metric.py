"""Inner products of layer inputs: a second moment as a matrix, or as few rows and the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eutectic.linalg import lapack

# Rows below this share of the width are cheaper than the matrix, whose eigenproblem is the cost.
FEW = 0.5
# A width up to so many times the rank is decomposed whole: the rest that is left even has too few
# directions to save anything. So many times the rank of rows are kept all, for the same reason.
WHOLE = 4
STEPS = 12
GAIN = 2e-3  # of what is lost, that a step of the subspace iteration may still gain
NOTHING = 1e-12  # of the whole energy: so little is rounding

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class InputMetric:
    """A positive definite C = `isotropic`·I + rowsᵀ·rows `[in, in]`, or a matrix; in float64.

    Attributes:
        size: in.
        isotropic: the multiple of the identity, above 0 unless there is a matrix.
        rows: `[k, in]`, or None for none.
        matrix: `[in, in]` in place of both, or None.
    """

    size: int
    isotropic: float = 0.0
    rows: Tensor | None = None
    matrix: Tensor | None = None

    @property
    def count(self) -> int:
        """How many rows there are."""
        return 0 if self.rows is None else len(self.rows)

    @property
    def thin(self) -> bool:
        """Whether it is held in rows, few of them."""
        return self.matrix is None and self.count <= FEW * self.size

    def dense(self, like: Tensor) -> Tensor:
        """Return C `[in, in]`."""
        if self.matrix is not None:
            return self.matrix
        identity = torch.eye(self.size, dtype=torch.float64, device=like.device)
        if self.rows is None:
            return self.isotropic * identity
        return (self.rows.mT @ self.rows).add_(identity, alpha=self.isotropic)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of rowsᵀ·rows, or of C where it is not thin, and vectors as rows.

        Of few rows by one eigenproblem of side k, otherwise by one of side `in`.
        """
        if not self.thin:
            like = self.matrix if self.rows is None else self.rows
            assert like is not None
            values, vectors = lapack.eigh(self.dense(like))
            return values.clamp_min(torch.finfo(values.dtype).tiny), vectors.mT
        assert self.rows is not None
        values, vectors = lapack.eigh(self.rows @ self.rows.mT)
        # Directions that the rounding of the product has made up are worth nothing.
        kept = values > values[0] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[kept], vectors[:, kept]
        return values, (vectors / values.sqrt()).mT @ self.rows

    def times(self, matrix: Tensor, exponent: float) -> Tensor:
        """Return M·C^p for M `[n, in]`, in float64; what was decomposed for one p serves others.

        Of few rows C^p = ε^p·I + Eᵀ((ε + Λ)^p − ε^p)E, with E the orthonormal rows of the range.
        """
        matrix = matrix.double()
        if self.thin and not self.count:
            return matrix * self.isotropic**exponent
        values, vectors = self._pairs
        if not self.thin:
            return ((matrix @ vectors.mT) * values**exponent) @ vectors
        power = self.isotropic**exponent
        gains = (self.isotropic + values) ** exponent - power
        return matrix * power + ((matrix @ vectors.mT) * gains) @ vectors

    def between(self, size: int, rows: Tensor | None) -> InputMetric:
        """Return it between `size` orthonormal directions, of which the rows are `[k, size]`."""
        return InputMetric(size, self.isotropic, rows)

    def leading(self, rank: int | None) -> InputMetric:
        """Return C with `rank` directions and an even rest, where it has many rows; else itself.

        The trace is kept.
        """
        rows = self.rows
        if rank is None or rows is None or not truncates(rank, self.size, len(rows)):
            return self
        trace = float(rows.square().sum())
        found = leading_pairs(lambda x: rows.mT @ (rows @ x), (self.size, rank), trace, like=rows)
        return InputMetric(self.size, self.isotropic + found.even, found.rows)


@dataclass(frozen=True, eq=False)
class Leading:
    """A ≈ even·I + rowsᵀ·rows, of the same trace.

    Attributes:
        rows: `[k, in]`, orthogonal, in float64.
        even: the mean of what the leading directions leave.
        lost: the share of the trace that they leave.
    """

    rows: Tensor
    even: float
    lost: float


def truncates(rank: int, width: int, rows: int | None = None) -> bool:
    """Tell whether `rank` directions and an even rest are less work than all of them.

    Args:
        rank: directions that would be kept.
        width: inputs of the layer.
        rows: in how many rows the metric is held; None for a matrix.
    """
    return width >= WHOLE * rank and (rows is None or rows > WHOLE * rank)


def leading_pairs(
    product: Product, shape: tuple[int, int], trace: float, *, like: Tensor
) -> Leading:
    """Return the leading directions of a semidefinite A, and what is left of its trace, even.

    Subspace iteration from a seeded start (Halko, Martinsson and Tropp, arXiv 0909.4061), until a
    step gains less than `GAIN` of what is lost, or for `STEPS` steps. The share that is lost is
    exact, tr A less the Ritz values: A lies above what is kept, so it is the error in nuclear norm.

    Args:
        product: X `[in, s]` -> A·X.
        shape: in, and the directions k that are kept.
        trace: tr A.
        like: the products' dtype and device; small matrices are in float64.

    Cost: O(in²·k) per step for a matrix, O(in·k·n) for n rows.
    """
    size, rank = shape
    wide = min(size, rank + max(8, rank // 4))
    # The start is the same for all matrices of one size: layers that share a Gram share its root.
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(size, wide, generator=generator, dtype=like.dtype).to(like.device)
    basis = lapack.orthonormal(product(start))
    before, step = 0.0, 0
    while True:
        image = product(basis)
        exact = basis.double()
        small = exact.mT @ image.double()
        values, turned = lapack.eigh((small + small.mT) / 2)
        captured = float(values[:rank].clamp_min(0).sum())
        lost = max(trace - captured, 0.0)
        step += 1
        settled = captured - before <= max(GAIN * lost, NOTHING * trace)
        if step == STEPS or (step > 1 and settled):
            even = lost / max(size - rank, 1)
            gains = (values[:rank] - even).clamp_min(0).sqrt()
            rows = (exact @ turned[:, :rank]).mT * gains[:, None]
            return Leading(rows, even, lost / trace if trace else 0.0)
        before = captured
        basis = lapack.orthonormal(image)


def mean_metric(metrics: Sequence[InputMetric], like: Tensor) -> InputMetric:
    """Return the mean of metrics of one size: of rows if all of them together are few."""
    size, count = metrics[0].size, len(metrics)
    isotropic = sum(metric.isotropic for metric in metrics) / count
    held = [m.rows / count**0.5 for m in metrics if m.rows is not None]
    if all(m.matrix is None for m in metrics):
        rows = torch.cat(held) if held else None
        together = InputMetric(size, isotropic, rows)
        if together.thin:
            return together
    total = metrics[0].dense(like) / count
    for metric in metrics[1:]:
        total = total.add(metric.dense(like), alpha=1 / count)
    return InputMetric(size, matrix=total)
