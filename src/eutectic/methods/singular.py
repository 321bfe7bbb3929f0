"""Task singular vectors: low-rank experts side by side, made orthogonal to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from eutectic.linalg.polar import polar
from eutectic.linalg.svd import default_tolerance, thin_svd
from eutectic.methods.registry import Context, Parameters, register


@dataclass(frozen=True, kw_only=True)
class TsvMParameters(Parameters):
    """Parameters of `tsv_m`.

    Attributes:
        rank_fraction: share of the min(out, in) triplets kept of each expert; None: 1/T.
    """

    rank_fraction: Annotated[float, Gt(0), Le(1)] | None = None


@register(
    "tsv_m",
    family="singular",
    summary="Leading singular vectors of every expert, decorrelated and put together.",
    paper="Task singular vectors: reducing task interference in model merging, arXiv 2412.00081",
    parameters=TsvMParameters,
    laws={"permutation", "homogeneous", "zero", "single", "rotation"},
    workspace=8.0,
)
def tsv_m(deltas: Tensor, parameters: TsvMParameters, context: Context) -> Tensor:
    """Return polar(U_*)·diag(s_*)·polar(V_*)ᵀ of the experts' leading triplets."""
    deltas = context.weigh(deltas)
    r, tolerance = min(deltas.shape[1:]), default_tolerance(deltas.dtype, deltas.shape[1:])
    k = r // len(deltas)
    if parameters.rank_fraction is not None:
        k = max(1, int(r * parameters.rank_fraction))
    blocks = []
    for delta in deltas:
        leading = thin_svd(delta).first(k)
        blocks.append(leading.first(int((leading.S > tolerance * leading.S[:1].sum()).sum())))
    U = polar(torch.cat([b.U for b in blocks], 1)).factor
    V = polar(torch.cat([b.V for b in blocks], 1)).factor
    return ((U * torch.cat([b.S for b in blocks])) @ V.mT).to(deltas.dtype)
