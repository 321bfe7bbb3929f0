"""Inner products of layer inputs: a second moment as a matrix, or as few rows and the identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.remembered import digest, remembered

# Rows below this share of the width are cheaper than the matrix, whose eigenproblem is the cost.
FEW = 0.5
# Measured: below this width, and below so many times the rank, the eigenproblem costs less.
WHOLE_WIDTH = 512
WHOLE = 4
FEW_ROWS = 1024  # up to so many rows, their own eigenproblem costs less
EVEN = 1 - 1e-4  # of the largest eigenvalue: a mean above this is that of equal ones
ABOVE = 1.1  # times the next Ritz value, where the rest of a spectrum begins
STEPS = 12
GAIN = 2e-3  # of what is lost, that a step of the subspace iteration may still gain
NOTHING = 1e-12  # of the whole energy: so little is rounding

Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class InputMetric:
    """A positive definite C = `isotropic`·I + rowsᵀ·rows `[in, in]`, or a matrix; in float64.

    Attributes:
        size: in.
        isotropic: the multiple of the identity, above 0 unless there is a matrix.
        rows: `[k, in]`, or None for none.
        matrix: `[in, in]` in place of both, or None.
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
            # Wider ones would take too much memory to be kept.
            return remembered(self.key if self.size <= WHOLE_WIDTH else "", self._whole)
        assert self.rows is not None
        values, vectors = lapack.eigh(self.rows @ self.rows.mT)
        # Directions that the rounding of the product has made up are worth nothing.
        kept = values > values[0] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[kept], vectors[:, kept]
        return values, (vectors / values.sqrt()).mT @ self.rows

    def _whole(self) -> tuple[Tensor, Tensor]:
        like = self.matrix if self.rows is None else self.rows
        assert like is not None
        values, vectors = lapack.eigh(self.dense(like))
        return values.clamp_min(torch.finfo(values.dtype).tiny), vectors.mT

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


@dataclass(frozen=True, eq=False)
class Leading:
    """Leading Ritz pairs of a semidefinite A.

    Attributes:
        values: `[k]`, descending, in float64.
        vectors: `[in, k]`, orthonormal columns, in float64.
        next: the Ritz value after them: about where the rest of the spectrum begins.
        lost: what they leave of tr A.
    """

    values: Tensor
    vectors: Tensor
    next: float
    lost: float


