"""Task arithmetic."""

from torch import Tensor

from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods.linear import weighted_sum
from eutectic.methods.registry import Context, Parameters, Rules, Takes, register


def _thin(deltas: LowRankStack, parameters: Parameters, context: Context) -> LowRank:
    return context.weigh(deltas).total()


@register(
    "task_arithmetic",
    summary="Sum of the task vectors; the scale α decides how much of it is added.",
    paper="Editing models with task arithmetic, arXiv 2212.04089",
    laws={"permutation", "homogeneous", "zero", "single", "absent", "rotation"},
    takes=Takes(elementwise=True, factors=True),
    rules=Rules(thin=_thin),
)
def task_arithmetic(
    deltas: Tensor | LowRankStack, parameters: Parameters, context: Context
) -> Tensor:
    """Return Σ w_t Δ_t.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass. At T = 1 the expert itself; zero deltas
    give zero; rank plays no part. Thin factors cost one product of inner size Σ r_t and give the
    same up to the rounding of that product.
    """
    return weighted_sum(deltas, context)
