"""WUDI: the least interference with the rows of every task matrix, in closed form."""

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.svd import default_tolerance
from eutectic.methods.grams import negative_weights, participants
from eutectic.methods.registry import Context, Cost, Parameters, Rules, always, register
from eutectic.types import Merged


@register(
    "wudi",
    summary="The matrix that interferes least with the rows of every task matrix, without data.",
    paper="Whoever started the interference should end it, arXiv 2503.08099",
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent"},
    cost=Cost(workspace=always(6.0), products=12.0),
    rules=Rules(check=negative_weights, spans=True, each_row=True),
)
def wudi(deltas: Tensor, parameters: Parameters, context: Context) -> Merged:
    """Return the Δ of least norm that minimises Σ w_t‖(Δ − Δ_t)Δ_tᵀ‖²_F/‖Δ_t‖²_F.

    That is (Σ w_tΔ_tG_t)(Σ w_tG_t)⁺ with G_t = Δ_tᵀΔ_t/‖Δ_t‖². The source descends towards it from
    the sum of the deltas and stops early; `flow` with `gram: task`, `equal: true` does that in
    closed form, `mats` with `operator: task_gram` by conjugate gradients.

    Shapes: `[T, out, in]` -> `[out, in]`; vectors are averaged. Least squares on the rows of all
    experts, in float64, without squaring their condition. Cost: T products `[out, in]·[in, out]`,
    a QR of `[T·out, in]` and an SVD of side `in`. T = 1 gives the expert, zero deltas zero; an
    expert without change has no say. Rank deficiency: directions of the inputs in which no expert
    changed anything, up to rounding of the deltas (128 eps of their dtype), stay the base's. The
    record tells how many are `determined`.

    Deviations from the source: the closed form.

    Raises:
        MethodError: negative weights.

    Reference: Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free
    Model Merging via Task Vectors", arXiv 2503.08099.
    """
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    for t in participants(context):
        delta = deltas[t].double()
        size = float(delta.norm())
        if size > 0:
            unit = delta * (context.weights[t] ** 0.5 / size)
            rows.append(unit)
            targets.append(delta @ unit.T)
    if not rows:
        return Merged(torch.zeros_like(deltas[0]), {"determined": 0})
    # Δ·Bᵀ = Y in the sense of least squares, B = Q U S Vᵀ.
    Q, R = lapack.qr(torch.cat(rows))
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    # Rounding of the deltas must not say where the inputs lead: noise would fit noise.
    bound = default_tolerance(deltas.dtype, (sum(map(len, rows)), deltas.shape[2]))
    kept = int((bound * S[0] < S).sum())
    along = torch.cat(targets, 1) @ Q @ U[:, :kept]
    return Merged(((along / S[:kept]) @ Vh[:kept]).to(deltas), {"determined": kept})
