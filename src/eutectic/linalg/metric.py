"""Inner products of layer inputs: a second moment as a matrix, or as few rows and the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.gram import gram
from eutectic.linalg.remembered import digest, remembered
from eutectic.linalg.wide_metric import WideMetric, to_near_one

# Rows below this share of the width are cheaper than the matrix, whose eigenproblem is the cost.
FEW = 0.5
# Measured: below this width, and below so many times the rank, the eigenproblem costs less.
WHOLE_WIDTH = 512
WHOLE = 4
FEW_ROWS = 1024  # up to so many rows, their own eigenproblem costs less
# An eigenvalue in float32 is off by about eps of the largest one: so are a float32 Gram's own.
NARROW_CONDITION = 1e4
PANEL = 64


@dataclass(frozen=True, eq=False)
class InputMetric:
    """A positive definite C = `isotropic`·I + rowsᵀ·rows `[in, in]`, or a matrix.

    Attributes:
        size: in.
        isotropic: the multiple of the identity, above 0 unless there is a matrix.
        rows: `[k, in]` in float64, or None for none.
        matrix: `[in, in]` in place of both, or None. One in float32 is decomposed there where its
            condition is at most `NARROW_CONDITION`, else in float64.
        key: says what it was made of, so that equal ones are decomposed once; "" for each alone.
    """

    size: int
    isotropic: float = 0.0
    rows: Tensor | None = None
    matrix: Tensor | None = None
    key: str = ""

    @property
    def count(self) -> int:
        """How many rows there are."""
        return 0 if self.rows is None else len(self.rows)

    @property
    def level(self) -> float:
        """About the largest entry of C beside the identity."""
        if self.matrix is not None:
            return float(self.matrix.diagonal().max())
        return 0.0 if self.rows is None else float(self.rows.abs().max()) ** 2

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
            return self._whole()
        assert self.rows is not None
        values, vectors = lapack.eigh(self.rows @ self.rows.mT)
        # Directions that the rounding of the product has made up are worth nothing.
        kept = values > values[0] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[kept], vectors[:, kept]
        return values, (vectors / values.sqrt()).mT @ self.rows

    def _whole(self) -> tuple[Tensor, Tensor]:
        like = self.matrix if self.rows is None else self.rows
        assert like is not None
        dense = self.dense(like)
        values, vectors = lapack.eigh(dense)
        if dense.dtype != torch.float64 and values[0] > NARROW_CONDITION * values[-1]:
            values, vectors = lapack.eigh(dense.double())
        return values.clamp_min(torch.finfo(values.dtype).tiny), vectors.mT

    def times(self, matrix: Tensor, exponent: float) -> Tensor:
        """Return M·C^p for M `[n, in]`, in the wider dtype of M and C.

        What was decomposed for one p serves others. Of a matrix with a key C^p itself is kept,
        unless it is wide: that would take too much memory.
        Of few rows C^p = ε^p·I + Eᵀ((ε + Λ)^p − ε^p)E, with E the orthonormal rows of the range.
        """
        if self.matrix is not None and self.key and self.size <= WHOLE_WIDTH:
            power = remembered(digest(self.key, exponent), lambda: self._power(exponent))
            wide = torch.promote_types(matrix.dtype, self.matrix.dtype)
            return matrix.to(wide) @ power.to(wide)
        matrix = matrix.double()
        if self.thin and not self.count:
            return matrix * self.isotropic**exponent
        values, vectors = (part.double() for part in self._pairs)
        if not self.thin:
            return ((matrix @ vectors.mT) * values**exponent) @ vectors
        power = self.isotropic**exponent
        gains = (self.isotropic + values) ** exponent - power
        return matrix * power + ((matrix @ vectors.mT) * gains) @ vectors

    def _power(self, exponent: float) -> Tensor:
        """Return C^p, in the dtype of the decomposition."""
        values, vectors = self._pairs
        return (vectors.mT * values**exponent) @ vectors

    def between(self, size: int, rows: Tensor | None) -> InputMetric:
        """Return it between `size` orthonormal directions, of which the rows are `[k, size]`."""
        return InputMetric(size, self.isotropic, rows)


Metric = InputMetric | WideMetric


def is_wide(size: int, rank: int) -> bool:
    """Tell whether leading directions and products are less work than an eigenproblem."""
    return size >= max(WHOLE_WIDTH, WHOLE * rank)


def mean_metric(metrics: Sequence[Metric], like: Tensor) -> Metric:
    """Return the mean of metrics of one size: of rows if all of them together are few."""
    own = [metric for metric in metrics if isinstance(metric, InputMetric)]
    if len(own) < len(metrics):
        return _mean_wide(metrics, like)
    size, count = own[0].size, len(own)
    isotropic = sum(metric.isotropic for metric in own) / count
    held = [m.rows / count**0.5 for m in own if m.rows is not None]
    if all(m.matrix is None for m in own):
        rows = torch.cat(held) if held else None
        together = InputMetric(size, isotropic, rows)
        if together.thin:
            return together
    total = own[0].dense(like) / count
    for metric in own[1:]:
        total = total.add(metric.dense(like), alpha=1 / count)
    return InputMetric(size, matrix=total, key=digest("mean", *(metric.key for metric in own)))


def _mean_wide(metrics: Sequence[Metric], like: Tensor) -> WideMetric:
    """Return the mean of metrics, some of them wide: a matrix if any of them has one."""
    first = next(m for m in metrics if isinstance(m, WideMetric))
    share = 1 / len(metrics)
    isotropic = sum(m.isotropic for m in metrics) * share
    scaled = [(m, share * (m.scale if isinstance(m, WideMetric) else 1.0)) for m in metrics]
    dtype = first.like.dtype
    key = digest(*(part for m, scale in scaled for part in (m.key, scale)))
    factor = to_near_one(max(scale * m.level for m, scale in scaled))
    scaled = [(m, scale * factor) for m, scale in scaled]
    first = replace(first, key=key, scale=1 / factor)
    if all(m.matrix is None for m in metrics):
        rows = [m.rows.to(dtype) * scale**0.5 for m, scale in scaled if m.rows is not None]
        diagonals = [
            m.diagonal.double() * scale
            for m, scale in scaled
            if isinstance(m, WideMetric) and m.diagonal is not None
        ]
        rest = sum(diagonals[1:], diagonals[0]) if diagonals else None
        return replace(first, isotropic=isotropic, rows=torch.cat(rows), diagonal=rest)
    total = torch.zeros(first.size, first.size, dtype=dtype, device=like.device)
    held = [(m.matrix, scale) for m, scale in scaled if m.matrix is not None]
    for start in range(0, first.size, PANEL):  # the sum of few rows stays in the cache
        panel = total[start : start + PANEL]
        for matrix, scale in held:
            panel.add_(matrix[start : start + PANEL].to(dtype), alpha=scale)
    for m, scale in scaled:
        if m.matrix is None and m.rows is not None:
            total.add_(gram(m.rows, dtype), alpha=scale)
            if isinstance(m, WideMetric) and m.diagonal is not None:
                total.diagonal().add_(m.diagonal.to(dtype), alpha=scale)
    return replace(first, isotropic=isotropic, matrix=total, rows=None, diagonal=None)
