"""Two models: the base, and one expert that is let in where it is near, or where it matters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from eutectic.linalg.select import order_statistics
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, always, register

EPS = 1e-8  # added to probabilities, as mergekit does


@dataclass(frozen=True, kw_only=True)
class NearswapParameters(Parameters):
    """Parameters of `nearswap`.

    Attributes:
        t: the largest change of an entry.
    """

    t: Annotated[float, Ge(0)] = 1e-4


@register(
    "nearswap",
    summary="One expert's delta, each entry cut to a largest change: near entries are swapped.",
    paper="QuartetAnemoi-70B-t0.0001, huggingface.co/alchemonaut",
    parameters=NearswapParameters,
    laws={"permutation", "zero"},
    takes=Takes(elementwise=True, experts=(1, 1)),
)
def nearswap(deltas: Tensor, parameters: NearswapParameters, context: Context) -> Tensor:
    """Return w_1 · max(−t, min(t, Δ_1)).

    That is t/|Δ_1| of the way to the expert, and all of it where the two are nearer than t.

    Shapes: `[1, *shape]` -> `[*shape]`. Cost: one pass. Zero deltas give zero.
    """
    return deltas[0].clamp(-parameters.t, parameters.t) * context.weights[0]


def _importance(inputs: Tensor, context: Context) -> Tensor:
    """Return |W_1 − W₀| · KL(softmax(W_1) ‖ softmax(W₀)) row by row, from W₀, W_1 `[2, n]`."""
    base, weight = (x.reshape(-1, context.row_width) for x in inputs)
    p, q = weight.softmax(-1) + EPS, base.softmax(-1) + EPS
    # Gibbs' inequality holds with the constant in both; rounding alone makes it negative.
    divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp_min(0)
    return ((weight - base).abs() * divergence).flatten()


def _threshold(chunks: Chunks, parameters: Parameters, context: Context) -> float:
    """Return the median of the importances plus 1.5 times their interquartile range."""

    def importances() -> Iterator[Tensor]:
        return (_importance(c, context).unsqueeze(0) for c in chunks())

    def ranks(n: int) -> list[list[int]]:
        return [[n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]]

    found = order_statistics(importances, ranks)
    if not found.numel():
        return 0.0
    first, median, third = found[0]
    return float(median + 1.5 * (third - first))


@register(
    "arcee_fusion",
    summary="One expert's delta where it matters most: size times divergence of its row.",
    paper="Arcee's MergeKit: a toolkit for merging large language models, arXiv 2403.13257",
    laws={"permutation", "zero"},
    takes=Takes(
        elementwise=True,
        rows=True,
        space=always("weight"),
        experts=(1, 1),
        needs=always(frozenset({"base"})),
    ),
    rules=Rules(prepare=_threshold),
)
def arcee_fusion(inputs: Tensor, parameters: Parameters, context: Context) -> Tensor:
    """Return W₀ + w_1 · m ⊙ Δ_1, m keeping entries whose importance is far above the median's.

    The importance of an entry is |Δ_1| times the Kullback-Leibler divergence between the softmax
    of its row in the expert and in the base; kept is what reaches the median plus 1.5 times the
    interquartile range, over the tensor. Rows are those of the last dimension as the file lays it
    out; a vector is one row.

    Shapes: `[2, *shape]`, W₀ before W_1, -> `[*shape]`. Cost: three passes. Zero deltas give zero.

    Deviations from the source: quartiles are exact (mergekit samples a million entries of larger
    tensors, at random).
    """
    kept = _importance(inputs, context) >= context.state
    base, weight = inputs
    kept = kept.view(base.shape)
    return base + torch.where(kept, weight - base, 0) * context.weights[0]
