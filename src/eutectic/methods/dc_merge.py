"""DC-Merge: the experts' leading parts, merged in directions that cover all of them."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from eutectic.linalg.leading import leading_singular_stack
from eutectic.linalg.polar import polar
from eutectic.linalg.select import magnitude_thresholds
from eutectic.linalg.svd import Triplets, default_tolerance, dependence_tolerance
from eutectic.methods.registry import Context, Cost, Parameters, Rules, register
from eutectic.methods.singular import kept_per_expert
from eutectic.methods.ties import disjoint_merge, signed_votes, trim

Smoothing = Literal["none", "mean", "linear"]


@dataclass(frozen=True, kw_only=True)
class DcMergeParameters(Parameters):
    """Parameters of `dc_merge`.

    Attributes:
        rank_fraction: share of the min(out, in) triplets kept of each expert; None: 1/T.
        smoothing: of each expert's kept singular values, their sum unchanged: "none", all equal
            to their "mean", or "linear" in their rank. The source smooths for LoRA experts.
        density: share of each core's entries that is kept.
    """

    rank_fraction: Annotated[float, Gt(0), Le(1)] | None = None
    smoothing: Smoothing = "none"
    density: Annotated[float, Ge(0), Le(1)] = 0.1


@register(
    "dc_merge",
    summary="Experts' leading parts in common directions, merged by TIES there.",
    paper="DC-Merge: improving model merging with directional consistency, arXiv 2603.06242",
    parameters=DcMergeParameters,
    laws={"permutation", "homogeneous", "zero", "rotation"},
    cost=Cost(workspace=lambda count: 1.5 + 40 / count),
    rules=Rules(spans=True),
)
def dc_merge(deltas: Tensor, parameters: DcMergeParameters, context: Context) -> Tensor:
    """Return Ū·(mask ⊙ TIES of the cores Ūᵀ·w_tΔ_t·V̄)·V̄ᵀ.

    Of every w_tΔ_t the first k = int(r/T) triplets U_t, S_t, V_t are kept, r = min(out, in), their
    values smoothed if asked for. Ū = polar([U_1 … U_T]) `[out, kT]` and V̄ cover all of them. Of
    each core `[kT, kT]` the int(density·k²T²) largest stay, at least k; they are merged by sign as
    in `ties`; and outside the T diagonal blocks of side k the result is zero.

    Shapes: `[T, out, in]` -> `[out, in]`. Cost: T partial eigenproblems of side r, two polar
    factors and T products through the cores. At T = 1 the expert, without the smallest entries of
    its core; zero deltas give zero; with more than r experts none has a triplet and the result is
    zero. Rank deficiency: triplets that are zero up to rounding are left out, directions that
    several experts share count once, as in `tsv_m`. Thin factors are expanded:
    at the threshold of `density` an entry more or less depends on rounding.

    Deviations from the source: the above; weights.

    Reference: "DC-Merge: Improving Model Merging with Directional Consistency", arXiv 2603.06242.
    """
    deltas = context.weigh(deltas)
    context = replace(context, weights=(1.0,) * len(deltas))
    kept = kept_per_expert(min(deltas.shape[1:]), parameters.rank_fraction, len(deltas))
    experts = leading_singular_stack(
        deltas,
        kept,
        tolerance=default_tolerance(deltas.dtype, deltas.shape[1:]),
        seed=context.seed_for("experts"),
        precision=context.precision,
    )
    how: dict[str, Any] = {
        "support": "numerical",
        "rank_tolerance": dependence_tolerance(deltas.dtype),
        "precision": context.precision,
    }
    U = polar(torch.cat([e.U for e in experts], 1).to(deltas.dtype), **how).factor
    V = polar(torch.cat([e.V for e in experts], 1).to(deltas.dtype), **how).factor
    cores = torch.stack([_core(e, U, V, parameters.smoothing) for e in experts])
    if not cores.numel():
        return torch.zeros_like(deltas[0])
    # Orthogonal experts have nothing in each other's blocks: rounding there must not get a vote.
    noise = dependence_tolerance(deltas.dtype) * cores.abs().amax((1, 2), keepdim=True)
    flat = torch.where(cores.abs() > noise, cores, 0).flatten(1)
    trimmed = trim(flat, magnitude_thresholds(lambda: iter([flat]), parameters.density, kept))
    votes = signed_votes(trimmed, context)
    merged = disjoint_merge(trimmed, context, float((votes > 0) - (votes < 0)), "mean")
    sizes = [e.U.shape[1] for e in experts]
    blocks = torch.block_diag(*[torch.ones(k, k) for k in sizes]).to(merged)
    return U @ (merged.view_as(cores[0]) * blocks) @ V.mT


def _core(expert: Triplets, U: Tensor, V: Tensor, smoothing: Smoothing) -> Tensor:
    values = expert.S.to(U)
    if smoothing == "mean" and len(values):
        values = values.mean().expand_as(values)
    elif smoothing == "linear" and len(values):
        ramp = torch.arange(len(values), 0, -1).to(values)
        values = ramp * (values.sum() / ramp.sum())
    return (U.mT @ expert.U.to(U) * values) @ (expert.V.to(V).mT @ V)
