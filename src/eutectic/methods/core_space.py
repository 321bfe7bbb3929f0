"""Element-wise merges in bases of what the experts share: core space and KnOTS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.core import singular_core
from eutectic.linalg.lowrank import LowRankStack
from eutectic.linalg.svd import default_tolerance
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context, Cost, Parameters, Takes, get_method, register
from eutectic.methods.sparsify import DareParameters, DareTiesParameters
from eutectic.methods.ties import Aggregate, TiesParameters

CORE_PAPER = "Accurate and efficient low-rank model merging in core space, arXiv 2509.17786"
KNOTS_PAPER = "Model merging with SVD to tie the KnOTS, arXiv 2410.19735"
COST = Cost(workspace=lambda count: 4.0, products=8.0)
SPARSE = Takes(factors=True, per_expert={"density"})

Deltas = Tensor | LowRankStack


@dataclass(frozen=True, kw_only=True)
class TiesInBasisParameters(Parameters):
    """Parameters of `core_ties` and `knots_ties`.

    Attributes:
        density: fraction of entries kept per expert.
        aggregate: mean or sum of the entries that agree with the elected sign.
    """

    density: Annotated[float, Ge(0), Le(1)] = 0.2
    aggregate: Aggregate = "mean"

    def inner(self) -> TiesParameters:
        """Return them as `ties` takes them."""
        return TiesParameters(density=self.density, aggregate=self.aggregate)


@register(
    "core_ties",
    summary="TIES on the small matrices between bases that all adapters share.",
    paper=CORE_PAPER,
    parameters=TiesInBasisParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=SPARSE,
    cost=COST,
)
def core_ties(deltas: Deltas, parameters: TiesInBasisParameters, context: Context) -> Tensor:
    """Return U·TIES(UᵀΔ_1V, …, UᵀΔ_TV)·Vᵀ.

    U `[out, m]` are the left singular vectors of [Δ_1 … Δ_T] side by side, V `[in, n]` the right
    ones of the same one above the other; m and n are at most Σ rank Δ_t, and nothing is lost by
    going there. Trimming and election happen on the m·n entries of the core: see `ties`.

    Shapes: `[T, out, in]` -> `[out, in]`, in float64. Cost: with thin factors two thin QR
    decompositions and SVDs of side Σ r_t; of dense deltas those of `[out, T·in]` and `[in, T·out]`.
    At T = 1 the trimmed core of the expert: the larger of its singular directions, not its larger
    entries. Zero deltas give zero. Directions below eps · max(out, in) of the first are left out.
    Singular values that are equal leave the axes, and so what is trimmed, undetermined.

    Deviations from the source: the bases are those of the products, where the source takes the
    singular vectors of the stacked B and of the stacked A. Ours do not change when an adapter is
    written with other factors (B·R and R⁻¹·A), and exist for dense deltas. The subspaces are the
    same. Weights.

    Reference: Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786.
    """
    return _in_core("ties", parameters.inner(), deltas, context)


@register(
    "core_dare_linear",
    summary="DARE on the small matrices between bases that all adapters share.",
    paper=CORE_PAPER,
    parameters=DareParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=SPARSE,
    cost=COST,
)
def core_dare_linear(deltas: Deltas, parameters: DareParameters, context: Context) -> Tensor:
    """Return U·DARE(UᵀΔ_1V, …, UᵀΔ_TV)·Vᵀ, added up; bases, shapes and cost as in `core_ties`.

    Entries of the core are dropped at random and the others rescaled: see `dare_linear`. At
    density 1 it is task arithmetic; zero deltas give zero.

    Reference: Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786.
    """
    return _in_core("dare_linear", parameters, deltas, context)


@register(
    "core_dare_ties",
    summary="DARE and the consensus of TIES on the small matrices between shared bases.",
    paper=CORE_PAPER,
    parameters=DareTiesParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=SPARSE,
    cost=COST,
)
def core_dare_ties(deltas: Deltas, parameters: DareTiesParameters, context: Context) -> Tensor:
    """Return U·DARE-TIES(UᵀΔ_1V, …, UᵀΔ_TV)·Vᵀ; bases, shapes and cost as in `core_ties`.

    Entries of the core are dropped at random, the others rescaled and merged by sign consensus: see
    `dare_ties`. Zero deltas give zero.

    Reference: Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786.
    """
    return _in_core("dare_ties", parameters, deltas, context)


@register(
    "knots_ties",
    summary="TIES on the experts' rows in one basis of all their outputs.",
    paper=KNOTS_PAPER,
    parameters=TiesInBasisParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=SPARSE,
    cost=COST,
)
def knots_ties(deltas: Deltas, parameters: TiesInBasisParameters, context: Context) -> Tensor:
    """Return U·TIES(S V_1ᵀ, …, S V_Tᵀ), where [Δ_1 … Δ_T] = U S [V_1ᵀ … V_Tᵀ].

    The task matrices stand side by side, so U `[out, k]` is one basis for all, k at most Σ rank
    Δ_t, and S V_tᵀ = UᵀΔ_t `[k, in]` are what each expert does in it. Trimming and election happen
    on these k·in entries: see `ties`. On the bare V_t, without S, all directions would count alike.

    Shapes: `[T, out, in]` -> `[out, in]`, in float64. Cost: with thin factors two thin QR
    decompositions, an SVD of side Σ r_t, and passes over `[T, Σ r_t, in]`. At T = 1 the trimmed
    rows S Vᵀ; zero deltas give zero. Directions below eps · max(out, in) of the first are left
    out; the source cuts at 1e-5, whatever the size of the deltas.

    Deviations from the source: that bound; `ties` keeps its own count of entries (see there).

    Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
    """
    return _side_by_side("ties", parameters.inner(), deltas, context)


@register(
    "knots_linear",
    summary="Task arithmetic by way of one basis of all outputs: the same as task arithmetic.",
    paper=KNOTS_PAPER,
    laws={"permutation", "homogeneous", "zero", "single", "absent", "rotation"},
    takes=Takes(factors=True),
    cost=COST,
)
def knots_linear(deltas: Deltas, parameters: Parameters, context: Context) -> Tensor:
    """Return U Σ w_t S V_tᵀ, which is Σ w_tΔ_t: the basis of `knots_ties` changes no sum.

    For comparison with the other forms; `task_arithmetic` is the same at a fraction of the cost.

    Shapes: `[T, out, in]` -> `[out, in]`. Cost as in `knots_ties`. At T = 1 the expert; zero
    deltas give zero.

    Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
    """
    return _side_by_side("task_arithmetic", parameters, deltas, context)


@register(
    "knots_dare_linear",
    summary="DARE on the experts' rows in one basis of all their outputs.",
    paper=KNOTS_PAPER,
    parameters=DareParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=SPARSE,
    cost=COST,
)
def knots_dare_linear(deltas: Deltas, parameters: DareParameters, context: Context) -> Tensor:
    """Return U·DARE(S V_1ᵀ, …, S V_Tᵀ), added up; basis, shapes and cost as in `knots_ties`.

    At density 1 it is task arithmetic; zero deltas give zero. See `dare_linear`.

    Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
    """
    return _side_by_side("dare_linear", parameters, deltas, context)


@register(
    "knots_dare_ties",
    summary="DARE and the consensus of TIES on the experts' rows in one basis of all outputs.",
    paper=KNOTS_PAPER,
    parameters=DareTiesParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=SPARSE,
    cost=COST,
)
def knots_dare_ties(deltas: Deltas, parameters: DareTiesParameters, context: Context) -> Tensor:
    """Return U·DARE-TIES(S V_1ᵀ, …, S V_Tᵀ); basis, shapes and cost as in `knots_ties`.

    Zero deltas give zero. See `dare_ties`.

    Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
    """
    return _side_by_side("dare_ties", parameters, deltas, context)


def _in_core(inner: str, parameters: Any, deltas: Deltas, context: Context) -> Tensor:
    """Merge UᵀΔ_tV by an element-wise method."""
    space = singular_core(deltas, _members(context), _tolerance(deltas))
    core = _merged(inner, parameters, space.cores, context)
    return space.expand(core).dense().to(deltas.dtype)


def _side_by_side(inner: str, parameters: Any, deltas: Deltas, context: Context) -> Tensor:
    """Merge UᵀΔ_t by an element-wise method."""
    space = singular_core(deltas, _members(context), _tolerance(deltas))
    rows = _merged(inner, parameters, space.cores @ space.right.mT, context)
    return (space.left @ rows).to(deltas.dtype)


def _members(context: Context) -> list[int]:
    """Return the experts whose directions are looked at: a weight of 0 is as good as absent."""
    return [t for t, weight in enumerate(context.weights) if weight]


def _tolerance(deltas: Deltas) -> float:
    return default_tolerance(deltas.dtype, deltas.shape[1:])


def _merged(inner: str, parameters: Any, inputs: Tensor, context: Context) -> Tensor:
    alone = replace(context, base=None, statistics=None, initial=None, state=None)
    return run_method(get_method(inner), inputs, parameters, alone).delta
