"""Element-wise merges in bases of what the experts share: core space and KnOTS."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.core import singular_core
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.svd import default_tolerance
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import (
    Context,
    Cost,
    Parameters,
    Rules,
    Takes,
    get_method,
    register,
)
from eutectic.methods.sparsify import DareParameters, DareTiesParameters
from eutectic.methods.ties import Aggregate, TiesParameters

CORE_PAPER = "Accurate and efficient low-rank model merging in core space, arXiv 2509.17786"
KNOTS_PAPER = "Model merging with SVD to tie the KnOTS, arXiv 2410.19735"
COST = Cost(workspace=lambda count: 4.0, products=8.0)
SPARSE_INNER = ("ties", "dare_linear", "dare_ties")
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


@dataclass(frozen=True)
class _Form:
    """An element-wise method in a basis: a row of the table below."""

    name: str
    basis: Literal["core", "side by side"]  # of both sides, or of all outputs
    inner: str  # the method that merges there
    parameters: type[Parameters]
    summary: str
    description: str  # what its docstring would say
    takes: Takes = SPARSE
    further_laws: Set[str] = field(default_factory=frozenset[str])


_FORMS = (
    _Form(
        "core_ties",
        "core",
        "ties",
        TiesInBasisParameters,
        "TIES on the small matrices between bases that all adapters share.",
        """Return U·TIES(UᵀΔ_1V, …, UᵀΔ_TV)·Vᵀ.

U `[out, m]` are the left singular vectors of [Δ_1 … Δ_T] side by side, V `[in, n]` the right
ones of the same one above the other; m and n are at most Σ rank Δ_t, and nothing is lost by
going there. Trimming and election happen on the m·n entries of the core: see `ties`.

Shapes: `[T, out, in]` -> `[out, in]`, in float64. Cost: with thin factors two thin QR
decompositions and SVDs of side Σ r_t; of dense deltas those of `[out, T·in]` and `[in, T·out]`.
At T = 1 the trimmed core of the expert: the larger of its singular directions, not its larger
entries. Zero deltas give zero. Directions below eps · min(max(out, in), 128) are out.
Singular values that are equal leave the axes, and so what is trimmed, undetermined.

Deviations from the source: the bases are those of the products, where the source takes the
singular vectors of the stacked B and of the stacked A. Ours do not change when an adapter is
written with other factors (B·R and R⁻¹·A), and exist for dense deltas. The subspaces are the
same. Weights.

Reference: Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786.
""",
        further_laws=frozenset({"rotation"}),
    ),
    _Form(
        "core_dare_linear",
        "core",
        "dare_linear",
        DareParameters,
        "DARE on the small matrices between bases that all adapters share.",
        """Return U·DARE(UᵀΔ_1V, …, UᵀΔ_TV)·Vᵀ, added up; bases, shapes and cost as in `core_ties`.

Entries of the core are dropped at random and the others rescaled: see `dare_linear`. At
density 1 it is task arithmetic; zero deltas give zero.

Reference: Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786.
""",
        further_laws=frozenset({"rotation"}),
    ),
    _Form(
        "core_dare_ties",
        "core",
        "dare_ties",
        DareTiesParameters,
        "DARE and the consensus of TIES on the small matrices between shared bases.",
        """Return U·DARE-TIES(UᵀΔ_1V, …, UᵀΔ_TV)·Vᵀ; bases, shapes and cost as in `core_ties`.

Entries of the core are dropped at random, the others rescaled and merged by sign consensus: see
`dare_ties`. Zero deltas give zero.

Reference: Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786.
""",
        further_laws=frozenset({"rotation"}),
    ),
    _Form(
        "knots_ties",
        "side by side",
        "ties",
        TiesInBasisParameters,
        "TIES on the experts' rows in one basis of all their outputs.",
        """Return U·TIES(S V_1ᵀ, …, S V_Tᵀ), where [Δ_1 … Δ_T] = U S [V_1ᵀ … V_Tᵀ].

The task matrices stand side by side, so U `[out, k]` is one basis for all, k at most Σ rank
Δ_t, and S V_tᵀ = UᵀΔ_t `[k, in]` are what each expert does in it. Trimming and election happen
on these k·in entries: see `ties`. On the bare V_t, without S, all directions would count alike.

