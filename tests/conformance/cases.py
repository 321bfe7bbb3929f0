"""Inputs for every registered method, with whatever it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from eutectic.methods import Method, all_methods
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context
from eutectic.types import LayerStatistics, Merged

METHODS = all_methods()
TOKENS = 40


@dataclass(frozen=True)
class Case:
    """One call of a method: task matrices and what comes with them."""

    method: Method
    deltas: Tensor
    weights: tuple[float, ...]
    names: tuple[str, ...]
    base: Tensor | None = None
    statistics: tuple[LayerStatistics, ...] | None = None

    def context(self) -> Context:
        return Context(
            weights=self.weights,
            experts=self.names,
            tensor="layer.0.weight",
            base=self.base,
            statistics=self.statistics,
        )

    def run(self) -> Merged:
        return run_method(self.method, self.deltas, self.method.parse({}), self.context())

    def merged(self) -> Tensor:
        return self.run().delta

    def choose(self, order: Sequence[int]) -> Case:
        """Return the case with these experts, in this order."""
        chosen = list(order)
        statistics = self.statistics
        return replace(
            self,
            deltas=self.deltas[chosen],
            weights=tuple(self.weights[t] for t in chosen),
            names=tuple(self.names[t] for t in chosen),
            statistics=None if statistics is None else tuple(statistics[t] for t in chosen),
        )

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

        return replace(
            self,
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
    dtype: torch.dtype = torch.float64,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Case:
    """Return a case with random deltas (of low rank, if asked) and whatever the method needs."""
    method = METHODS[name]
    count = expert_count(method, experts)
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    if rank is None:
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
def cases(draw: st.DrawFn, name: str) -> Case:
    """Draw a case of any small shape, rank and number of experts, in float64."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    experts = draw(st.integers(1, 4))
    rank = draw(st.none() | st.integers(1, 4))
    weights = draw(st.none() | st.just([0.5, 2.0, 1.25, 0.75]))
    seed = draw(st.integers(0, 2**31))
    return make_case(name, (rows, columns), experts=experts, rank=rank, weights=weights, seed=seed)


def claiming(law: str) -> list[str]:
    return [name for name, method in METHODS.items() if law in method.laws]


def relative_error(result: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm()
    difference = (result.double() - expected.double()).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q
