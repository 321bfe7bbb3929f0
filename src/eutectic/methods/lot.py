"""LOT: the task vector of least drift of a layer's features, in closed form."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack
from eutectic.methods.grams import Gram, Sums, lack, negative_weights, participants
from eutectic.methods.registry import Context, Cost, Parameters, Rules, Takes, always, register
from eutectic.methods.solving import averaged
from eutectic.types import Merged


@dataclass(frozen=True, kw_only=True)
class LotParameters(Parameters):
    """Parameters of `lot`.

    Attributes:
        normalize_counts: divide each Gram by its tokens, so that every expert counts alike; the
            source takes as many samples of each.
        tolerance: eigenvalues of the summed Gram below this part of the first count as none.
            None: `in` rounding errors of the dtype that the Grams are stored in.
    """

    normalize_counts: bool = True
    tolerance: Annotated[float, Ge(0), Lt(1)] | None = None


@register(
    "lot",
    summary="The task vector whose features drift least from every expert's, by a pseudo-inverse.",
    paper="Towards minimizing feature drift in model merging, arXiv 2505.23859",
    parameters=LotParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=Takes(needs=always(frozenset({"gram"})), fallback=always("lot")),
    cost=Cost(workspace=always(3.0), products=20.0, statistics_copies=always(1.0)),
    rules=Rules(check=negative_weights, spans=True, each_row=True),
)
def lot(deltas: Tensor, parameters: LotParameters, context: Context) -> Merged:
    """Return (Σ w_tΔ_tA_t)(Σ w_tA_t)⁺, the Δ of least norm that minimises Σ w_t‖X_t(Δ − Δ_t)ᵀ‖².

    A_t = X_tᵀX_t is the input Gram, over its tokens: this is the drift of the layer's outputs on
    the inputs that each expert saw. It is the system of `mats` with Grams, solved to its end from
    zero (`flow` with `filter: solution`, `init: zero`), and that of `regmean` on changes in place
    of weights: what no input reaches stays the base's. Where the experts' inputs share no
    direction, each has its own change on its own inputs; where A_t are equal, the weighted mean.

    Shapes: `[T, out, in]` -> `[out, in]`; vectors are averaged, which is the source's rule for
    biases. float64. Cost: T + 2 products `[out, in]·[in, in]` and one eigenproblem of side `in`.
    T = 1 gives the expert on the span of its inputs; zero deltas give zero. Rank deficiency:
    directions whose eigenvalue is below `tolerance` of the first are left as they are in the
    base. A tensor that lacks a Gram for one expert is averaged; the record tells `rest` and
    `reason`, else how many directions are `determined`.

    Deviations from the source: weights; scales of norms are averaged, where the source weighs
    them by the squares of what they multiply, of which statistics hold nothing; convolutions are
    averaged unless they are taken as matrices. Its λ is the scale α, 1 by default.

    Raises:
        MethodError: negative weights, statistics of another shape.
        NumericalError: NaN or Inf in a Gram, or a sum that is not positive semidefinite.

    Reference: Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task
    Vector Fusion for Adaptive Knowledge Integration", NeurIPS 2025, arXiv 2505.23859.
    """
    members = participants(context)
    reason = lack(("gram",), context, parameters.normalize_counts)
    if reason is not None:
        return averaged(deltas, context, reason)
    wide, size = deltas.double(), deltas.shape[2]
    sums = Sums(context, parameters.normalize_counts, 1.0, wide)
    total = torch.zeros(size, size, dtype=wide.dtype, device=wide.device)
    right_side, roundoff = torch.zeros_like(wide[0]), 0.0
    for t in members:
        gram: Gram = sums.gram(t, "gram", context.weights[t])
        roundoff = max(roundoff, gram.unit_roundoff)
        matrix = gram.dense()
        total += matrix
        right_side.addmm_(wide[t], matrix)
    if not bool(total.any()):
        return averaged(deltas, context, "the Grams of all experts are zero")
    values, basis = lapack.eigh(total)
    own = size * max(roundoff, torch.finfo(torch.float64).eps)
    if float(values[-1]) < -100 * own * float(values[0]):
        raise NumericalError("the summed Gram is not positive semidefinite.")
    tolerance = own if parameters.tolerance is None else max(parameters.tolerance, own)
    kept = int((values > tolerance * values[0]).sum())
    Q = basis[:, :kept]
    merged = ((right_side @ Q) / values[:kept]) @ Q.mT
    return Merged(merged.to(deltas), {"determined": kept})