Shapes: `[T, out, in]` -> `[out, in]`, in float64. Cost: with thin factors two thin QR
decompositions, an SVD of side Σ r_t, and passes over `[T, Σ r_t, in]`. At T = 1 the trimmed
rows S Vᵀ; zero deltas give zero. Directions below the default tolerance of the first are left
out; the source cuts at 1e-5, whatever the size of the deltas.

Deviations from the source: that bound; `ties` keeps its own count of entries (see there).

Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
""",
    ),
    _Form(
        "knots_linear",
        "side by side",
        "task_arithmetic",
        Parameters,
        "Task arithmetic by way of one basis of all outputs: the same as task arithmetic.",
        """Return U Σ w_t S V_tᵀ, which is Σ w_tΔ_t: the basis of `knots_ties` changes no sum.

For comparison with the other forms; `task_arithmetic` is the same at a fraction of the cost.

Shapes: `[T, out, in]` -> `[out, in]`. Cost as in `knots_ties`. At T = 1 the expert; zero
deltas give zero.

Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
""",
        takes=Takes(factors=True),
        further_laws=frozenset({"single", "rotation"}),
    ),
    _Form(
        "knots_dare_linear",
        "side by side",
        "dare_linear",
        DareParameters,
        "DARE on the experts' rows in one basis of all their outputs.",
        """Return U·DARE(S V_1ᵀ, …, S V_Tᵀ), added up; basis, shapes and cost as in `knots_ties`.

At density 1 it is task arithmetic; zero deltas give zero. See `dare_linear`.

Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
""",
    ),
    _Form(
        "knots_dare_ties",
        "side by side",
        "dare_ties",
        DareTiesParameters,
        "DARE and the consensus of TIES on the experts' rows in one basis of all outputs.",
        """Return U·DARE-TIES(S V_1ᵀ, …, S V_Tᵀ); basis, shapes and cost as in `knots_ties`.

Zero deltas give zero. See `dare_ties`.

Reference: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.
""",
    ),
)


def most_entries(method: str, shape: tuple[int, int], rank: int) -> int | None:
    """Return how many entries a form trims of a layer `[out, in]` at most; None of other methods.

    `rank` is how many directions all experts have together, Σ r_t: [Σ r_t, Σ r_t] in the core,
    `[Σ r_t, in]` side by side, cut to what the layer has.
    """
    form = next((own for own in _FORMS if own.name == method and own.inner in SPARSE_INNER), None)
    if form is None:
        return None
    out, inner = shape
    return min(out, rank) * (min(inner, rank) if form.basis == "core" else inner)


def _enter(form: _Form) -> None:
    """Register a row of the table."""

    def thin(deltas: Deltas, parameters: Any, context: Context) -> LowRank:
        own = parameters.inner() if isinstance(parameters, TiesInBasisParameters) else parameters
        members = [t for t, weight in enumerate(context.weights) if weight]  # 0: as good as absent
        tolerance = default_tolerance(deltas.dtype, deltas.shape[1:])
        space = singular_core(deltas, members, tolerance)
        if form.basis == "core":
            return space.expand(_merged(form.inner, own, space.cores, context))
        rows = _merged(form.inner, own, space.cores @ space.right.mT, context)
        return LowRank(space.left, rows)

    def merge(deltas: Deltas, parameters: Any, context: Context) -> Tensor:
        return thin(deltas, parameters, context).dense().to(deltas.dtype)

    merge.__name__ = merge.__qualname__ = form.name
    merge.__doc__ = form.description
    register(
        form.name,
        summary=form.summary,
        paper=CORE_PAPER if form.basis == "core" else KNOTS_PAPER,
        parameters=form.parameters,
        laws={"permutation", "homogeneous", "zero", "absent", *form.further_laws},
        takes=form.takes,
        cost=COST,
        rules=Rules(thin=thin, shares_rows=partial(_shares_rows, form)),
    )(merge)


def _shares_rows(form: _Form, parameters: Any) -> bool:
    """Tell whether a merge keeps the span of the experts' rows.

    Entries that are trimmed, or elected by their signs, in coordinates of the inputs leave it;
    DARE that drops nothing adds rows up.
    """
    if form.basis == "core" or form.inner not in SPARSE_INNER:
        return True
    return form.inner == "dare_linear" and parameters.density == 1


def _merged(inner: str, parameters: Any, inputs: Tensor, context: Context) -> Tensor:
    alone = replace(context, base=None, statistics=None, initial=None, state=None)
    return run_method(get_method(inner), inputs, parameters, alone).delta


for _form in _FORMS:
    _enter(_form)
