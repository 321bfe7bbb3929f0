"""Consensus: keep the entries of the summed change that several experts use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from eutectic.methods.registry import Context, Parameters, Takes, register
from eutectic.methods.ties import sum_in_order


@dataclass(frozen=True, kw_only=True)
class ConsensusParameters(Parameters):
    """Parameters of `consensus`.

    Attributes:
        mask_scale: λ. An expert uses an entry where its own change is at least λ times what the
            others add there; smaller values make larger masks. An expert may have its own.
        users: fewest experts that use an entry which is kept. Of fewer experts than that, all.
    """

    mask_scale: Annotated[float, Ge(0)] = 0.6
    users: Annotated[int, Ge(0)] = 2


@register(
    "consensus",
    summary="Sum of the task vectors, without entries that one expert or none uses.",
    paper="Localizing task information for improved model merging, arXiv 2405.07813",
    parameters=ConsensusParameters,
    laws={"permutation", "homogeneous", "zero", "single", "absent"},
    takes=Takes(elementwise=True, per_expert={"mask_scale"}),
)
def consensus(deltas: Tensor, parameters: ConsensusParameters, context: Context) -> Tensor:
    """Return M ⊙ [at least k of the masks m_t], where M = Σ w_tΔ_t.

    m_t = |w_tΔ_t| ≥ λ|M − w_tΔ_t| is what expert t uses (its TALL mask): entries that no expert
    uses are noise of all ("catastrophic"), those of one are of no use to the others ("selfish").

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass. At T = 1 the expert itself; zero deltas
    give zero; rank plays no part. k = `users`, or the number of experts whose weight is not 0 where
    that is smaller. k = 0 and λ = 0 give the sum.

    Deviations from the source: weights. Equality counts as use (the official code asks for more
    than λ times the rest), so that of two copies with λ = 1 all is kept. λ is one for all experts;
    the source chooses one each on validation data, which `parameters` of an expert can say.

    Reference: Wang et al., "Localizing Task Information for Improved Model Merging and
    Compression", arXiv 2405.07813.
    """
    own = context.weigh(deltas)
    total = sum_in_order(own)
    scales: Sequence[Any] = context.each(parameters, "mask_scale")
    members = [t for t, weight in enumerate(context.weights) if weight != 0]
    used = torch.zeros(total.shape, dtype=torch.int32, device=total.device)
    for t in members:
        used += own[t].abs() >= (total - own[t]).abs() * scales[t]
    return torch.where(used >= min(parameters.users, len(members)), total, 0)
