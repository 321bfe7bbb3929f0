"""Isotropic merging: a flat spectrum on the subspace that the experts share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from eutectic.linalg.core import THIN, THIN_SUM, core_space, stays_thin
from eutectic.linalg.gram import explain_routes
from eutectic.linalg.leading import explain_leading, leading_singular, leading_singular_stack
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.metric import Metric, is_wide, mean_metric
from eutectic.linalg.polar import Precision, Support, explain_polar, polar
from eutectic.linalg.svd import default_tolerance, dependence_tolerance
from eutectic.linalg.wide_metric import positive_degree
from eutectic.methods.core_metrics import in_core, times, with_factors
from eutectic.methods.input_metrics import input_metric
from eutectic.methods.linear import weighted_sum
from eutectic.methods.registry import Context, Cost, Parameters, Rules, Takes, always, register

METRIC_RANK, METRIC_DEGREE = 64, 6  # measured: docs/methods/iso_a.md
PAPER = "No task left behind: isotropic model merging, arXiv 2502.04959"


@dataclass(frozen=True, kw_only=True)
class IsoCParameters(Parameters):
    """Parameters of `iso_c`.

    Attributes:
        support: "numerical" flattens the singular values above `rank_tolerance`; "full" all.
        rank_tolerance: fraction of the largest singular value; None: eps · min(max(out, in), 128).
    """

    support: Support = "numerical"
    rank_tolerance: Annotated[float, Ge(0), Lt(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class IsoCtsParameters(IsoCParameters):
    """Parameters of `iso_cts`.

    Attributes:
        support: as in `iso_c`.
        rank_tolerance: as in `iso_c`.
        common_fraction: f, the share of the spectrum given to the common subspace.
    """

    common_fraction: Annotated[float, Gt(0), Le(1)] = 0.8


@dataclass(frozen=True, kw_only=True)
class IsoAParameters(IsoCParameters):
    """Parameters of `iso_a`.

    Attributes:
        support: as in `iso_c`.
        rank_tolerance: as in `iso_c`.
        ridge: ε, the share of the mean input energy added to every input direction.
        metric_rank: k, the leading directions of a wide input metric (`in` from 512 and from 4k on)
            that its powers are exact on; "full" takes an eigenproblem of side `in` in their place.
        metric_degree: of the polynomial that stands for the inverse root on the rest of the
            spectrum, and a third of it for the roots, which are smoother; 0 takes the rest as even,
            at its mean.
    """

    ridge: Annotated[float, Gt(0)] = 0.1
    metric_rank: Annotated[int, Ge(1)] | Literal["full"] = METRIC_RANK
    metric_degree: Annotated[int, Ge(0), Le(64)] = METRIC_DEGREE

    def powers(self, precision: Precision) -> tuple[int, int] | None:
        """Return rank and degree that powers of wide metrics are made of; None for neither."""
        if self.metric_rank == "full" or precision == "exact":
            return None
        return self.metric_rank, self.metric_degree


def _by_count(to_8: float, to_14: float, beyond: float) -> Callable[[int], float]:
    return lambda count: to_8 if count <= 8 else to_14 if count <= 14 else beyond


def _explain_iso_c(shape: tuple[int, ...], parameters: Any, precision: Precision) -> str:
    return explain_routes([explain_polar(shape[1:], precision=precision)], precision)


def _explain_iso_cts(
    shape: tuple[int, ...], parameters: IsoCtsParameters, precision: Precision
) -> str:
    experts, out, inner = shape
    rank = min(out, inner)
    c, k = split_spectrum(rank, parameters.common_fraction, experts)
    of_sum = rank if parameters.support == "numerical" else c
    parts: list[str] = []
    if of_sum:
        parts.append(f"sum: {explain_leading((out, inner), of_sum, precision)}")
    if k:
        parts.append(f"each expert: {explain_leading((out, inner), k, precision)}")
        parts.append(f"left: {explain_polar((out, k * experts), precision=precision)}")
    parts.append(f"right: {explain_polar((inner, rank), precision=precision)}")
    return explain_routes(parts, precision)


def _explain_iso_a(shape: tuple[int, ...], parameters: IsoAParameters, precision: Precision) -> str:
    experts, _, inner = shape
    how = parameters.powers(precision)
    roots = (
        f"roots of the {experts} input metrics and of their mean by {experts + 1} eigenproblems "
        f"of side {inner}, {'in float32 where that is sound' if how else 'in float64'}"
    )
    if how is not None and is_wide(inner, how[0]):
        roots = (
            f"roots of the {experts} input metrics and of their mean on {how[0]} of {inner} "
            f"directions in a Krylov space, on the rest by polynomials of degree "
            f"{positive_degree(how[1])} and {how[1]}"
        )
    return explain_routes([roots, explain_polar(shape[1:], precision=precision)], precision)


@register(
    "iso_c",
    summary="Sum of the task matrices with its spectrum made flat.",
    paper=PAPER,
    parameters=IsoCParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=Takes(factors=True),
    # 18 to 21 products in all, measured with 8 experts at sides of 768; memory with 4 at 1024 and
    # at 1024 × 3584, where it was 5.2 and 3.0 times the stack.
    cost=Cost(workspace=lambda count: 1.5 + 18 / count, squares=0.6, products=2.5),
    rules=Rules(
        default_scale=_by_count(1.3, 1.0, 0.9),
        explain=_explain_iso_c,
        thin=lambda deltas, parameters, context: thin_iso_c(deltas, parameters, context),
        flat_in="plain",
    ),
)
def iso_c(deltas: Tensor | LowRankStack, parameters: IsoCParameters, context: Context) -> Tensor:
    """Return mean(S)·U Vᵀ, where Σ w_tΔ_t = U S Vᵀ.

    Shapes: `[T, out, in]` -> `[out, in]`. Cost: one polar factor, whatever T is (see
    `eutectic.linalg.polar`). At T = 1 the expert with its spectrum made flat, not the expert
    itself; zero deltas give zero.

    Rank deficiency: with `support="numerical"` only singular values above `rank_tolerance`·S₁ are
    flattened, to the mean over *them*. So the nuclear norm of the sum is kept, as it is officially;
    a matrix bordered with zeros gives the same result bordered with zeros; and LoRA experts give
    the same through their thin factors as expanded. (The mean over all min(out, in) values would
    shrink a rank-96 sum in 384 dimensions fourfold.) `support="full"` is the official behaviour:
    null directions, which are arbitrary, get the mean too. Both agree at full rank.

    Thin factors: the polar factor of their sum is found in its core of side Σ r_t, in float64, and
    multiplied out once. The result is that of the expanded deltas up to their rounding, which in
    float32 moves it by 1e-7 over the smallest kept singular value, relative to S₁. They are
    expanded where that costs no more (Σ r_t above 0.9 min(out, in)), and where the null space is
    kept, which is rounding then: `support="full"`, or a `rank_tolerance` below the default.

    Deviations from the source: the numerical support; weights; the default tolerance for half
    precision is that of float32, since the sum is formed there.

    Reference: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and
    Task-Specific Subspaces", arXiv 2502.04959.
    """
    if isinstance(deltas, LowRankStack):
        thin = thin_iso_c(deltas, parameters, context)
        if thin is not None:
            return thin.dense()
        deltas = deltas.dense()
    flat = polar(weighted_sum(deltas, context), **_bounds(parameters, context))
    return flat.factor * flat.mean_singular_value


def thin_iso_c(
    deltas: LowRankStack, parameters: IsoCParameters, context: Context
) -> LowRank | None:
    """Return Iso-C of thin factors as thin factors, None where they have to be expanded."""
    if not keeps_factors(deltas, parameters, THIN_SUM):
        return None
    flat = polar(context.weigh(deltas).total(), **_bounds(parameters, context))
    return LowRank(flat.factor.left * flat.mean_singular_value, flat.factor.right)


def _bounds(parameters: IsoCParameters, context: Context) -> dict[str, Any]:
    return {
        "support": parameters.support,
        "rank_tolerance": parameters.rank_tolerance,
        "precision": context.precision,
    }


def keeps_factors(deltas: LowRankStack, parameters: IsoCParameters, share: float = THIN) -> bool:
    """Tell whether thin factors have the expanded deltas' result, and for less."""
    tolerance = parameters.rank_tolerance
    if parameters.support == "full" or not stays_thin(deltas, share=share):
        return False
    # A tighter bound keeps directions that only the rounding of the expanded sum has.
    return tolerance is None or tolerance >= default_tolerance(deltas.dtype, deltas.shape[1:])


