"""Spectral filters of the matching system: from an initial merge towards its solution, at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.linalg import lapack
from eutectic.linalg.select import magnitude_thresholds
from eutectic.linalg.svd import default_tolerance
from eutectic.methods.grams import Sums, lack, negative_weights, participants
from eutectic.methods.registry import Context, Cost, Parameters, Rules, Takes, always, register
from eutectic.methods.solving import averaged, initial_guess
from eutectic.methods.ties import trim
from eutectic.types import Merged

FilterGram = Literal["inputs", "task", "task_trimmed", "task_centred"]
Filter = Literal["flow", "solution", "cut"]


@dataclass(frozen=True, kw_only=True)
class FlowParameters(Parameters):
    """Parameters of `flow`.

    Attributes:
        gram: A_t. "inputs": the measured input Gram over its token count. Without data: "task"
            Δ_tᵀΔ_t, "task_trimmed" the same of the larger half of Δ_t's entries by magnitude,
            "task_centred" the same of Δ_t with its mean row taken off.
        equal: divide each A_t by its trace, so that every expert counts alike.
        filter: "flow" follows the gradient for a time τ, "solution" to its end, "cut" solves on
            the leading eigenvectors alone.
        tau: the time τ of "flow", in units of 1/mean eigenvalue of the summed Gram. None: 1.
        rank: number of eigenvectors of "cut". None: the participation ratio (Σλ)²/Σλ², rounded.
        init: method whose result is the initial guess, or "zero".
        init_scale: factor on it; as in `mats`.
    """

    gram: FilterGram = "inputs"
    equal: bool = False
    filter: Filter = "flow"
    tau: Annotated[float, Gt(0)] | None = None
    rank: Annotated[int, Gt(0)] | None = None
    init: str = "task_arithmetic"
    init_scale: float | None = None


def _check(parameters: FlowParameters, weights: Sequence[float]) -> str | None:
    for name, kind in (("tau", "flow"), ("rank", "cut")):
        if getattr(parameters, name) is not None and parameters.filter != kind:
            return f"{name} is of filter '{kind}', and the filter is '{parameters.filter}'."
    return negative_weights(parameters, weights)


@register(
    "flow",
    summary="Towards the matching system's solution, filtered by its spectrum, in closed form.",
    paper="This project; the system is MaTS, arXiv 2312.04339",
    parameters=FlowParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=Takes(
        needs=lambda p: frozenset({"gram"} if p.gram == "inputs" else ()),
        fallback=always("flow"),
    ),
    cost=Cost(workspace=always(5.0), products=20.0, statistics_copies=always(1.0)),
    rules=Rules(check=_check, spans=True, each_row=True),
)
def flow(deltas: Tensor, parameters: FlowParameters, context: Context) -> Merged:
    """Return X(τ) = X₀ + (D − X₀C)·Q diag(h(λ)/λ) Qᵀ, with C = Σ w_tA_t = QΛQᵀ, D = Σ w_tΔ_tA_t.

    X solves Σ w_t(X − Δ_t)A_t = 0, the system of `mats`. h = 1 − e^{−τλ} is where the flow along
    the negative gradient of Σ w_t⟨X − Δ_t, (X − Δ_t)A_t⟩/2 from X₀ stands at time τ, which a few
    steps of conjugate gradients approach; h = 1 is the solution nearest to X₀; "cut" has h = 1 on
    the leading eigenvectors and 0 on the others.

    Shapes: deltas `[T, out, in]`, Grams `[in, in]` -> `[out, in]`. float64. Cost: T + 2 products
    `[out, in]·[in, in]` (of task Grams one more each) and one eigenproblem of side `in`. T = 1
    ends at the expert where its Gram has full rank; zero deltas give zero where the guess is zero.
    Rank deficiency: directions without data keep X₀. Eigenvalues below `in` rounding errors of
    float64 times the first count as none; of Grams that come in float32 also those below two of its
    rounding errors, or twice the most negative one, unless τ is so short that none of them matters;
    of task Grams those below the square of the deltas' rounding. A tensor
    that lacks a Gram for one expert is averaged; the record tells `rest` and `reason`. The
    record holds the effective rank Σh, τ and where it started.

    Sources of the parts: with `gram: task` the system of ACTMat (arXiv 2604.01329) and, with
    `equal`, the one that WUDI's optimiser approaches (2503.08099); "task_trimmed" is TACT's
    (2604.01329), "task_centred" ACE's (2603.02945), "cut" SWUDI-A's (2606.07289). Their own numbers
    have not been compared: they differ in what is left out and in scale.

    Raises:
        MethodError: negative weights, statistics of another shape, an unknown `init`, `tau` or
            `rank` of another filter.
        NumericalError: NaN or Inf in a Gram, or a sum that is not positive semidefinite.
    """
    if fault := _check(parameters, context.weights):
        raise MethodError(fault)
    members = participants(context)
    if parameters.gram == "inputs":
        reason = lack(("gram",), context, True)
        if reason is not None:
            return averaged(deltas, context, reason)
    wide = deltas.double()
    total, right_side, roundoff = _system(wide, members, parameters, context)
    if not bool(total.any()):
        return averaged(deltas, context, "the Grams of all experts are zero")
    start, origin = initial_guess(deltas, parameters.init, parameters.init_scale, context)
    values, basis = lapack.eigh(total)
    size, most = len(values), float(values[0])
    if float(values[-1]) < -100 * size * roundoff * most:
        raise NumericalError("the summed Gram is not positive semidefinite.")
    if parameters.gram == "inputs":
        noise = _noise(values, parameters, roundoff)
    else:  # squares of deltas, whose rounding says nothing
        noise = default_tolerance(deltas.dtype, deltas.shape[1:]) ** 2 * most
    bound = max(size * torch.finfo(torch.float64).eps * most, noise)
    values = torch.where(values > bound, values, 0)
    share, factors = _filtered(values, parameters)
    first = start.double()
    residual = right_side - first @ total
    merged = first + ((residual @ basis) * factors) @ basis.T
    record: dict[str, Any] = {"init": origin, "effective_rank": float(share.sum())}
    if parameters.filter == "flow":
        record["tau"] = parameters.tau or 1.0
    return Merged(merged.to(deltas), record)


def _noise(values: Tensor, parameters: FlowParameters, roundoff: float) -> float:
    """Return the eigenvalue of C below which an inverse would be one of the Grams' rounding.

    Sums in float32 leave at most a third of its eps in directions without inputs (measured: 16 to
    768 inputs, up to 20,000 tokens). A short flow never inverts there: h(λ)/λ is at most τ.
    """
    if roundoff <= torch.finfo(torch.float64).eps:
        return 0.0
    noise = max(2 * roundoff * float(values[0]), -2 * float(values[-1]))
    short = parameters.filter == "flow" and noise * _time(values, parameters) <= 0.01
    return 0.0 if short else noise


def _time(values: Tensor, parameters: FlowParameters) -> float:
    """Return τ in units of 1/eigenvalue."""
    return (parameters.tau or 1.0) / float(values.mean())


def _filtered(values: Tensor, parameters: FlowParameters) -> tuple[Tensor, Tensor]:
    """Return h(λ) and h(λ)/λ of descending eigenvalues, 0 where there is none."""
    there = values > 0
    if parameters.filter == "flow":
        share = torch.where(there, -torch.expm1(-_time(values, parameters) * values), 0)
    elif parameters.filter == "cut":
        ratio = float(values.sum() ** 2 / values.square().sum())
        rank = min(parameters.rank or max(round(ratio), 1), int(there.sum()))
        share = there.double()
        share[rank:] = 0
    else:
        share = there.double()
    return share, torch.where(there, share / torch.where(there, values, 1), 0)


def _system(
    deltas: Tensor, members: list[int], parameters: FlowParameters, context: Context
) -> tuple[Tensor, Tensor, float]:
    """Return C `[in, in]`, D `[out, in]`, and the relative rounding of C's entries."""
    size, roundoff = deltas.shape[2], torch.finfo(torch.float64).eps
    total = torch.zeros(size, size, dtype=deltas.dtype, device=deltas.device)
    right_side = torch.zeros_like(deltas[0])
    sums = Sums(context, True, 1.0, deltas)
    for t in members:
        if parameters.gram == "inputs":
            stored = sums.gram(t, "gram", 1.0)
            gram = stored.dense()
            if stored.factor is None:  # rows multiplied here are exact where they span nothing
                roundoff = max(roundoff, stored.unit_roundoff)
        else:
            rows = _rows(deltas[t], parameters.gram)
            gram = rows.T @ rows
        weight = context.weights[t]
        if parameters.equal:
            trace = float(gram.trace())
            weight = weight / trace if trace > 0 else 0.0
        total.add_(gram, alpha=weight)
        right_side.addmm_(deltas[t], gram, alpha=weight)
    return total, right_side, roundoff


def _rows(delta: Tensor, gram: FilterGram) -> Tensor:
    if gram == "task_trimmed":
        flat = delta.reshape(1, -1)
        return trim(flat, magnitude_thresholds(lambda: iter([flat]), 0.5)).view_as(delta)
    return delta - delta.mean(0) if gram == "task_centred" else delta
