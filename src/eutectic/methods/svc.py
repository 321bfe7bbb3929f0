"""SVC: the singular values of a merge, divided by how often they count what experts share."""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from torch import Tensor

from eutectic.errors import nearest
from eutectic.linalg.svd import ROUNDING, default_tolerance, numerical_rank
from eutectic.methods.grams import Sums, lack, negative_weights, participants
from eutectic.methods.registry import (
    Context,
    Cost,
    Parameters,
    Rules,
    Takes,
    all_methods,
    always,
    get_method,
    register,
)
from eutectic.methods.solving import initial_guess
from eutectic.types import Merged


def _method(name: str) -> str:
    """Return the name of a method whose merge can be calibrated."""
    known = [n for n, entry in all_methods().items() if not hasattr(entry.parameters, "init")]
    if name not in known:
        near = nearest(name, known)
        raise PydanticCustomError(
            "no_method",
            "no method whose merge could be calibrated{near}",
            {"near": f" (did you mean '{near}'?)" if near else ""},
        )
    return name


@dataclass(frozen=True, kw_only=True)
class SvcParameters(Parameters):
    """Parameters of `svc`.

    Attributes:
        of: the method whose merge is calibrated, with its default parameters.
        metric: inner products of rows, "plain" or those of the experts' "inputs".
        directions: the left singular vectors u_r, of the "merge" or of the "sum" of the deltas.
            A flat spectrum, such as Iso-C's, leaves the merge's own open: take the sum's there.
    """

    of: Annotated[str, AfterValidator(_method)] = "task_arithmetic"
    metric: Literal["plain", "inputs"] = "plain"
    directions: Literal["merge", "sum"] = "merge"


def _needs(parameters: SvcParameters) -> Set[str]:
    entry = get_method(parameters.of)
    metric = {"gram"} if parameters.metric == "inputs" else set[str]()
    return {*entry.needs(entry.parse({})), *metric}


@register(
    "svc",
    summary="Another method's merge with its singular values calibrated against the experts.",
    paper="Singular value calibration after model merging, arXiv 2602.05536",
    parameters=SvcParameters,
    laws={"permutation", "homogeneous", "zero", "single", "absent", "rotation"},
    takes=Takes(needs=_needs, fallback=always("svc")),
    cost=Cost(workspace=lambda count: 2 + 24 / count, products=20.0),
    rules=Rules(check=negative_weights),
)
def svc(deltas: Tensor, parameters: SvcParameters, context: Context) -> Merged:
    """Return M with every direction u_r divided by γ_r = mean_t max(1/T, s_t^r).

    M is the merge by `of` and s_t^r = ⟨u_rᵀM, u_rᵀΔ_t⟩/‖u_rᵀΔ_t‖² says how many times M has along
    u_r what expert t has there: T where all experts agree and were added up, 1 where only t has
    a part. With u_r the left singular vectors of M this is σ_r ← σ_r/γ_r. In the metric of the
    inputs, ⟨x, y⟩ = x·A_t/n_t·yᵀ.

    Shapes: `[T, out, in]` -> `[out, in]`; vectors are averaged. Cost: the merge by `of`, one
    float64 SVD, T products `[r, out]·[out, in]`, with "inputs" 2T products with Grams. T = 1 and
    `of: task_arithmetic` give the expert; zero deltas give zero. Rank deficiency: directions of M
    below eps·min(max(out, in), 128) of the first are left as they are. An expert without a part
    in u_r says nothing of it and does not count in that mean; T counts experts of positive weight,
    which weigh the mean. A tensor that lacks a Gram is calibrated in the plain metric, and the
    record says so.

    The calibrated sum has the size of one expert where they agree: its best α is near 1.

    Deviations from the source: weights; experts without a part are left out; `directions`.

    Raises:
        MethodError: `of` is no method, or one that starts from an initial guess itself.

    Reference: arXiv 2602.05536 (ICML 2026).
    """
    members = participants(context)
    merged, origin = initial_guess(deltas, parameters.of, 1.0, replace(context, initial=None))
    record: dict[str, Any] = {"of": origin["from"], "metric": parameters.metric}
    total = context.weigh(deltas).sum(0) if parameters.directions == "sum" else merged
    left, S, _ = torch.linalg.svd(total.double(), full_matrices=False)
    rank = numerical_rank(S, default_tolerance(deltas.dtype, deltas.shape[1:]))
    if rank == 0:
        return Merged(merged, record)
    reason = lack(("gram",), context, True) if parameters.metric == "inputs" else None
    if reason is not None:
        record |= {"metric": "plain", "reason": reason}
    U, wide = left[:, :rank], merged.double()
    along = U.mT @ wide
    sums = Sums(context, True, 1.0, wide) if record["metric"] == "inputs" else None
    counted, mass = torch.zeros(rank).to(along), torch.zeros(rank).to(along)
    floor = 1 / len(members)
    # What rounding leaves of an expert along u_r is no part: M over it would be any number.
    noise = default_tolerance(deltas.dtype, (ROUNDING,))
    nothing = max(torch.finfo(torch.float64).eps, noise**2)
    for t in members:
        own = U.mT @ deltas[t].double()
        seen = own if sums is None else own @ sums.gram(t, "gram", 1.0).dense()
        square = (own * seen).sum(1)
        there = square > nothing * float(square.max())
        times = (along * seen).sum(1) / torch.where(there, square, 1)
        counted += context.weights[t] * torch.where(there, times.clamp_min(floor), 0)
        mass += context.weights[t] * there
    gamma = torch.where(mass > 0, counted / torch.where(mass > 0, mass, 1), 1)
    calibrated = wide + U @ (along * (1 / gamma - 1).unsqueeze(1))
    record["mean_factor"] = float((1 / gamma).mean())
    return Merged(calibrated.to(deltas), record)