@register(
    "iso_cts",
    summary="Iso-C on the common subspace, and a few directions of each task beside it.",
    paper=PAPER,
    parameters=IsoCtsParameters,
    laws={"permutation", "homogeneous", "zero", "rotation"},
    takes=Takes(factors=True),
    cost=Cost(workspace=lambda count: 1.5 + 28 / count, squares=0.6),  # 8.2 and 4.3 were measured
    rules=Rules(
        default_scale=_by_count(1.5, 1.2, 1.1),
        explain=_explain_iso_cts,
        thin=lambda deltas, parameters, context: thin_iso_cts(deltas, parameters, context),
        flat_in="plain",
    ),
)
def iso_cts(
    deltas: Tensor | LowRankStack, parameters: IsoCtsParameters, context: Context
) -> Tensor:
    """Return mean(s_*)·polar(U_*)·polar(V_*)ᵀ of the common and the task-specific directions.

    With r the rank, f the `common_fraction`, M = Σ w_tΔ_t = U S Vᵀ:

    1. k = round((r − int(r·f)) / T) directions per task, c = r − kT common ones.
    2. Common: U_c, S_c, V_c, the first c triplets of M.
    3. Tasks: the first k triplets of D_t = w_tΔ_t − U_cU_cᵀ w_tΔ_t.
    4. U_*, s_*, V_*: the task blocks and the common block side by side, made orthogonal.

    Shapes: `[T, out, in]` -> `[out, in]`. Cost: one full eigenproblem of side r, T partial ones,
    one polar factor. f = 1 and T = 1 give Iso-C; zero deltas give zero.

    Rank deficiency: with `support="numerical"` r is the numerical rank of M (officially
    min(out, in)), task directions that are zero up to rounding are left out, directions that
    several tasks share count once, and the mean is over those that remain; see `iso_c` for why.
    `support="full"` is the official behaviour. Both agree at full rank.

    Thin factors: the same in their core of side Σ r_t, in float64, multiplied out once. They are
    expanded where that costs no more (Σ r_t above ⅔ min(out, in)), and where `iso_c` keeps the null
    space.

    Deviations from the source: the numerical support; weights. Task and common blocks of U_* are
    orthogonal to each other by construction, so only the former need a polar factor.

    Reference: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and
    Task-Specific Subspaces", arXiv 2502.04959.
    """
    tolerance, dependence = kept_tolerance(deltas, parameters), dependence_tolerance(deltas.dtype)
    if isinstance(deltas, LowRankStack):
        thin = thin_iso_cts(deltas, parameters, context)
        if thin is not None:
            return thin.dense().to(deltas.dtype)
        deltas = deltas.dense()
    deltas = context.weigh(deltas)
    return _common_and_specific(deltas, parameters, context, tolerance, dependence)


