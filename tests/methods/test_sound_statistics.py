"""Statistics that cannot be are refused by every method that reads them."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from eutectic import merge_matrices
from eutectic.errors import EutecticError, MethodError, NumericalError
from eutectic.types import LayerStatistics

OUT, IN = 5, 6
ON_INPUTS: list[tuple[str, dict[str, Any]]] = [
    ("iso_a", {}),
    ("esm", {}),
    ("regmean", {}),
    ("mats", {}),
    ("mats", {"operator": "kfac"}),
]


def sound(seed: int) -> LayerStatistics:
    X = torch.randn(40, IN, generator=torch.Generator().manual_seed(seed))
    Y = torch.randn(40, OUT, generator=torch.Generator().manual_seed(seed + 9))
    G = torch.randn(40, OUT * IN, generator=torch.Generator().manual_seed(seed + 20))
    return LayerStatistics(
        gram=X.T @ X,
        input_sum=X.sum(0),
        count=40,
        sample_count=8,
        examples=40,
        output_gradient_gram=Y.T @ Y,
        fisher_diagonal=G.square().sum(0).view(OUT, IN),
        block_fisher=G.T @ G,
    )


def with_negative_eigenvalue(gram: Tensor) -> Tensor:
    """Every diagonal entry stays positive, every 2 by 2 minor too."""
    values, vectors = torch.linalg.eigh(gram.double())
    values[0] = -0.05 * values[-1]
    return ((vectors * values) @ vectors.T).float()


def lopsided(gram: Tensor) -> Tensor:
    changed = gram.clone()
    changed[0, 3] += float(gram.diagonal().max())
    return changed


BAD = {
    "negative": (lambda g: -g, "negative sums of squares"),
    "a negative entry": (lambda g: g - 2 * torch.diag(g.diagonal() * torch.eye(IN)[1]), "1 neg"),
    "a negative eigenvalue": (with_negative_eigenvalue, "has the eigenvalue -"),
    "one row": (lambda g: g[:1], r"shape \[1, 6\], the tensor asks for \[6, 6\]"),
    "flat": (lambda g: g[0], r"shape \[6\], the tensor asks for"),
    "too wide": (lambda g: torch.eye(IN + 1), r"shape \[7, 7\], the tensor asks for \[6, 6\]"),
    "boolean": (lambda g: g > 0, "holds torch.bool; sums are floating-point"),
    "integers": (lambda g: g.long(), "holds torch.int64"),
    "complex": (lambda g: g.to(torch.complex64), "holds torch.complex64"),
    "not symmetric": (lopsided, "is not symmetric"),
    "NaN": (lambda g: torch.where(g == g[0, 1], torch.nan, g), "NaN or Inf"),
    "entries beside nothing": (lambda g: g - torch.diag(g.diagonal()), "beside a zero diagonal"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("method", "options"), ON_INPUTS)
def test_a_gram_that_cannot_be_is_refused(method: str, options: dict[str, Any], bad: str):
    change, said = BAD[bad]
    statistics = [sound(0), sound(1)]
    assert statistics[1].gram is not None
    statistics[1] = dataclasses.replace(statistics[1], gram=change(statistics[1].gram))
    deltas = torch.randn(2, OUT, IN)
    with pytest.raises((MethodError, NumericalError), match=rf"expert 'b': .*{said}"):
        merge_matrices(
            method, deltas, statistics=statistics, experts=["a", "b"], base=deltas[0], **options
        )


@pytest.mark.parametrize(
    ("method", "options", "field", "value", "said"),
    [
        ("fisher", {}, "fisher_diagonal", -torch.ones(OUT, IN), "30 negative"),
        ("fisher", {}, "fisher_diagonal", torch.ones(OUT, IN).bool(), "torch.bool"),
        ("mats", {"operator": "kfac"}, "output_gradient_gram", -torch.eye(OUT), "negative"),
        ("mats", {"operator": "block"}, "block_fisher", -torch.eye(OUT * IN), "negative"),
        ("iso_a", {}, "input_sum", torch.full((IN,), 1e4), "both the sums and the squares"),
        ("regmean", {}, "input_sum", torch.full((IN,), 1e4), "both the sums and the squares"),
        ("esm", {}, "count", -40, "negative counts"),
    ],
)
def test_other_sums_that_cannot_be_are_refused(
    method: str, options: dict[str, Any], field: str, value: Any, said: str
):
    changed = dataclasses.replace(sound(1), **{field: value})
    deltas = torch.randn(2, OUT, IN)
    with pytest.raises(EutecticError, match=rf"expert '1': .*{said}"):
        merge_matrices(method, deltas, statistics=[sound(0), changed], base=deltas[0], **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 400])
def test_grams_of_any_rank_and_dtype_pass(rows: int, dtype: torch.dtype):
    """Rounding makes small negative eigenvalues, and products that are not quite symmetric."""
    X = torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)) @ torch.diag(
        torch.tensor([1, 1e-1, 1e-2, 1e-3, 1e-4, 0])
    )
    entry = LayerStatistics(gram=(X.T @ X).to(dtype), input_sum=X.sum(0), count=rows)
    for method, options in ON_INPUTS[:3]:
        merge_matrices(method, torch.randn(2, OUT, IN), statistics=[entry, sound(1)], **options)


def test_a_factor_and_what_it_leaves_out_are_held_to_the_same():
    factor = torch.randn(3, IN)
    for field, value, said in (
        ("gram_diagonal", -torch.ones(IN), "negative sums of squares"),
        ("gram_diagonal", torch.ones(IN + 1), "asks for [6]"),
        ("gram_factor", factor[:, :4], "asks for [3, 6]"),
        ("gram_factor", factor / 0, "NaN or Inf"),
    ):
        entry = dataclasses.replace(
            sound(0), gram=None, gram_factor=factor, gram_diagonal=torch.ones(IN)
        )
        bad = dataclasses.replace(entry, **{field: value})
        with pytest.raises(EutecticError, match=re.escape(said)):
            merge_matrices("iso_a", torch.randn(2, OUT, IN), statistics=[bad, sound(1)])
