"""Inputs for every registered method, with whatever it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import Method, all_methods
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context
from eutectic.types import LayerStatistics, Merged

METHODS = all_methods()
TOKENS = 40
Form = Literal["stack", "factors"]


@dataclass(frozen=True)
class Case:
    """One call of a method: task matrices and what comes with them.

    Where there are `factors`, the method gets those; `deltas` are their products.
    """

    method: Method
    deltas: Tensor
    weights: tuple[float, ...]
    names: tuple[str, ...]
    base: Tensor | None = None
    statistics: tuple[LayerStatistics, ...] | None = None
    factors: LowRankStack | None = None

    def context(self) -> Context:
        return Context(
            weights=self.weights,
            experts=self.names,
            tensor="layer.0.weight",
            base=self.base,
            statistics=self.statistics,
        )

    def run(self) -> Merged:
        given = self.deltas if self.factors is None else self.factors
        return run_method(self.method, given, self.method.parse({}), self.context())

    def merged(self) -> Tensor:
        return self.run().delta

    def choose(self, order: Sequence[int]) -> Case:
        """Return the case with these experts, in this order."""
        chosen = list(order)
        statistics, factors = self.statistics, self.factors
        if factors is not None:
            factors = LowRankStack(
                tuple(factors.left[t] for t in chosen), tuple(factors.right[t] for t in chosen)
            )
        return replace(
            self,
            factors=factors,
            deltas=self.deltas[chosen],
            weights=tuple(self.weights[t] for t in chosen),
            names=tuple(self.names[t] for t in chosen),
            statistics=None if statistics is None else tuple(statistics[t] for t in chosen),
        )

    def scaled(self, factor: float) -> Case:
        """Return the case with every delta times a number."""
        factors = self.factors
        if factors is not None:
            factors = factors.weighted([factor] * len(factors))
        return replace(self, deltas=self.deltas * factor, factors=factors)

    def copied(self) -> Case:
        """Return the case with the first expert's delta in every place."""
        factors = self.factors
        if factors is not None:
            count = len(factors)
            factors = LowRankStack(factors.left[:1] * count, factors.right[:1] * count)
        deltas = self.deltas[:1].expand_as(self.deltas).clone()
        return replace(self, deltas=deltas, factors=factors)

    def turned(self, left: Tensor, right: Tensor) -> Case:
        """Return the case seen in other bases of the outputs (P) and of the inputs (Q)."""

        def turn(entry: LayerStatistics) -> LayerStatistics:
            assert entry.gram is not None and entry.output_gradient_gram is not None
            return replace(
                entry,
                gram=right.mT @ entry.gram @ right,
                output_gradient_gram=left @ entry.output_gradient_gram @ left.mT,
                fisher_diagonal=None,
            )

        factors = self.factors
        if factors is not None:
            factors = LowRankStack(
                tuple(left @ f for f in factors.left), tuple(f @ right for f in factors.right)
            )
        return replace(
            self,
            factors=factors,
            deltas=left @ self.deltas @ right,
            base=None if self.base is None else left @ self.base @ right,
            statistics=None if self.statistics is None else tuple(map(turn, self.statistics)),
        )


def expert_count(method: Method, wanted: int) -> int:
    low, high = method.experts
    return max(low, wanted if high is None else min(wanted, high))


def make_case(
    name: str,
    shape: tuple[int, ...] = (5, 7),
    *,
    experts: int = 3,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Case:
    """Return a case with random deltas (of low rank, if asked) and whatever the method needs.

    `ranks` gives the experts as thin factors, with these inner sizes, over and over.
    """
    method = METHODS[name]
    count = expert_count(method, experts)
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = None
    if ranks is not None:
        own = [ranks[t % len(ranks)] for t in range(count)]
        left = tuple(randn(shape[0], r).to(dtype) for r in own)
        factors = LowRankStack(left, tuple(randn(r, shape[1]).to(dtype) for r in own))
        deltas = factors.dense()
    elif rank is None:
        deltas = randn(count, *shape)
    else:
        deltas = randn(count, shape[0], rank) @ randn(count, rank, shape[1])
    values = method.parse({})
    needs = method.needs(values)
    takes_base = "base" in needs or method.space(values) == "weight"
    statistics = None
    if needs - {"base"}:
        statistics = tuple(_statistics(shape, randn, dtype) for _ in range(count))
    return Case(
        method=method,
        deltas=deltas.to(dtype),
        weights=tuple((1.0,) * count if weights is None else weights[:count]),
        names=tuple(f"expert-{t}" for t in range(count)),
        base=randn(*shape).to(dtype) if takes_base else None,
        statistics=statistics,
        factors=factors,
    )


def _statistics(shape: tuple[int, ...], randn, dtype: torch.dtype) -> LayerStatistics:
    inputs, gradients = randn(TOKENS, shape[-1]), randn(TOKENS, shape[0])
    whole = randn(TOKENS, torch.Size(shape).numel())
    return LayerStatistics(
        gram=(inputs.T @ inputs).to(dtype),
        count=TOKENS,
        output_gradient_gram=(gradients.T @ gradients).to(dtype),
        fisher_diagonal=whole.square().sum(0).view(shape).to(dtype),
        block_fisher=(whole.T @ whole).to(dtype) if len(shape) == 1 else None,
        sample_count=TOKENS,
    )


@st.composite
def cases(draw: st.DrawFn, name: str, form: Form = "stack") -> Case:
    """Draw a case of any small shape, rank and number of experts, in float64."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    experts = draw(st.integers(1, 4))
    rank = draw(st.none() | st.integers(1, 4))
    weights = draw(st.none() | st.just([0.5, 2.0, 1.25, 0.75]))
    seed = draw(st.integers(0, 2**31))
    ranks = None
    if form == "factors":
        ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    return make_case(
        name,
        (rows, columns),
        experts=experts,
        rank=rank,
        ranks=ranks,
        weights=weights,
        seed=seed,
    )


def claiming(law: str) -> list[tuple[str, Form]]:
    """Return every method that claims a law, with each form of deltas that it takes."""
    claimed = [method for method in METHODS.values() if law in method.laws]
    thin: list[tuple[str, Form]] = [(m.name, "factors") for m in claimed if m.factors]
    return [*((m.name, "stack") for m in claimed), *thin]


def relative_error(result: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm()
    difference = (result.double() - expected.double()).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q