def thin_iso_cts(
    deltas: LowRankStack, parameters: IsoCtsParameters, context: Context
) -> LowRank | None:
    """Return Iso-CTS of thin factors as thin factors, None where they have to be expanded."""
    if not keeps_factors(deltas, parameters):
        return None
    tolerance, dependence = kept_tolerance(deltas, parameters), dependence_tolerance(deltas.dtype)
    space = core_space(context.weigh(deltas))
    own = _common_and_specific(space.cores, parameters, context, tolerance, dependence)
    return space.expand(own)


def _common_and_specific(
    deltas: Tensor,
    parameters: IsoCtsParameters,
    context: Context,
    tolerance: float | None,
    dependence: float,
) -> Tensor:
    """Return the merge of weighted deltas; bounds are those of the expanded ones."""
    how: dict[str, Any] = {"tolerance": tolerance, "precision": context.precision}

    total, rank, f = deltas.sum(0), min(deltas.shape[1:]), parameters.common_fraction
    if tolerance is None:
        c, k = split_spectrum(rank, f, len(deltas))
        common = leading_singular(total, c, **how)
    else:
        supported = leading_singular(total, rank, **how)
        c, k = split_spectrum(len(supported.S), f, len(deltas))
        common = supported.first(c)
    tasks = leading_singular_stack(
        deltas, k, orthogonal_to=common.U, seed=context.seed_for("tasks"), **how
    )

    S = torch.cat([task.S for task in tasks] + [common.S])
    bound: dict[str, Any] = {
        "support": parameters.support,
        "rank_tolerance": dependence,
        "precision": context.precision,
    }
    task_U = _orthogonal([task.U for task in tasks], deltas.dtype, bound)
    U = torch.cat([task_U, common.U.to(deltas.dtype)], 1)
    V = _orthogonal([task.V for task in tasks] + [common.V], deltas.dtype, bound)
    return (U * float(S.mean() if len(S) else 0)) @ V.mT