def leading_pairs(
    act: Act, shape: tuple[int, int], trace: float, *, like: Tensor, steps: int = 2
) -> Leading:
    """Return the leading eigenpairs of a semidefinite A, and what they leave of its trace.

    Subspace iteration from a seeded start (Halko, Martinsson and Tropp, arXiv 0909.4061), until a
    step gains less than `GAIN` of what is lost, or for `STEPS` steps. What is lost is exact, tr A
    less the Ritz values: A lies above what is kept, so it is the error in nuclear norm.

    Args:
        act: X `[s, in]` -> X·A.
        shape: in, and the directions k that are kept.
        trace: tr A.
        like: the products' dtype and device; small matrices are in float64.
        steps: the fewest steps.

    Cost: O(in²·k) per step for a matrix, O(in·k·n) for n rows.
    """
    size, rank = shape
    wide = min(size, rank + max(8, rank // 4))
    # The start is the same for all matrices of one size: layers that share a Gram share its root.
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(wide, size, generator=generator, dtype=like.dtype).to(like.device)
    basis = lapack.orthonormal(act(start).mT)
    before, step = 0.0, 0
    while True:
        image = act(basis.mT).mT
        exact = basis.double()
        small = exact.mT @ image.double()
        values, turned = lapack.eigh((small + small.mT) / 2)
        values = values.clamp_min(0)
        captured = float(values[:rank].sum())
        lost = max(trace - captured, 0.0)
        step += 1
        settled = captured - before <= max(GAIN * lost, NOTHING * trace)
        if step >= STEPS or (step >= max(steps, 2) and settled):
            following = float(values[rank]) if len(values) > rank else 0.0
            return Leading(values[:rank], exact @ turned[:, :rank], following, lost)
        before = captured
        basis = lapack.orthonormal(image)


@dataclass(frozen=True, eq=False)
class WideMetric:
    """A positive definite C of many inputs, of which only products are taken.

    C = `isotropic`·I + `scale`·A, with A a matrix, or rowsᵀ·rows + diag(`diagonal`). Its powers are
    exact on the `rank` leading directions; on the rest, whose spectrum is short once these are
    gone, they are a Chebyshev polynomial of C.

    Attributes:
        size: in.
        isotropic: the multiple of the identity, above 0.
        matrix: A `[in, in]`, in its own dtype, or None.
        rows: `[k, in]` where there is no matrix.
        diagonal: `[in]` beside the rows, or None.
        scale: of A.
        rank: leading directions that are found.
        degree: of the polynomial; 0 takes the rest of the spectrum as even, at its mean.
        key: says what A is, so that its leading directions are found once; "" for each alone.
    """

    size: int
    isotropic: float
    matrix: Tensor | None = None
    rows: Tensor | None = None
    diagonal: Tensor | None = None
    scale: float = 1.0
    rank: int = 64
    degree: int = 4
    key: str = ""

    @property
    def like(self) -> Tensor:
        """A tensor of the products' dtype and device."""
        held = self.matrix if self.matrix is not None else self.rows
        assert held is not None
        return held

    @property
    def trace(self) -> float:
        """The trace of A."""
        if self.matrix is not None:
            return float(self.matrix.diagonal().sum(dtype=torch.float64))
        rest = 0.0 if self.diagonal is None else float(self.diagonal.sum(dtype=torch.float64))
        return float(self.like.square().sum(dtype=torch.float64)) + rest

    def ridged(self, ridge: float) -> WideMetric:
        """Return C + ridge·I."""
        return replace(self, isotropic=self.isotropic + ridge)

    def _act(self, x: Tensor) -> Tensor:
        """Return X·A."""
        if self.matrix is not None:
            return x @ self.matrix
        product = (x @ self.like.mT) @ self.like
        return product if self.diagonal is None else product + x * self.diagonal.to(x)

    @cached_property
    def _leading(self) -> Leading:
        def find() -> Leading:
            shape = (self.size, self.rank)
            return leading_pairs(self._act, shape, self.trace, like=self.like, steps=self.degree)

        return remembered(digest(self.key, self.rank, self.degree), find)

    def times(self, matrix: Tensor, exponent: float) -> Tensor:
        """Return M·C^p for M `[n, in]`, in float64, from products in the Gram's dtype.

        Cost: `degree` products with A beside the leading directions, which are found once.
        """
        found = self._leading
        V = found.vectors
        wide = matrix.double()
        inside = wide @ V
        powers = (self.isotropic + self.scale * found.values) ** exponent
        result = (inside * powers) @ V.mT
        rest = wide - inside @ V.mT
        mean = found.lost / max(self.size - self.rank, 1)
        if not self.degree or mean >= EVEN * found.next:
            return result + rest * (self.isotropic + self.scale * mean) ** exponent
        # A Ritz value lies below what it estimates.
        above = self.isotropic + ABOVE * self.scale * found.next
        narrow = V.to(self.like.dtype)
        centre, half = (above + self.isotropic) / 2, (above - self.isotropic) / 2
        shift = (self.isotropic - centre) / half

        def step(x: Tensor) -> Tensor:
            own = self._act(x) * (self.scale / half) + x * shift
            return own - (own @ narrow) @ narrow.mT

        first = rest.to(self.like.dtype)
        second = step(first)
        weights = chebyshev(exponent, centre, half, self.degree)
        total = first.double() * weights[0] + second.double() * weights[1]
        for weight in weights[2:]:
            first, second = second, 2 * step(second) - first
            total += second.double() * weight
        return result + total


def chebyshev(exponent: float, centre: float, half: float, degree: int) -> list[float]:
    """Return the coefficients of the Chebyshev series of x^p around a centre."""
    count = 8 * (degree + 8)
    angles = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    values = (centre + half * angles.cos()) ** exponent
    return [
        float((values * (j * angles).cos()).mean()) * (2 if j else 1) for j in range(degree + 1)
    ]


Metric = InputMetric | WideMetric


def _mean_wide(metrics: Sequence[Metric], like: Tensor) -> WideMetric:
    """Return the mean of metrics, some of them wide: a matrix if any of them has one."""
    first = next(m for m in metrics if isinstance(m, WideMetric))
    share = 1 / len(metrics)
    isotropic = sum(m.isotropic for m in metrics) * share
    scaled = [(m, share * (m.scale if isinstance(m, WideMetric) else 1.0)) for m in metrics]
    dtype = first.like.dtype
    key = digest(*(part for m, scale in scaled for part in (m.key, scale)))
    first = replace(first, key=key)
    if all(m.matrix is None for m in metrics):
        rows = [m.rows.to(dtype) * scale**0.5 for m, scale in scaled if m.rows is not None]
        diagonals = [
            m.diagonal.double() * scale
            for m, scale in scaled
            if isinstance(m, WideMetric) and m.diagonal is not None
        ]
        rest = sum(diagonals[1:], diagonals[0]) if diagonals else None
        return replace(first, isotropic=isotropic, rows=torch.cat(rows), diagonal=rest, scale=1.0)
    total = torch.zeros(first.size, first.size, dtype=dtype, device=like.device)
    for m, scale in scaled:
        if m.matrix is not None:
            total.add_(m.matrix.to(dtype), alpha=scale)
        elif m.rows is not None:
            own = m.rows.to(dtype)
            total.addmm_(own.mT, own, alpha=scale)
            if isinstance(m, WideMetric) and m.diagonal is not None:
                total.diagonal().add_(m.diagonal.to(dtype), alpha=scale)
    return replace(first, isotropic=isotropic, matrix=total, rows=None, diagonal=None, scale=1.0)


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
