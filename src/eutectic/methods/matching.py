"""Matching: MaTS, one linear system per tensor, and its closed forms RegMean and Fisher."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.linalg.cg import eigenbasis_pays, norm
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods.core_matching import core_of, in_core
from eutectic.methods.grams import negative_weights, participants
from eutectic.methods.operators import FISHER_FLOOR, NEEDS, Operator, build_system, fisher_weighted
from eutectic.methods.output_space import between_outputs, reached
from eutectic.methods.registry import (
    Context,
    Cost,
    Parameters,
    Precision,
    Rules,
    Takes,
    always,
    register,
)
from eutectic.methods.solving import (
    ZERO,
    Preconditioner,
    Unknown,
    averaged,
    closed_form,
    continued,
    initial_guess,
    iterate,
    offset_of,
    reason_to_rest,
)
from eutectic.types import Merged

KFAC_TRUST = 2.0  # of the largest expert: where undamped steps ruin a model, the best bound tried
KFAC_DAMPING = 0.01  # of a system whose preconditioner inverts its smallest eigenvalues too


@dataclass(frozen=True, kw_only=True)
class MatsParameters(Parameters):
    """Parameters of `mats`.

    Attributes:
        operator: C_t. "gram" W·A_t, "kfac" H_t·W·A_t, "diagonal_fisher" F_t ⊙ W, "block" B_t·w,
            "task_gram" W·Δ_tᵀΔ_t/‖Δ_t‖² (needs no data), "identity".
        init: method whose result is the initial guess, "zero", or the path of a merged checkpoint,
            which the engine reads and passes as the context's `initial`.
        init_scale: factor on the initial guess. None: 0.3 for task arithmetic, 1 for a checkpoint,
            the method's own default scale otherwise.
        iterations: the most steps. None: 100, or 10 for "block", as published.
        tolerance: relative residual ‖b − C(x)‖/‖b‖ at which to stop.
        preconditioner: "none" as published, "jacobi" (the diagonal), "kronecker" (the nearest
            Kronecker product; the diagonal for operators that are one).
        off_diagonal: λ, by which the off-diagonal entries of A_t, H_t and B_t are multiplied.
        damping: ridge on the operator, relative to its mean diagonal. It draws the solution
            towards the base with `space="delta"`, towards zero weights with "weight". None: 0.01
            for "kfac" with a preconditioner, which else reaches directions that hardly any data
            excite within a few steps, and may leave them many times too large; 0 otherwise, as
            published.
        trust: the largest ‖Δ‖_F, as a multiple of the largest ‖Δ_t‖_F; the step that would exceed
            it is cut off there and is the last one, unless the initial guess is larger itself.
            None: 2 for "kfac", whose curvature is estimated from few gradients and leaves
            directions in which an undamped step has no bound; no limit otherwise, as published.
        space: solve for the delta, or for the weight as published.
        solver: conjugate gradients, or the closed form in float64 where there is one.
        rest: what a tensor without statistics takes: the experts' average, or the initial guess.
        normalize_counts: divide each expert's sums by their counts.
    """

    operator: Operator = "gram"
    init: str = "task_arithmetic"
    init_scale: float | None = None
    iterations: Annotated[int, Ge(0)] | None = None
    tolerance: Annotated[float, Ge(0), Le(1)] = 1e-5
    preconditioner: Preconditioner = "none"
    off_diagonal: Annotated[float, Ge(0), Le(1)] = 1.0
    damping: Annotated[float, Ge(0)] | None = None
    trust: Annotated[float, Gt(0)] | None = None
    space: Unknown = "delta"
    solver: Literal["cg", "direct"] = "cg"
    rest: Literal["average", "init"] = "average"
    normalize_counts: bool = True

    def steps(self) -> int:
        """Return the most steps to take."""
        if self.iterations is not None:
            return self.iterations
        return 10 if self.operator == "block" else 100

    def ridge(self) -> float:
        """Return the damping to use."""
        if self.damping is not None:
            return self.damping
        steep = self.operator == "kfac" and self.preconditioner != "none"
        return KFAC_DAMPING if steep else 0.0

    def largest(self, deltas: Iterable[Tensor]) -> float | None:
        """Return the norm that no iterate exceeds, or None."""
        trust = self.trust
        if trust is None and self.operator == "kfac":
            trust = KFAC_TRUST
        return None if trust is None else trust * max(norm(delta) for delta in deltas)


def _needs(parameters: MatsParameters) -> set[str]:
    base = {"base"} if parameters.space == "weight" else set[str]()
    return {*NEEDS[parameters.operator], *base}


def _explain(shape: tuple[int, ...], parameters: MatsParameters, precision: Precision) -> str:
    if parameters.solver == "direct":
        return f"closed form for '{parameters.operator}' by Cholesky in float64"
    steps = parameters.steps()
    route = f"at most {steps} steps of conjugate gradients on '{parameters.operator}'"
    if parameters.operator == "gram" and parameters.preconditioner == "none":
        if eigenbasis_pays(shape[-2], shape[-1], steps):
            whole = f"in the eigenbasis of the summed {shape[-1]}×{shape[-1]} Gram"
            return f"{route}, {whole}, or by products with the rows of Grams in few of them"
    return f"{route}, preconditioner {parameters.preconditioner}"


@register(
    "mats",
    summary="Match every expert in its task subspace: one linear system, conjugate gradients.",
    paper="Merging by matching models in task parameter subspaces, arXiv 2312.04339",
    parameters=MatsParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=Takes(vectors=True, factors=True, needs=_needs, fallback=always("mats")),
    # Copies of float64 deltas, and where float32 does not suffice.
    cost=Cost(
        workspace=always(6.0),
        products=60.0,
        statistics_copies=lambda p: 1.0 if p.operator == "kfac" else 0.0,
        keeps_rows=lambda p: p.operator != "kfac" or p.preconditioner != "kronecker",
    ),
    rules=Rules(check=negative_weights, explain=_explain, each_row=True),
)
def mats(deltas: Tensor | LowRankStack, parameters: MatsParameters, context: Context) -> Merged:
    """Return an approximate solution Δ of Σ w_tC_t(Δ) = Σ w_tC_t(Δ_t), from an initial guess.

    The solution minimises Σ w_t⟨Δ − Δ_t, C_t(Δ − Δ_t)⟩. Conjugate gradients start at another
    method's result and stop at `tolerance` or after `iterations` steps; stopping early is part of
    the method.

    Shapes: deltas `[T, out, in]` -> `[out, in]`; "diagonal_fisher", "block" and "identity" take
    any shape, "block" with B_t over its entries in order. Cost a step: "gram" one product
    `[out, in]·[in, in]` (none where the eigenbasis of ΣA_t is cheaper than the steps, see
    `linalg.cg`), "kfac" T products with each factor; O(out·in·k) for Grams in k rows and a
    diagonal, which stay so but for the preconditioner of "kfac". T = 1 converges to the expert,
    zero deltas to zero (if the guess is zero then, as all but a given one are).

    Precision: float32 tensors with float64 inner products; float64 throughout for float64 deltas,
    `precision="exact"`, and from where float32 stagnates above the tolerance or breaks down.
    Success is claimed on a residual that is recomputed from the definition.

    Spaces: from the same point the iterates for the delta and for the weight are the same up to
    rounding, whatever the rank, because their residuals are equal. Only the stopping test
    differs: it is relative to ‖ΣC_t(Δ_t)‖ or to ‖ΣC_t(W_t)‖, which is larger, so
    `space="weight"` stops earlier at the same tolerance. With damping, or from "direct" on a
    singular sum, the solutions differ: see `damping` and `regmean`.

    The record holds operator, space, dtype, init, status, iterations, applications and residuals
    (None for one that is not finite); statuses are those of `linalg.cg.CGResult`. A run that breaks
    down (an indefinite operator) or meets NaN returns its last good iterate, which is the initial
    guess at worst, and says so. A tensor that lacks statistics for one expert (none collected, no
    example seen, of a kind that the operator has no rule for) takes `rest`, and the record tells
    `rest` and `reason`; nothing keeps the base's value silently. Experts of weight 0 need no
    statistics.

    Thin factors: the operators "gram", with Grams of few rows, and "task_gram" stay between bases
    of the factors and these rows, so the same steps are taken on matrices of side Σ r_t and
    Σ r_t + Σ k_t, in float64, and multiplied out once. That holds where nothing depends on the
    inputs' own axes: for `space="delta"` without damping, preconditioner or off-diagonal scaling,
    from "zero" or "task_arithmetic". With Grams in rows and a diagonal, "gram" from such a guess
    works between the outputs that the factors reach, on `[T, Σ r_t, in]`. All others are expanded.

    Deviations from the source: the delta is the default unknown; the residual is checked before
    success is claimed; with "block" and "kfac" sums are divided by their counts at the time of
    merging, not of collecting (`normalize_counts`).

    Raises:
        MethodError: statistics of another shape, nonzero sums with count 0, negative weights, an
            unknown `init`, no base with `space="weight"`, "direct" with "kfac".
        NumericalError: NaN or Inf in the statistics; "direct" on an indefinite sum.

    Reference: Merging by matching models in task parameter subspaces, arXiv 2312.04339.
    """
    members = participants(context)
    operator = parameters.operator
    if isinstance(deltas, LowRankStack):
        axes = parameters.off_diagonal != 1 or parameters.ridge() or parameters.space != "delta"
        guess = context.initial is None and parameters.init in (ZERO, "task_arithmetic")
        thin = operator in ("gram", "task_gram") and parameters.preconditioner == "none"
        needed = operator == "gram"
        space = core_of(deltas, context, members, needed) if thin and guess and not axes else None
        if space is not None:
            return in_core(mats, space, parameters, context, deltas.dtype)
        of_inputs = operator == "gram" and guess and parameters.space == "delta"
        if of_inputs and reached(deltas, context, members):
            return between_outputs(mats, deltas, parameters, context)
        deltas = deltas.dense()
    if parameters.solver == "direct" and operator == "kfac":
        raise MethodError(
            "operator 'kfac' has no closed form: a sum of Kronecker products has no cheap inverse."
            "\nUse solver 'cg', with preconditioner 'kronecker' to converge quickly."
        )
    reason = reason_to_rest(operator, deltas, context, parameters.normalize_counts)
    if reason is not None:
        return _rest(deltas, parameters, context, reason)
    direct = parameters.solver == "direct"
    build = partial(
        build_system,
        operator,
        context=context,
        off_diagonal=parameters.off_diagonal,
        normalize_counts=parameters.normalize_counts,
        dense=parameters.preconditioner == "kronecker",
    )
    inputs = deltas.reshape(len(deltas), 1, -1) if operator == "block" else deltas.contiguous()
    if direct or context.precision == "exact":
        inputs = inputs.double()
    system = build(inputs)
    if not bool(system.diagonal.any()):
        return _rest(deltas, parameters, context, "the operators of all experts are zero")
    offset = offset_of(parameters.space, system.right_side, context)
    record: dict[str, Any] = {"operator": operator, "space": parameters.space}
    if direct:
        delta, details = closed_form(system, offset, parameters.ridge())
        return Merged(delta.reshape(deltas.shape[1:]).to(deltas), {**record, **details})

    start, origin = initial_guess(deltas, parameters.init, parameters.init_scale, context)
    run = partial(
        iterate,
        tolerance=parameters.tolerance,
        preconditioner=parameters.preconditioner,
        damping=parameters.ridge(),
        radius=parameters.largest([inputs[t] for t in members]),
    )
    steps = parameters.steps()
    result = run(system, start, offset, steps=steps)
    # A direction without curvature may be the rounding of a singular operator's null space.
    if result.status in ("stagnated", "breakdown") and inputs.dtype != torch.float64:
        wide = None if offset is None else offset.double()
        rest = run(build(inputs.double()), result.solution, wide, steps=steps - result.iterations)
        result = continued(result, rest)
    record |= {
        "init": origin,
        "dtype": str(result.solution.dtype).removeprefix("torch."),
        "status": result.status,
        "iterations": result.iterations,
        "applications": result.applications,
        # JSON has no NaN.
        "residuals": [r if math.isfinite(r) else None for r in result.residuals],
    }
    return Merged(result.solution.reshape(deltas.shape[1:]).to(deltas), record)


def _rest(deltas: Tensor, parameters: MatsParameters, context: Context, reason: str) -> Merged:
    if parameters.rest == "average":
        return averaged(deltas, context, reason)
    delta, origin = initial_guess(deltas, parameters.init, parameters.init_scale, context)
    return Merged(delta, {"rest": "init", "init": origin, "reason": reason})


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
    summary="The weights whose outputs are nearest to every expert's, on its own inputs.",
    paper="Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849",
    parameters=RegMeanParameters,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent"},
    takes=Takes(
        vectors=True,
        factors=True,
        needs=lambda p: {"gram"} if p.space == "delta" else {"gram", "base"},
        fallback=always("regmean"),
    ),
    cost=Cost(workspace=always(4.0), products=4.0, keeps_rows=always(True)),
    rules=Rules(check=negative_weights, each_row=True),
)
def regmean(
    deltas: Tensor | LowRankStack, parameters: RegMeanParameters, context: Context
) -> Merged:
    """Return (Σ w_tΔ_tA_t)(Σ w_tA_t)⁻¹, with A_t the expert's input Gram.

    A_t is divided by the expert's token count n_t and its off-diagonal entries are multiplied by
    λ. Everything is float64; the inverse is a Cholesky solve.

    Shapes: deltas `[T, out, in]` -> `[out, in]`. Cost: T products `[out, in]·[in, in]`, in³/3 for
    the factor, one solve as dear as a product. Grams in rows, or in rows and a diagonal, together
    fewer rows K than in/2, are solved for by Woodbury's identity instead: O(in·K·(out + K)), and no
    matrix `[in, in]` is formed. T = 1 gives the expert, zero deltas give zero.

    Rank deficiency: where Σ A_t is singular to rounding, a ridge is raised until the factor is
    sound; directions that no expert's data excite then keep the base's weights
    (`space="delta"`), or shrink to zero (`space="weight"`, as published). At full rank and without
    a ridge both spaces have the same solution. The record tells `ridge`, `ridge_escalated` and
    `dead_inputs`. A tensor that lacks a Gram for one expert (none collected, no token seen, a
    vector) is averaged, as officially done, and the record tells `rest` and `reason`. Experts of
    weight 0 need no statistics.

    Thin factors: as in `mats`, for `space="delta"`, `off_diagonal=1` and no ridge, or with Grams in
    rows and a diagonal; else expanded.

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
    members = participants(context)
    if isinstance(deltas, LowRankStack):
        axes = parameters.off_diagonal != 1 or parameters.ridge or parameters.space != "delta"
        space = None if axes else core_of(deltas, context, members, grams=True)
        if space is not None:
            return in_core(regmean, space, parameters, context, deltas.dtype)
        if parameters.space == "delta" and reached(deltas, context, members):
            return between_outputs(regmean, deltas, parameters, context)
        deltas = deltas.dense()
    reason = reason_to_rest("gram", deltas, context, parameters.normalize_counts)
    if reason is not None:
        return averaged(deltas, context, reason)
    system = build_system(
        "gram",
        deltas.double(),
        context,
        off_diagonal=parameters.off_diagonal,
        normalize_counts=parameters.normalize_counts,
        dense=False,
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
    summary="Mean of the experts, each entry weighted by its diagonal Fisher information.",
    paper="Merging models with Fisher-weighted averaging, arXiv 2111.09832",
    parameters=FisherParameters,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent"},
    takes=Takes(vectors=True, needs=always({"fisher_diagonal"}), fallback=always("fisher")),
    cost=Cost(workspace=always(4.0), products=0.5),
    rules=Rules(check=negative_weights),
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