def split_spectrum(rank: int, common_fraction: float, experts: int) -> tuple[int, int]:
    """Return c and k: how many common directions, and how many of each expert's own."""
    own = rank - int(rank * common_fraction)
    k = min(round(own / experts), rank // experts)
    return rank - k * experts, k


@register(
    "iso_a",
    summary="Iso-C in the metric of the experts' own inputs.",
    paper="This project; Iso-C is arXiv 2502.04959",
    parameters=IsoAParameters,
    laws={"permutation", "homogeneous", "zero", "rotation"},
    takes=Takes(factors=True, core_grams=True, needs=always({"gram"}), fallback=always("iso_c")),
    cost=Cost(
        workspace=lambda count: 1.5 + 28 / count,
        squares=0.2,
        keeps_rows=lambda p: p.metric_rank != "full",
    ),
    rules=Rules(
        default_scale=_by_count(1.3, 1.0, 0.9),
        explain=_explain_iso_a,
        thin=lambda deltas, parameters, context: thin_iso_a(deltas, parameters, context),
        flat_in="inputs",
    ),
)
def iso_a(deltas: Tensor | LowRankStack, parameters: IsoAParameters, context: Context) -> Tensor:
    """Return mean(S)·U Vᵀ·C̄^{-1/2}, where Σ w_tΔ_t C_t^{1/2} = U S Vᵀ.

    C_t = A_t/n_t + ε·tr(A_t/n_t)/in·I is the regularised second moment of the inputs that reach
    the layer in expert t, C̄ their mean: directions count by how much they shift the output. With
    C_t = I this is Iso-C.

    Roots: a C_t of fewer than 512, or 4k, inputs is decomposed whole, in float32 where its Gram is
    and its condition is at most 1e4, else in float64; so is a Gram in at most 1024 rows (few
    tokens, `collect --for`), in their number. Of wider ones the first k = `metric_rank` eigenpairs
    are found in a Krylov space; on the rest, whose spectrum is short once these are gone, C̄^{-1/2}
    is a fitted polynomial of degree `metric_degree` and C_t^{1/2}, which is smoother, one of a
    third of it, so that products with A_t are all there is: a stored factor of a Gram stays one.
    Measured against eigenproblems at 1536 inputs: Δ moves by 5 % at degree 6, 3 % at 9, which
    accuracy does not show (docs/methods/iso_a.md). `metric_rank="full"` and `precision="exact"`
    take eigenproblems in float64.

    Shapes: `[T, out, in]` and T Grams `[in, in]` -> `[out, in]`. Cost: beside one polar factor, for
    T + 1 metrics, 2.5k rows times a Gram for the leading directions, and `metric_degree` times, or
    a third of that, the output's rows, in the Grams' dtype; of whole metrics eigenproblems of side
    `in`. An expert without inputs (n_t = 0 or a zero Gram) enters with C_t = I. Zero deltas give
    zero; rank deficiency as in `iso_c`.

    Thin factors: with Grams of few rows all happens between bases of the factors and these rows,
    of side Σ r_t and Σ r_t + Σ k_t, in float64, and is multiplied out once. Of Grams between the
    adapters' own rows (`collect --for`) the sides are Σ r_t, and nothing but the two bases is as
    wide as the layer. Otherwise, and where `iso_cts` expands them, they are expanded.
    """
    return merged_in_metrics(deltas, parameters, context, _flat_in_metrics)


def thin_iso_a(
    deltas: LowRankStack, parameters: IsoAParameters, context: Context
) -> LowRank | None:
    """Return Iso-A of thin factors as thin factors, None where they have to be expanded."""
    return thin_in_metrics(deltas, parameters, context, _flat_in_metrics)


# From deltas `[T, out, in]` or thin ones, their metrics, parameters, context and rank tolerance to
# the merge.
InMetrics = Callable[[Tensor | LowRankStack, Sequence[Metric], Any, Context, float | None], Tensor]


def merged_in_metrics(
    deltas: Tensor | LowRankStack, parameters: IsoAParameters, context: Context, merge: InMetrics
) -> Tensor:
    """Return what `merge` makes of deltas and their inputs' metrics; in a core where it can."""
    if isinstance(deltas, LowRankStack):
        thin = thin_in_metrics(deltas, parameters, context, merge)
        if thin is not None:
            return thin.dense().to(deltas.dtype)
    tolerance = kept_tolerance(deltas, parameters)
    dense = deltas.dense() if isinstance(deltas, LowRankStack) else deltas
    entries = with_factors(context.statistics or (None,) * len(dense))
    how, size = parameters.powers(context.precision), dense.shape[2]
    metrics = [input_metric(e, parameters.ridge, how, size, dense.device) for e in entries]
    return merge(dense, metrics, parameters, context, tolerance).to(dense.dtype)


def thin_in_metrics(
    deltas: LowRankStack, parameters: IsoAParameters, context: Context, merge: InMetrics
) -> LowRank | None:
    """Return the same of thin factors as thin factors, None where they have to be expanded."""
    if not keeps_factors(deltas, parameters):
        return None
    entries = context.statistics or (None,) * len(deltas)
    found = in_core(deltas, entries, parameters.ridge, parameters.powers(context.precision))
    if found is None:
        return None
    space, metrics = found
    tolerance = kept_tolerance(deltas, parameters)
    merged = merge(space.thin, metrics, parameters, context, tolerance)
    return space.expand(merged, deltas.dtype)


def _flat_in_metrics(
    deltas: Tensor | LowRankStack,
    metrics: Sequence[Metric],
    parameters: IsoAParameters,
    context: Context,
    tolerance: float | None,
) -> Tensor:
    """Return mean(S)·U Vᵀ·C̄^{-1/2} in float64; the bound is that of the expanded deltas."""
    total: Tensor | None = None
    for delta, weight, metric in zip(deltas, context.weights, metrics, strict=True):
        shift = times(metric, delta, 0.5)
        total = shift.mul_(weight) if total is None else total.add(shift, alpha=weight)
    assert total is not None
    flat = polar(
        total.to(deltas.dtype),
        support=parameters.support,
        rank_tolerance=tolerance,
        precision=context.precision,
    )
    merged = flat.factor * flat.mean_singular_value
    return mean_metric(metrics, total).times(merged, -0.5)


def kept_tolerance(deltas: Tensor | LowRankStack, parameters: IsoCParameters) -> float | None:
    """Return the bound below which directions of a sum are rounding; None where all are kept."""
    if parameters.support == "full":
        return None
    if parameters.rank_tolerance is not None:
        return parameters.rank_tolerance
    return default_tolerance(deltas.dtype, deltas.shape[1:])


def _orthogonal(blocks: list[Tensor], dtype: torch.dtype, how: dict[str, Any]) -> Tensor:
    """Return the polar factor of the blocks side by side."""
    return polar(torch.cat(blocks, 1).to(dtype), **how).factor
