"""SVC: the singular values of a merge, divided by how often they count what experts share."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.leading import leading_singular
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.svd import ROUNDING, Triplets, default_tolerance
from eutectic.methods.grams import Sums, lack, negative_weights, participants
from eutectic.methods.post import PostRules, post_processor
from eutectic.methods.registry import Context, Parameters

# Of the first singular value: singular values that differ by less leave their vectors open.
FLAT = 1e-2
# Of M: what lies outside the experts' output directions by less is rounding.
WITHIN = 1e-6


@dataclass(frozen=True, kw_only=True)
class SvcParameters(Parameters):
    """Parameters of `svc`.

    Attributes:
        metric: inner products of rows, "plain" or those of the experts' "inputs".
        directions: the left singular vectors u_r, of the "merge" or of the "sum" of the deltas.
            "auto": the merge's, unless its spectrum is flat, such as Iso-C's, which leaves its
            own vectors open; then the sum's.
    """

    metric: Literal["plain", "inputs"] = "plain"
    directions: Literal["auto", "merge", "sum"] = "auto"


@post_processor(
    "svc",
    summary="Singular values divided by how often they count what experts share.",
    paper="Singular value calibration after model merging, arXiv 2602.05536",
    parameters=SvcParameters,
    laws={"permutation", "homogeneous", "zero", "single", "absent", "rotation"},
    rules=PostRules(
        needs=lambda p: frozenset({"gram"} if p.metric == "inputs" else ()),
        check=negative_weights,
        workspace=4.0,
        products=12.0,
    ),
)
def svc(
    merged: Tensor | LowRank,
    deltas: Tensor | LowRankStack,
    parameters: SvcParameters,
    context: Context,
) -> tuple[Tensor | LowRank, dict[str, Any]]:
    """Return M with every direction u_r divided by γ_r = mean_t max(1/T, s_t^r).

    s_t^r = ⟨u_rᵀM, u_rᵀΔ_t⟩/‖u_rᵀΔ_t‖² says how many times M has along u_r what expert t has
    there: T where all experts agree and were added up, 1 where only t has a part. With u_r the left
    singular vectors of M this is σ_r ← σ_r/γ_r. In the metric of the inputs, ⟨x, y⟩ = x·A_t/n_t·yᵀ.

    Shapes: M `[out, in]` and deltas `[T, out, in]`, or both as thin factors -> M's. Cost: the left
    singular vectors of M (a Gram eigenproblem of the shorter side), T products
    `[r, out]·[out, in]`, with "inputs" T products with Grams more. Where the deltas are thin
    factors, nothing larger than `[Σ r_t, in]` is decomposed, and a thin M stays thin at its rank:
    its left factor alone changes. T = 1 leaves the expert's own delta as it is; zero M stays zero.
    Rank deficiency: directions of M below eps·min(max(out, in), 128) of the first are left as they
    are. An expert without a part in u_r says nothing of it and does not count in that mean; T
    counts experts of positive weight, which weigh the mean. A tensor that lacks a Gram is
    calibrated in the plain metric, and the record says so.

    The calibrated sum has the size of one expert where they agree.

    Deviations from the source: weights; experts without a part are left out; `directions`.

    Reference: arXiv 2602.05536 (ICML 2026).
    """
    members = participants(context)
    record: dict[str, Any] = {"metric": parameters.metric}
    U, record["directions"] = _directions(merged, deltas, parameters, context)
    if not U.shape[1]:
        return merged, record
    reason = lack(("gram",), context, True) if parameters.metric == "inputs" else None
    if reason is not None:
        record |= {"metric": "plain", "reason": reason}
    along = _seen_from(U, merged)
    sums = Sums(context, True, 1.0, along) if record["metric"] == "inputs" else None
    counted, mass = torch.zeros_like(along[:, 0]), torch.zeros_like(along[:, 0])
    floor = 1 / len(members)
    # What rounding leaves of an expert along u_r is no part: M over it would be any number.
    noise = default_tolerance(deltas.dtype, (ROUNDING,))
    nothing = max(torch.finfo(torch.float64).eps, noise**2)
    experts = list(deltas)
    for t in members:
        own = _seen_from(U, experts[t])
        seen = own
        if sums is not None:
            gram = sums.gram(t, "gram", 1.0).cheapest()
            seen = gram.add_product(torch.zeros_like(own), own)
        square = (own * seen).sum(1)
        there = square > nothing * float(square.max())
        times = (along * seen).sum(1) / torch.where(there, square, 1)
        counted += context.weights[t] * torch.where(there, times.clamp_min(floor), 0)
        mass += context.weights[t] * there
    gamma = torch.where(mass > 0, counted / torch.where(mass > 0, mass, 1), 1)
    record["mean_factor"] = float((1 / gamma).mean())
    change = U * (1 / gamma - 1)
    if isinstance(merged, LowRank):
        left = merged.left.double()
        return LowRank((left + change @ (U.mT @ left)).to(merged.left), merged.right), record
    return (merged.double() + change @ along).to(merged), record


def _directions(
    merged: Tensor | LowRank,
    deltas: Tensor | LowRankStack,
    parameters: SvcParameters,
    context: Context,
) -> tuple[Tensor, str]:
    """Return the left singular vectors `[out, r]` above rounding, and whose they are."""

    def vectors(source: Tensor | LowRank) -> Triplets:
        return leading_singular(
            source,
            min(source.shape),
            tolerance=default_tolerance(deltas.dtype, deltas.shape[1:]),
            seed=context.seed_for("svc"),
            precision=context.precision,
        )

    if parameters.directions != "sum":
        source = merged
        if isinstance(deltas, LowRankStack) and isinstance(merged, Tensor):
            source = _within(merged, deltas)
        found = vectors(source)
        flat = len(found.S) > 1 and float(found.S[0] - found.S[-1]) < FLAT * float(found.S[0])
        if parameters.directions == "merge" or not flat:
            return found.U, "merge"
    weighed = context.weigh(deltas)
    total = weighed.total() if isinstance(weighed, LowRankStack) else weighed.sum(0)
    return vectors(total).U, "sum"


def _within(merged: Tensor, deltas: LowRankStack) -> Tensor | LowRank:
    """Return M as Q·QᵀM where the experts' output directions Q hold it, else as it is."""
    if not deltas.rank or 2 * deltas.rank > min(merged.shape):
        return merged
    Q = lapack.orthonormal(torch.cat([factor.double() for factor in deltas.left], 1))
    rows = Q.mT @ merged.double()
    outside = lapack.norm(merged.double() - Q @ rows)
    return LowRank(Q, rows) if outside <= WITHIN * lapack.norm(rows) else merged


def _seen_from(U: Tensor, matrix: Tensor | LowRank) -> Tensor:
    """Return UᵀM `[r, in]` in float64."""
    if isinstance(matrix, LowRank):
        return (U.mT @ matrix.left.double()) @ matrix.right.double()
    return U.mT @ matrix.double()
