"""Inner products of very many inputs: leading directions, and polynomials on the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.remembered import digest, remembered

EVEN = 1 - 1e-4  # of the largest eigenvalue: a mean above this is that of equal ones
ABOVE = 1.1  # times the next Ritz value, where the rest of a spectrum begins
BLOCKS = 10  # of a quarter of the rank, that the leading directions are sought in
PROBES = 8  # beside them
PASSES, KEPT = 5, 0.7
STEEP = 6  # degrees that a step of Lanczos more makes safe
NODES = 400  # at which a polynomial is fitted
SMOOTH = 3  # a positive power asks for this share of the degree of a negative one

NEAR_ONE = 2.0**40  # sizes whose products with one another stay in the range of float32

Act = Callable[[Tensor], Tensor]


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

    Block Lanczos with full re-orthogonalisation from a seeded start (Musco and Musco, arXiv
    1504.05477): `BLOCKS` blocks of k/4. Of eigenvalues that are equal it finds no more than a block
    has, so that random vectors beside them look for one that it has missed. What is lost is
    exact, tr A less the Ritz values: A lies above what is kept, so it is the error in nuclear norm.

    Args:
        act: X `[s, in]` -> X·A.
        shape: in, and the directions k that are kept.
        trace: tr A.
        like: the products' dtype and device; small matrices are in float64.
        steps: of Lanczos from the random vectors, in which the next eigenvalue is sought.

    Cost: 2.5k products with A, O(in·k²) beside them.
    """
    size, rank = shape
    block = min(size, max(4, -(-rank // 4)))
    # The start is the same for all matrices of one size: layers that share a Gram share its root.
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(size, block + PROBES, generator=generator, dtype=like.dtype)
    start, probes = start.to(like.device).split([block, PROBES], 1)
    space = lapack.orthonormal(start)
    image = act(space.mT).mT
    for _ in range(min(BLOCKS, size // block) - 1):
        fresh = _beside(space, image[:, -block:])
        space = torch.cat([space, fresh], 1)
        image = torch.cat([image, act(fresh.mT).mT], 1)
    exact = space.double()
    small = exact.mT @ image.double()
    values, turned = lapack.eigh((small + small.mT) / 2)
    values = values.clamp_min(0)
    vectors = exact @ turned[:, :rank]
    lost = max(trace - float(values[:rank].sum()), 0.0)
    following = float(values[rank]) if len(values) > rank else 0.0
    # What the space has missed couples to it through its next block; of equal ones, by chance.
    probes = torch.cat([_beside(space, image[:, -block:]), probes], 1)
    missed = _largest_beside(act, vectors.to(like.dtype), probes, steps)
    return Leading(values[:rank], vectors, max(following, missed), lost)


def _beside(space: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal columns of a block, orthogonal to those of a space.

    Passes are repeated while one takes much away: what little was left of the block was rounding.
    """
    for number in range(PASSES):
        block, R = lapack.qr(block - space @ (space.mT @ block))
        if number and float(R.diagonal().abs().min()) > KEPT:
            break
    return block


def _largest_beside(act: Act, vectors: Tensor, probes: Tensor, steps: int) -> float:
    """Return about the largest eigenvalue of A beside some vectors, from below."""
    space = _beside(vectors, probes)
    width = space.shape[1]
    image = act(space.mT).mT
    for _ in range(min(steps, (len(space) - vectors.shape[1]) // width) - 1):
        fresh = _beside(torch.cat([vectors, space], 1), image[:, -width:])
        space = torch.cat([space, fresh], 1)
        image = torch.cat([image, act(fresh.mT).mT], 1)
    small = (space.mT @ image).double()
    return float(lapack.eigh((small + small.mT) / 2)[0][0])


@dataclass(frozen=True, eq=False)
class WideMetric:
    """A positive definite C of many inputs, of which only products are taken.

    C = `isotropic`·I + `scale`·A, with A a matrix, or rowsᵀ·rows + diag(`diagonal`). Its powers are
    exact on the `rank` leading directions; on the rest, whose spectrum is short once these are
    gone, they are a polynomial of C, fitted to it.

    Attributes:
        size: in.
        isotropic: the multiple of the identity, above 0.
        matrix: A `[in, in]`, in its own dtype, or None.
        rows: `[k, in]` where there is no matrix.
        diagonal: `[in]` beside the rows, or None.
        scale: of A.
        rank: leading directions that are found.
        degree: of the polynomial of a negative power, which is steep where most of the spectrum
            lies; that of a positive one, which is not, has a third of it. 0 takes the rest of the
            spectrum as even, at its mean.
        key: says what A is, so that its leading directions are found once; "" for each alone.
    """

    size: int
    isotropic: float
    matrix: Tensor | None = None
    rows: Tensor | None = None
    diagonal: Tensor | None = None
    scale: float = 1.0
    rank: int = 64
    degree: int = 6
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

    @property
    def level(self) -> float:
        """About the largest entry of A."""
        if self.matrix is not None:
            return float(self.matrix.diagonal().max())
        rest = 0.0 if self.diagonal is None else float(self.diagonal.max())
        return max(float(self.like.abs().max()) ** 2, rest)

    def in_range(self) -> WideMetric:
        """Return the same with an A near 1, where products with its own are out of range."""
        factor = to_near_one(self.level)
        if factor == 1:
            return self
        return replace(
            self,
            matrix=None if self.matrix is None else self.matrix * factor,
            rows=None if self.rows is None else self.rows * factor**0.5,
            diagonal=None if self.diagonal is None else self.diagonal * factor,
            scale=self.scale / factor,
        )

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
            return leading_pairs(self._act, shape, self.trace, like=self.like, steps=steps)

        # Beyond its end a polynomial of degree d is off on a scale of 1/d²; so is what d steps of
        # Lanczos leave of the largest eigenvalue.
        steps = max(2, 1 + self.degree // STEEP)
        return remembered(digest(self.key, self.rank, steps), find)

    def times(self, matrix: Tensor, exponent: float) -> Tensor:
        """Return M·C^p for M `[n, in]`, in the wider dtype of M and the Gram.

        Cost: as many products with A as the polynomial's degree, beside the leading directions,
        which are found once.
        """
        factor = to_near_one(float(matrix.abs().max())) if matrix.numel() else 1.0
        if factor != 1:
            return self.times(matrix * factor, exponent).div_(factor)
        found = self._leading
        rest = matrix.to(torch.promote_types(matrix.dtype, self.like.dtype))
        V = found.vectors.to(rest.dtype)
        inside = rest @ V
        rest = torch.addmm(rest, inside, V.mT, alpha=-1)
        powers = (self.isotropic + self.scale * found.values) ** exponent
        result = (inside * powers.to(rest.dtype)) @ V.mT
        mean = found.lost / max(self.size - self.rank, 1)
        if not self.degree or mean >= EVEN * found.next:
            return result.add_(rest, alpha=(self.isotropic + self.scale * mean) ** exponent)
        # A Ritz value lies below what it estimates.
        above = self.isotropic + ABOVE * self.scale * found.next
        narrow = V.to(self.like.dtype)
        centre, half = (above + self.isotropic) / 2, (above - self.isotropic) / 2
        shift = (self.isotropic - centre) / half

        def step(x: Tensor, times: float) -> Tensor:
            """Return `times`·X·(C − centre)/half, beside the leading directions."""
            own = self._act(x).mul_(times * self.scale / half).add_(x, alpha=times * shift)
            return own.addmm_(own @ narrow, narrow.mT, alpha=-1)

        first = rest.to(self.like.dtype)
        second = step(first, 1)
        degree = self.degree if exponent < 0 else positive_degree(self.degree)
        weights = fitted(exponent, self.isotropic, above, degree)
        result.add_(first, alpha=weights[0]).add_(second, alpha=weights[1])
        for weight in weights[2:]:
            first, second = second, step(second, 2).sub_(first)
            result.add_(second, alpha=weight)
        return result


def to_near_one(level: float) -> float:
    """Return an even power of 2 that brings a size to about 1, and 1 for sizes near enough.

    Products with it round nothing.
    """
    if not level or not math.isfinite(level) or 1 / NEAR_ONE <= level <= NEAR_ONE:
        return 1.0
    return 4.0 ** -round(math.log2(level) / 2)


def positive_degree(degree: int) -> int:
    """Return the degree that a positive power takes where a negative one takes `degree`."""
    return -(-degree // SMOOTH)


def fitted(exponent: float, low: float, high: float, degree: int) -> list[float]:
    """Return Chebyshev coefficients on [low, high] of the polynomial that fits x^p best.

    By least squares over a spectrum that is even in log x, as those of inputs nearly are; a
    positive power by its relative error, since what follows it divides by the like. On MiniLM's
    layers Iso-A is a third nearer than by the Chebyshev series of the same degree.
    """
    x = torch.logspace(math.log10(low), math.log10(high), NODES, dtype=torch.float64)
    angles = torch.arccos(((2 * x - low - high) / (high - low)).clamp(-1, 1))
    basis = torch.stack([torch.cos(j * angles) for j in range(degree + 1)], 1)
    weights = x ** -max(exponent, 0.0)
    Q, R = lapack.qr(basis * weights[:, None])
    right = Q.mT @ (weights * x**exponent)
    return [float(c) for c in torch.linalg.solve_triangular(R, right[:, None], upper=True)[:, 0]]
