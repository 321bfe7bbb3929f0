"""Model Stock: how far from the base the mean of few fine-tunes should lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods.inner_products import inner_products, row_products
from eutectic.methods.linear import mean_of_deltas, zero_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register

SINGULAR = 1e-6  # a denominator below this has no estimate: the base is kept


@dataclass(frozen=True, kw_only=True)
class ModelStockParameters(Parameters):
    """Parameters of `model_stock`.

    Attributes:
        filter_wise: one ratio for each row instead of one for the tensor.
        negligible: products of two deltas' norms count as no smaller than this.
    """

    filter_wise: bool = False
    negligible: Annotated[float, Ge(0)] = 0.0


def _gram(chunks: Chunks, parameters: ModelStockParameters, context: Context) -> Tensor | None:
    return None if parameters.filter_wise else inner_products(chunks)


@register(
    "model_stock",
    summary="Mean of the deltas, shrunk by the angle between them.",
    paper="Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522",
    parameters=ModelStockParameters,
    laws={"permutation", "homogeneous", "zero", "copies", "absent", "rotation"},
    takes=Takes(elementwise=True, rows=True, experts=(2, None)),
    rules=Rules(check=zero_sum, prepare=_gram, prepares=lambda p: not p.filter_wise, spans=True),
)
def model_stock(deltas: Tensor, parameters: ModelStockParameters, context: Context) -> Tensor:
    """Return t · Σ w_t Δ_t / Σ w_t with t = N cos θ / (1 + (N − 1) cos θ).

    cos θ is the mean cosine between two experts' deltas, over the tensor or over each row; pairs
    count by the product of their weights, and N = (Σ w_t)² / Σ w_t² is the number of experts at
    equal weights. Pairs with a zero delta count as orthogonal. Where |1 + (N − 1) cos θ| < 1e-6
    there is no estimate, and the base is kept. Rows are those of the last dimension as the file
    lays it out; a vector is one row.

    Shapes: `[T, *shape]` -> `[*shape]`, T ≥ 2. Cost: two passes; one if `filter_wise`. Copies of
    one delta give it; orthogonal or zero deltas give zero; rank plays no part.

    Raises:
        MethodError: the weights sum to zero.

    Deviations from the source: the weights, and more than two experts, for which the paper's
    equal angles are replaced by their mean, as in mergekit.
    """
    if fault := zero_sum(parameters, context.weights):
        raise MethodError(fault)
    flat = deltas.flatten(1)
    width = context.row_width
    rows = flat.view(len(flat), -1, width)
    gram: Tensor | None = context.state
    if gram is None:
        ratio = _ratio(row_products(rows), context.weights, parameters.negligible).unsqueeze(-1)
    else:
        ratio = _ratio(gram, context.weights, parameters.negligible)
    merged = mean_of_deltas(rows, context) * ratio.to(flat.dtype).to(flat.device)
    return merged.reshape(deltas.shape[1:])


def _ratio(gram: Tensor, weights: Sequence[float], negligible: float) -> Tensor:
    """Return t `[…]` from inner products `[…, T, T]`."""
    w = torch.tensor(weights, dtype=gram.dtype, device=gram.device)
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    products = (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp_min(negligible)
    cosines = torch.where(products > 0, gram / products.clamp_min(1e-300), 0).clamp(-1, 1)
    pairs = torch.triu(torch.outer(w, w), diagonal=1)
    shared = pairs.sum()
    # One expert of weight alone is its own stock.
    cosine = (cosines * pairs).sum((-2, -1)) / shared if shared != 0 else cosines.new_ones(())
    count = w.sum() ** 2 / w.square().sum()
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < SINGULAR
    return torch.where(singular, 0, count * cosine / torch.where(singular, 1, denominator))
