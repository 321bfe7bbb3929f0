"""Grams in few rows and a diagonal: what the matrices that they stand for give, without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eutectic.linalg.essential import essential_subspace
from eutectic.methods import merge_matrices
from eutectic.routed.router import discriminant_router, pooled_form, prototype_router, shrunk
from eutectic.tuning.output_error import closed_form_scale, output_terms
from eutectic.types import LayerStatistics

OUT, IN, K, EXPERTS = 10, 48, 5, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_rows(
    k: int = K, width: int = IN, out: int = OUT, experts: int = EXPERTS
) -> list[LayerStatistics]:
    """Return leading directions and a remainder of inputs and of output gradients, in float64."""
    found: list[LayerStatistics] = []
    for t in range(experts):
        decay = torch.logspace(1, -1, max(k, 1))[:k, None]
        few = min(k, out)
        found.append(
            LayerStatistics(
                gram_factor=(decay * drawn(k, width, seed=t)).double(),
                gram_diagonal=0.3 * drawn(width, seed=t + 10).double().square() + 0.01,
                output_gradient_factor=drawn(few, out, seed=t + 20).double(),
                output_gradient_diagonal=drawn(out, seed=t + 30).double().square() + 0.01,
                count=100 + 20 * t,
            )
        )
    return found


def expanded(entries: Sequence[LayerStatistics]) -> list[LayerStatistics]:
    """Return the same Grams as matrices."""
    return [
        LayerStatistics(
            gram=e.dense_gram(),
            output_gradient_gram=e.dense("output_gradient_gram"),
            count=e.count,
        )
        for e in entries
    ]


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("esm", {}),
    ("esm", {"preset": "roberta", "rank_fraction": 0.5}),
    ("regmean", {}),
    ("regmean", {"off_diagonal": 1.0}),
    ("regmean", {"ridge": 0.01, "off_diagonal": 1.0}),
    ("mats", {"iterations": 7}),
    ("mats", {"iterations": 7, "damping": 0.1}),
    ("mats", {"iterations": 5, "preconditioner": "jacobi"}),
    ("mats", {"iterations": 2, "preconditioner": "kronecker"}),
    ("mats", {"solver": "direct"}),
    ("mats", {"operator": "kfac", "iterations": 7}),
    ("mats", {"operator": "kfac", "iterations": 7, "off_diagonal": 0.5}),
    ("mats", {"operator": "kfac", "iterations": 7, "off_diagonal": 0.0}),
    ("mats", {"operator": "kfac", "iterations": 3, "preconditioner": "kronecker"}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_a_merge_is_that_of_the_matrices(method: str, parameters: dict[str, Any]) -> None:
    deltas = drawn(EXPERTS, OUT, IN, seed=99)
    options = {**parameters, "precision": "exact", "weights": (1.0, 0.5, 2.0)}
    found = merge_matrices(method, deltas, statistics=in_rows(), **options)
    near(found, merge_matrices(method, deltas, statistics=expanded(in_rows()), **options))


@pytest.mark.parametrize("method", ["esm", "regmean", "mats"])
@pytest.mark.parametrize("case", ["tall", "whole rank", "one task", "bare inputs", "weight"])
def test_the_corners(method: str, case: str) -> None:
    """More outputs than inputs; k = d; T = 1; diagonals of zeros; weights as the unknown."""
    entries, deltas = in_rows(), drawn(EXPERTS, OUT, IN, seed=99)
    options: dict[str, Any] = {"precision": "exact"}
    if method == "mats":
        options |= {"tolerance": 1e-9, "iterations": 500}
    if case == "tall":
        deltas = drawn(EXPERTS, 2 * IN, IN, seed=99)
    elif case == "whole rank":
        entries = in_rows(IN)
    elif case == "one task":
        entries, deltas = entries[:1], deltas[:1]
    elif case == "bare inputs":
        bare = (torch.arange(IN) >= K).float()
        entries = [replace(e, gram_diagonal=bare * e.gram_diagonal) for e in entries]
    elif method != "esm":
        options |= {"space": "weight", "base": drawn(OUT, IN, seed=98)}
    entries = [replace(e, output_gradient_factor=None) for e in entries]
    whole = [LayerStatistics(gram=e.dense_gram(), count=e.count) for e in entries]
    found = merge_matrices(method, deltas, statistics=entries, **options)
    near(found, merge_matrices(method, deltas, statistics=whole, **options))
    if case == "one task" and method == "regmean":
        near(found, deltas[0])
    zero = merge_matrices(method, 0 * deltas, statistics=entries, **options)
    assert case == "weight" or not bool(zero.any())


@pytest.mark.parametrize("method", ["esm", "iso_a", "regmean", "mats"])
def test_a_diagonal_without_rows_is_a_gram(method: str) -> None:
    deltas = drawn(EXPERTS, OUT, IN, seed=99)
    entries = [replace(e, output_gradient_factor=None) for e in in_rows(0)]
    found = merge_matrices(method, deltas, statistics=entries, precision="exact")
    whole = [LayerStatistics(gram=e.dense_gram(), count=e.count) for e in entries]
    near(found, merge_matrices(method, deltas, statistics=whole, precision="exact"))


def test_grams_without_anything_are_as_good_as_none() -> None:
    deltas = drawn(EXPERTS, OUT, IN, seed=99)
    nothing = [
        LayerStatistics(gram_factor=torch.zeros(K, IN), gram_diagonal=torch.zeros(IN), count=5)
    ] * EXPERTS
    for method in ("esm", "regmean", "mats"):
        merged = merge_matrices(method, deltas, statistics=nothing, full_output=True)
        assert merged.record["rest"] in ("tsv_m", "average")


def test_thin_deltas_see_the_same_directions() -> None:
    pairs = [(drawn(40, 3, seed=t), drawn(3, IN, seed=t + 5)) for t in range(EXPERTS)]
    found = merge_matrices("esm", pairs, statistics=in_rows(out=40))
    whole = torch.stack([left @ right for left, right in pairs])
    near(found, merge_matrices("esm", whole, statistics=expanded(in_rows(out=40))), 1e-4)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("regmean", {}),
        ("regmean", {"ridge": 0.1}),
        ("mats", {"iterations": 6}),
        ("mats", {"iterations": 6, "damping": 0.1, "init": "zero", "trust": 0.5}),
        ("mats", {"solver": "direct"}),
    ],
)
def test_thin_deltas_are_matched_between_the_outputs_that_they_reach(
    method: str, parameters: dict[str, Any]
) -> None:
    pairs = [(drawn(40, 3, seed=t), drawn(3, IN, seed=t + 5)) for t in range(EXPERTS)]
    whole = torch.stack([left @ right for left, right in pairs])
    options = {**parameters, "weights": (1.0, 0.5, 2.0), "precision": "exact"}
    entries = [replace(e, output_gradient_factor=None) for e in in_rows(out=40)]
    with Largest() as seen:
        found = merge_matrices(method, pairs, statistics=entries, **options)
    near(found, merge_matrices(method, whole, statistics=entries, **options))
    # Nothing of T whole deltas in float64.
    assert seen.entries < 2 * EXPERTS * 40 * IN


def test_the_closed_form_of_alpha_is_that_of_the_matrices() -> None:
    deltas, merged = drawn(EXPERTS, OUT, IN, seed=99).double(), drawn(OUT, IN, seed=98).double()
    merged += deltas.sum(0)
    one, other = (
        closed_form_scale([output_terms(iter(deltas), merged, entries, [1.0] * EXPERTS)])
        for entries in (in_rows(), expanded(in_rows()))
    )
    assert one.scale == pytest.approx(other.scale, rel=1e-9)


def pooled(k: int | None, samples: int = 30, width: int = 200) -> list[LayerStatistics]:
    """Return sums of samples about a mean per task: rows alone, or leading ones and the rest."""
    found: list[LayerStatistics] = []
    for t in range(EXPERTS):
        x = drawn(samples, width, seed=t).double() * torch.logspace(0, -1, width) + 0.1 * t
        _, values, vectors = torch.linalg.svd(x, full_matrices=False)
        factor = (values[:, None] * vectors)[:k]
        rest = None if k is None else (x.square().sum(0) - factor.square().sum(0)).clamp_min(0)
        found.append(
            LayerStatistics(
                input_sum=x.sum(0),
                count=samples,
                pooled_factor=factor,
                pooled_diagonal=rest,
                pooled_sum=x.sum(0),
                sample_count=samples,
            )
        )
    return found


def whole(entries: Sequence[LayerStatistics]) -> list[LayerStatistics]:
    return [
        LayerStatistics(
            input_sum=e.input_sum,
            count=e.count,
            pooled_gram=e.dense("pooled_gram"),
            pooled_sum=e.pooled_sum,
            sample_count=e.sample_count,
        )
        for e in entries
    ]


@pytest.mark.parametrize("shrinkage", [None, 0.1])
def test_routers_are_those_of_the_matrices(shrinkage: float | None) -> None:
    entries = pooled(None)
    one, other = (discriminant_router(e, "layer", shrinkage) for e in (entries, whole(entries)))
    near(one.weight, other.weight)
    near(one.bias, other.bias)
    weight = drawn(3, 200, seed=5)
    near(pooled_form(pooled(20)[0], weight), pooled_form(whole(pooled(20))[0], weight), 1e-10)
    found = prototype_router(entries, "layer").weight
    assert torch.equal(found, prototype_router(whole(entries), "layer").weight)


@pytest.mark.parametrize("shrinkage", [None, 0.1])
@pytest.mark.parametrize("k", [20, 28])
def test_a_router_of_leading_directions(k: int, shrinkage: float | None) -> None:
    """Few rows or many (84 of three tasks are more than half of 160): the same covariance."""
    entries = pooled(k, width=200 if k == 20 else 160)
    p = entries[0].pooled_factor.shape[1]  # type: ignore[union-attr]
    scatter, means = torch.zeros(p, p, dtype=torch.float64), []
    for e in entries:
        assert e.pooled_factor is not None and e.pooled_sum is not None
        assert e.pooled_diagonal is not None
        means.append(e.pooled_sum / 30)
        basis = torch.linalg.qr(e.pooled_factor.T).Q
        inside = basis @ (basis.T @ e.pooled_sum)
        outside = (e.pooled_sum - inside).square() / 30
        scatter += e.pooled_factor.T @ e.pooled_factor - torch.outer(inside, inside) / 30
        scatter += (e.pooled_diagonal - outside).clamp_min(0).diag()
    covariance = shrunk(scatter / 87, 87, shrinkage)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0
    centred = torch.stack(means) - torch.stack(means).mean(0)
    expected = torch.linalg.solve(covariance, centred.T).T
    near(discriminant_router(entries, "layer", shrinkage).weight, expected)


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.untyped_storage().nbytes() // 4)
        return result


WIDE = 20_000


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("esm", {}),
        ("regmean", {}),
        ("mats", {"iterations": 3}),
        ("mats", {"iterations": 1, "preconditioner": "kronecker"}),
        ("mats", {"operator": "kfac", "iterations": 2}),
    ],
)
def test_no_matrix_of_the_width_is_formed(method: str, parameters: dict[str, Any]) -> None:
    """At d = 20,000 such a matrix has 400 million entries; all of these have below 12 million."""
    deltas = drawn(2, 16, WIDE, seed=99)
    with Largest() as seen:
        merged = merge_matrices(method, deltas, statistics=in_rows(64, WIDE, 16, 2), **parameters)
    assert merged.shape == (16, WIDE)
    assert seen.entries < WIDE**2 / 30


def test_nor_by_a_router_an_expert_of_a_routed_model_or_the_choice_of_alpha() -> None:
    entries, deltas = pooled(None, samples=20, width=WIDE), drawn(2, 16, WIDE, seed=99)
    inputs = in_rows(64, WIDE, 16, 2)
    with Largest() as seen:
        router = discriminant_router(entries, "layer")
        found = essential_subspace(deltas[0], inputs[0], 8)
        output_terms(iter(deltas), deltas.sum(0), inputs, [1.0, 1.0])
        pooled_form(entries[0], router.weight)
    assert router.weight.shape == (EXPERTS, WIDE) and found.directions.shape == (16, 8)
    assert seen.entries < WIDE**2 / 30
