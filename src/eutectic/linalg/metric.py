"""Inner products of layer inputs: a second moment as a matrix, or as few rows and the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack

# Rows below this share of the width are cheaper than the matrix, whose eigenproblem is the cost.
FEW = 0.5


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
    def thin(self) -> bool:
        """Whether it is held in rows, few of them."""
        count = 0 if self.rows is None else len(self.rows)
        return self.matrix is None and count <= FEW * self.size

    def dense(self, like: Tensor) -> Tensor:
        """Return C `[in, in]`."""
        if self.matrix is not None:
            return self.matrix
        identity = torch.eye(self.size, dtype=torch.float64, device=like.device)
        if self.rows is None:
            return self.isotropic * identity
        return (self.rows.mT @ self.rows).add_(identity, alpha=self.isotropic)

    def times(self, matrix: Tensor, exponent: float) -> Tensor:
        """Return M·C^p for M `[n, in]`, in float64.

        Of few rows by one eigenproblem of side k: C^p = ε^p·I + Eᵀ((ε + Λ)^p − ε^p)E, with E the
        orthonormal rows of the range. Otherwise by one of side `in`.
        """
        matrix = matrix.double()
        if not self.thin:
            values, vectors = lapack.eigh(self.dense(matrix))
            powers = values.clamp_min(torch.finfo(values.dtype).tiny) ** exponent
            return ((matrix @ vectors) * powers) @ vectors.mT
        power = self.isotropic**exponent
        if self.rows is None or not len(self.rows):
            return matrix * power
        values, vectors = lapack.eigh(self.rows @ self.rows.mT)
        # Directions that the rounding of the product has made up are worth nothing.
        kept = values > values[0] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[kept], vectors[:, kept]
        range_rows = (vectors / values.sqrt()).mT @ self.rows
        gains = (self.isotropic + values) ** exponent - power
        return matrix * power + ((matrix @ range_rows.mT) * gains) @ range_rows

    def projected(self, basis: Tensor) -> InputMetric:
        """Return VᵀCV `[n, n]` for orthonormal columns V `[in, n]`."""
        if self.matrix is not None:
            return InputMetric(basis.shape[1], matrix=basis.mT @ self.matrix @ basis)
        rows = None if self.rows is None else self.rows @ basis
        return InputMetric(basis.shape[1], self.isotropic, rows)


def mean_metric(metrics: Sequence[InputMetric], like: Tensor) -> InputMetric:
    """Return the mean of metrics of one size: of rows if all of them together are few."""
    size, count = metrics[0].size, len(metrics)
    isotropic = sum(metric.isotropic for metric in metrics) / count
    held = [m.rows / count**0.5 for m in metrics if m.rows is not None]
    if all(m.matrix is None for m in metrics):
        together = InputMetric(size, isotropic, torch.cat(held) if held else None)
        if together.thin:
            return together
    total = metrics[0].dense(like) / count
    for metric in metrics[1:]:
        total = total.add(metric.dense(like), alpha=1 / count)
    return InputMetric(size, matrix=total)
