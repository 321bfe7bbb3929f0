"""One tensor merged: what a worker does, whatever the files and whoever schedules it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eutectic.conventions import is_counter
from eutectic.errors import EutecticError, NumericalError
from eutectic.execution.elementwise import merge_elementwise
from eutectic.execution.factors import matrix_norms
from eutectic.execution.matrices import merge_matrices
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan, method_of
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import flat_ranges, read_base
from eutectic.types import Treatment

Emit = Callable[[int, Tensor], None]


@dataclass
class Outcome:
    """What a job found out besides the tensor: for the journal and the report.

    Attributes:
        norms: the norms of its matrices, before α; see `execution.factors`.
        record: what the method reported.
    """

    norms: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def copy_tensor(planned: TensorPlan, plan: Plan, inputs: Inputs, emit: Emit) -> Outcome:
    """Emit the base's values; integer buffers must agree in every expert unless a rule says copy.

    Raises:
        EutecticError: an expert holds other values in an integer or boolean buffer.
    """
    name = planned.name
    free = planned.decision.ruled or is_counter(name)
    integral = not planned.entry.dtype.is_floating_point
    must_agree = planned.decision.treatment is Treatment.COPY and integral and not free
    for start, stop in flat_ranges(planned.elements):
        values = inputs.base.read(name, start, stop)
        if must_agree:
            for expert_name, expert in inputs.experts.items():
                if name in expert.entries and not expert.is_delta:
                    own = expert.read(name, start, stop)
                    if not torch.equal(own.to(values.dtype), values):
                        raise EutecticError(
                            f"{name}: the {planned.entry.dtype} buffer of expert '{expert_name}' "
                            "differs from the base's, and such values cannot be averaged.\n"
                            "Add a rule for it: treatment head (kept per expert) or copy (the "
                            "base's)."
                        )
        emit(start, narrow(values, planned, plan))
    return Outcome()


def merge_tensor(
    planned: TensorPlan, plan: Plan, inputs: Inputs, emit: Emit, state: Any = None
) -> Outcome:
    """Merge one tensor and emit W₀ + α·Δ in ascending flat ranges, in the output's dtype.

    Args:
        planned: the tensor and its method.
        plan: the whole plan, for parameters and weights.
        inputs: readers.
        emit: takes (flat start, values).
        state: what `prepare` returned for the whole model, if the method's scope is the model.

    Raises:
        NumericalError: NaN or Inf in an expert, named, unless the recipe allows it.
    """
    method, parameters = method_of(planned, plan)
    if method.elementwise:
        chunks = merge_elementwise(planned, method, parameters, plan, inputs, state)
        for start, result, base in chunks:
            emit(start, narrow(scaled(base, result, planned, plan, planned.scale), planned, plan))
        return Outcome()

    def emit_weight(start: int, delta: Tensor) -> None:
        base = read_base(planned, inputs, start, start + delta.numel())
        emit(start, narrow(scaled(base, delta, planned, plan, planned.scale), planned, plan))

    return merge_unscaled(planned, plan, inputs, emit_weight)


def scaled(
    base: Tensor | None, merged: Tensor, planned: TensorPlan, plan: Plan, alpha: float
) -> Tensor:
    """Return W₀ + α·Δ from what `merge_unscaled` emits; `base` may be absent where α = 1."""
    if not holds_weight(planned, plan):
        assert base is not None
        return torch.add(base, merged, alpha=alpha)
    return merged if alpha == 1 or base is None else torch.lerp(base, merged, alpha)


def holds_weight(planned: TensorPlan, plan: Plan) -> bool:
    """Tell whether a tensor's method gives the merged weight W₀ + Δ itself, instead of Δ."""
    method, parameters = method_of(planned, plan)
    return method.elementwise and method.space(parameters) != "delta"


def merge_unscaled(
    planned: TensorPlan, plan: Plan, inputs: Inputs, emit: Emit, state: Any = None
) -> Outcome:
    """Emit the merged delta itself, before α, in the dtype of the arithmetic.

    Methods that work on weights give W₀ + Δ, see `holds_weight`. Arguments as for `merge_tensor`.
    """
    method, parameters = method_of(planned, plan)
    outcome = Outcome()
    if method.elementwise:
        chunks = merge_elementwise(planned, method, parameters, plan, inputs, state)
        for start, result, _ in chunks:
            emit(start, result)
        return outcome
    matrices = merge_matrices(planned, method, parameters, plan, inputs)
    for block, (start, delta, record) in enumerate(matrices):
        outcome.norms.update(matrix_norms(planned, block, delta))
        outcome.record.update(record)
        emit(start, delta)
    return outcome


def narrow(values: Tensor, planned: TensorPlan, plan: Plan) -> Tensor:
    """Return values in the output's dtype.

    Raises:
        NumericalError: they are finite but beyond float16's range, unless the recipe allows it.
    """
    result = values.to(planned.dtype)
    at_risk = planned.dtype == torch.float16 and values.dtype != torch.float16
    if at_risk and plan.recipe.nonfinite == "error" and finite(values) and not finite(result):
        raise NumericalError(
            f"{planned.name}: merged values reach {float(values.abs().max()):.3g}, beyond the "
            "range of float16.\nChoose dtype: bfloat16 or float32, or a smaller scale."
        )
    return result
