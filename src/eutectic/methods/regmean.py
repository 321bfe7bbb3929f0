"""Closed forms of matching: RegMean and Fisher merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import Tensor

from eutectic.methods.collected import participants
from eutectic.methods.operators import FISHER_FLOOR, build_system, fisher_weighted
from eutectic.methods.registry import Context, Parameters, register
from eutectic.methods.solving import (
    Unknown,
    averaged,
    closed_form,
    offset_of,
    reason_to_rest,
)
from eutectic.types import Merged


@dataclass(frozen=True, kw_only=True)
class RegMeanParameters(Parameters):
    """Parameters of `regmean`.

    Attributes:
        off_diagonal: λ, by which the Grams' off-diagonal entries are multiplied.
        ridge: added to the diagonal of the summed Gram, relative to its mean; raised where the
            sum is singular to rounding.
        space: solve for the delta, or for the weight as published.
        normalize_counts: divide each expert's Gram by its token count.
    """

    off_diagonal: Annotated[float, Ge(0), Le(1)] = 0.9
    ridge: Annotated[float, Ge(0)] = 0.0
    space: Unknown = "delta"
    normalize_counts: bool = True


@register(
    "regmean",
    family="matching",
    summary="The weights whose outputs are nearest to every expert's, on its own inputs.",
    paper="Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849",
    parameters=RegMeanParameters,
    vectors=True,
    needs=lambda p: {"gram"} if p.space == "delta" else {"gram", "base"},
    fallback="regmean",
    workspace=4.0,
    products=4.0,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent"},
)
def regmean(deltas: Tensor, parameters: RegMeanParameters, context: Context) -> Merged:
    """Return (Σ w_tΔ_tA_t)(Σ w_tA_t)⁻¹, with A_t the expert's input Gram.

    A_t is divided by the expert's token count n_t and its off-diagonal entries are multiplied by
    λ. Everything is float64; the inverse is a Cholesky solve.

    Shapes: deltas `[T, out, in]` -> `[out, in]`. Cost: T products `[out, in]·[in, in]`, in³/3 for
    the factor, one solve as dear as a product. T = 1 gives the expert, zero deltas give zero.

    Rank deficiency: where Σ A_t is singular to rounding, a ridge is raised until the factor is
    sound; directions that no expert's data excite then keep the base's weights
    (`space="delta"`), or shrink to zero (`space="weight"`, as published). At full rank and without
    a ridge both spaces have the same solution. The record tells `ridge`, `ridge_escalated` and
    `dead_inputs`. A tensor that lacks a Gram for one expert (none collected, no token seen, a
    vector) is averaged, as officially done, and the record tells `rest` and `reason`. Experts of
    weight 0 need no statistics.

    Deviations from the source: it solves for the weight, in float32, and has no ridge. It divides
    Grams by token counts while collecting; here the sums are divided at the time of merging.
    `normalize_counts=False` weighs experts by their tokens instead.

    Raises:
        MethodError: Gram of another shape, nonzero Gram with count 0, negative weights, no base
            with `space="weight"`.
        NumericalError: NaN or Inf in a Gram, or a sum that is not positive semidefinite.

    Reference: Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849;
    off-diagonal scaling as in arXiv 2312.04339.
    """
    participants(context)
    reason = reason_to_rest("gram", deltas, context, parameters.normalize_counts)
    if reason is not None:
        return averaged(deltas, context, reason)
    system = build_system(
        "gram",
        deltas.double(),
        context,
        off_diagonal=parameters.off_diagonal,
        normalize_counts=parameters.normalize_counts,
        dense=True,
    )
    if not bool(system.diagonal.any()):
        return averaged(deltas, context, "every Gram is zero")
    offset = offset_of(parameters.space, system.right_side, context)
    delta, record = closed_form(system, offset, parameters.ridge)
    return Merged(delta.to(deltas), record)


@dataclass(frozen=True, kw_only=True)
class FisherParameters(Parameters):
    """Parameters of `fisher`.

    Attributes:
        floor: least value of a Fisher entry, after division by the count.
        normalize_counts: divide each expert's Fisher by its number of examples.
    """

    floor: Annotated[float, Gt(0)] = FISHER_FLOOR
    normalize_counts: bool = True


@register(
    "fisher",
    family="matching",
    summary="Mean of the experts, each entry weighted by its diagonal Fisher information.",
    paper="Merging models with Fisher-weighted averaging, arXiv 2111.09832",
    parameters=FisherParameters,
    vectors=True,
    needs={"fisher_diagonal"},
    fallback="fisher",
    workspace=4.0,
    products=0.5,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent"},
)
def fisher(deltas: Tensor, parameters: FisherParameters, context: Context) -> Merged:
    """Return Σ w_tF_t ⊙ Δ_t / Σ w_tF_t, with F_t the expert's diagonal Fisher, floored.

    Shapes: deltas `[T, *shape]`, any shape -> `[*shape]`. Arithmetic in float64. Cost: one pass.
    T = 1 gives the expert; zero deltas give zero; entries whose Fisher is below the floor in
    every expert are averaged, so rank plays no part; rows of a table that one expert alone saw
    are that expert's. F_t is divided by the expert's examples (samples, or tokens, where those were
    not counted). A tensor that lacks a Fisher for one expert is averaged, as officially done; the
    record tells `rest` and `reason`.

    Raises:
        MethodError: Fisher of another shape, nonzero Fisher with count 0, negative weights.
        NumericalError: NaN or Inf in a Fisher.

    Reference: Merging models with Fisher-weighted averaging, arXiv 2111.09832.
    """
    participants(context)
    reason = reason_to_rest("diagonal_fisher", deltas, context, parameters.normalize_counts)
    if reason is not None:
        return averaged(deltas, context, reason)
    total, mass = fisher_weighted(
        deltas, context, floor=parameters.floor, normalize_counts=parameters.normalize_counts
    )
    return Merged((total / mass).to(deltas))
