"""One tensor merged: what a worker does, whatever the files and whoever schedules it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.errors import EutecticError, NumericalError
from eutectic.methods import Context, Method, get_method
from eutectic.methods.linear import finite
from eutectic.methods.matrices import run_method
from eutectic.planning.cost import CHUNK
from eutectic.planning.evidence import part_statistics, statistics_of
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan, TensorPlan, stored_name
from eutectic.types import Merged, Treatment

Emit = Callable[[int, Tensor], None]


@dataclass
class Outcome:
    """What a job found out besides the tensor: for the journal and the report."""

    norm: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)


def copy_tensor(planned: TensorPlan, plan: Plan, inputs: Inputs, emit: Emit) -> Outcome:
    """Emit the base's values; integer buffers must agree in every expert.

    Raises:
        EutecticError: an expert holds other values in an integer or boolean buffer.
    """
    name = planned.name
    must_agree = planned.decision.treatment is Treatment.COPY and not (
        planned.entry.dtype.is_floating_point
    )
    for start, stop in _ranges(planned.elements, CHUNK):
        values = inputs.base.read(name, start, stop)
        if must_agree:
            for expert_name, expert in inputs.experts.items():
                if name in expert.entries and not expert.is_delta:
                    own = expert.read(name, start, stop)
                    if not torch.equal(own.to(values.dtype), values):
                        raise EutecticError(
                            f"{name}: the {planned.entry.dtype} buffer of expert '{expert_name}' "
                            "differs from the base's, and such values cannot be averaged.\n"
                            "Add a rule with treatment head (kept per expert) for it."
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
    method, parameters = _method_of(planned, plan)
    if method.elementwise:
        chunks = _merge_elementwise(planned, method, parameters, plan, inputs, state)
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
    method, parameters = _method_of(planned, plan)
    return method.elementwise and method.space(parameters) != "delta"


def merge_unscaled(
    planned: TensorPlan, plan: Plan, inputs: Inputs, emit: Emit, state: Any = None
) -> Outcome:
    """Emit the merged delta itself, before α, in the dtype of the arithmetic.

    Methods that work on weights give W₀ + Δ, see `holds_weight`. Arguments as for `merge_tensor`.
    """
    method, parameters = _method_of(planned, plan)
    outcome = Outcome()
    if method.elementwise:
        chunks = _merge_elementwise(planned, method, parameters, plan, inputs, state)
        for start, result, _ in chunks:
            emit(start, result)
        return outcome
    squares = 0.0
    for start, delta, record in _merge_matrices(planned, method, parameters, plan, inputs):
        squares += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
        outcome.record.update(record)
        emit(start, delta)
    outcome.norm = math.sqrt(squares)
    return outcome


def _method_of(planned: TensorPlan, plan: Plan) -> tuple[Method, Any]:
    """Return the method that merges a tensor: the recipe's, or a fall-back at its defaults."""
    method = get_method(planned.method)
    return method, plan.parameters if method is plan.method else method.parameters()


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


def stream_chunks(
    planned: TensorPlan, method: Method, parameters: Any, plan: Plan, inputs: Inputs
) -> Iterator[Tensor]:
    """Yield `[T, n]` chunks of what the method takes: deltas, or weights."""
    for start, stop in _ranges(planned.elements, CHUNK):
        stack, _ = _read_stack(planned, method, parameters, plan, inputs, start, stop)
        yield stack


def context_for(planned: TensorPlan, plan: Plan, state: Any = None) -> Context:
    """Return the context of one tensor without what only matrices need."""
    return Context(
        weights=tuple(plan.recipe.experts[name].weight for name in planned.experts),
        experts=planned.experts,
        tensor=planned.seed_name,
        seed=plan.recipe.seed,
        precision=plan.recipe.precision,
        state=state,
    )


def _merge_elementwise(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    plan: Plan,
    inputs: Inputs,
    state: Any,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (flat start, merged delta or weight, base or None) of each chunk."""
    context = context_for(planned, plan, state)
    small = planned.elements <= CHUNK
    stack, base = None, None
    if small:
        stack, base = _read_stack(planned, method, parameters, plan, inputs, 0, planned.elements)
    if method.prepare is not None and state is None:
        whole = stack

        def chunks() -> Iterator[Tensor]:
            if whole is not None:
                return iter([whole])
            return stream_chunks(planned, method, parameters, plan, inputs)

        context = dataclasses.replace(context, state=method.prepare(chunks, parameters, context))
    for start, stop in _ranges(planned.elements, CHUNK):
        if not small:
            stack, base = _read_stack(planned, method, parameters, plan, inputs, start, stop)
        assert stack is not None
        result = method.function(stack, parameters, dataclasses.replace(context, offset=start))
        assert isinstance(result, Tensor)
        yield start, result, base


def _read_stack(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    plan: Plan,
    inputs: Inputs,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor | None]:
    """Read one flat range of every expert as `[T, n]` deltas or weights, and of the base."""
    in_weights = method.space(parameters) != "delta"
    experts = [inputs.experts[name] for name in planned.experts]
    full = all(not e.is_delta and planned.name in e.entries for e in experts)
    base = None
    if not (in_weights and full and planned.scale == 1):
        base = read_base(planned, inputs, start, stop)
    stack = torch.empty(len(experts), stop - start, dtype=planned.compute)
    for row, expert in enumerate(experts):
        if in_weights:
            stack[row] = _weight(expert, planned, start, stop, base)
        else:
            assert base is not None
            stack[row] = read_delta(expert, planned, start, stop, base)
    if plan.recipe.nonfinite == "error":
        _check_finite(stack, planned, base)
    return stack, base


def read_delta(expert: Expert, planned: TensorPlan, start: int, stop: int, base: Tensor) -> Tensor:
    """Read a flat range of an expert's Δ_t in the dtype of the arithmetic; `base` is that range."""
    name = stored_name(expert, planned.name, planned.seed_name)
    if _lacks(expert, name):
        return torch.zeros_like(base)
    return expert.delta(name, start, stop, base=base, dtype=planned.compute)


def _weight(
    expert: Expert, planned: TensorPlan, start: int, stop: int, base: Tensor | None
) -> Tensor:
    name = stored_name(expert, planned.name, planned.seed_name)
    if _lacks(expert, name):
        assert base is not None
        return base
    return expert.weight(name, start, stop, base=base, dtype=planned.compute)


def _lacks(expert: Expert, name: str) -> bool:
    """Tell whether an expert counts as unchanged here (`missing: base`)."""
    return not expert.is_delta and name not in expert.entries


def read_base(planned: TensorPlan, inputs: Inputs, start: int, stop: int) -> Tensor:
    """Read a flat range of the base in the dtype of the arithmetic."""
    return inputs.base.read(planned.name, start, stop).to(planned.compute)


def _check_finite(stack: Tensor, planned: TensorPlan, base: Tensor | None) -> None:
    if finite(stack) and (base is None or finite(base)):
        return
    if base is not None and not finite(base):
        culprit = "the base"
    else:
        bad = [n for n, row in zip(planned.experts, stack, strict=True) if not finite(row)]
        culprit = "expert " + ", ".join(f"'{n}'" for n in bad)
    raise NumericalError(
        f"{planned.name}: NaN or Inf in {culprit}.\n"
        "Repair the checkpoint, leave the expert out, or set nonfinite: allow."
    )


def _merge_matrices(
    planned: TensorPlan, method: Method, parameters: Any, plan: Plan, inputs: Inputs
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield (flat start, merged flat delta, record) of each matrix in a tensor, in file order."""
    blocks = planned.entry.shape[0] if planned.decision.stacked else 1
    size = planned.elements // blocks
    for block in range(blocks):
        start = block * size
        base = read_base(planned, inputs, start, start + size)
        stack = torch.empty(len(planned.experts), size, dtype=planned.compute)
        for row, name in enumerate(planned.experts):
            stack[row] = read_delta(inputs.experts[name], planned, start, start + size, base)
        if plan.recipe.nonfinite == "error":
            _check_finite(stack, planned, base)
        shape = matrix_shape(planned)
        deltas = stack.view(len(stack), *shape)
        weight = base.view(shape)
        initial = None
        if inputs.initial is not None and method is plan.method:
            initial = read_delta(inputs.initial, planned, start, start + size, base).view(shape)
        if planned.decision.transpose:
            deltas, weight = deltas.mT, weight.mT
            initial = None if initial is None else initial.mT
        suffix = f"[{block}]" if blocks > 1 else ""
        merged, record = _merge_parts(
            planned, method, parameters, plan, inputs, deltas, weight, initial, suffix
        )
        if planned.decision.transpose:
            merged = merged.mT
        yield start, merged.contiguous().flatten(), record


def _merge_parts(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    plan: Plan,
    inputs: Inputs,
    deltas: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    suffix: str,
) -> tuple[Tensor, dict[str, Any]]:
    """Merge one matrix `[T, out, in]`, part by part where it is a fused one."""
    statistics = statistics_of(planned, plan, inputs)
    context = context_for(planned, plan)
    heights = planned.decision.split
    if not heights:
        own = dataclasses.replace(
            context,
            tensor=context.tensor + suffix,
            base=weight,
            initial=initial,
            statistics=statistics,
        )
        result = _run(method, deltas, parameters, own)
        return result.delta, {suffix or "matrix": result.record} if result.record else {}
    merged: list[Tensor] = []
    records: dict[str, Any] = {}
    row = 0
    for part, height in enumerate(heights):
        rows = slice(row, row + height)
        row += height
        label = f"{suffix}[{part}]"
        own = dataclasses.replace(
            context,
            tensor=context.tensor + label,
            base=weight[rows],
            initial=None if initial is None else initial[rows],
            statistics=part_statistics(planned, plan, inputs, statistics, rows),
        )
        result = _run(method, deltas[:, rows], parameters, own)
        merged.append(result.delta)
        if result.record:
            records[label] = result.record
    return torch.cat(merged), records


def _run(method: Method, deltas: Tensor, parameters: Any, context: Context) -> Merged:
    try:
        return run_method(method, deltas, parameters, context)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericalError(
            f"{context.tensor}: {method.name} cannot decompose this matrix ({error}).\n"
            "If it holds NaN or Inf, repair the checkpoint, or give the tensor a rule with "
            "treatment copy or vector."
        ) from error


def matrix_shape(planned: TensorPlan) -> tuple[int, ...]:
    """Return the shape of one matrix of a tensor, as the file lays it out."""
    shape = planned.entry.shape
    if planned.decision.stacked:
        return shape[1:]
    if len(shape) > 2:
        return (shape[0], planned.elements // shape[0])
    return shape


def matrix_shapes(planned: TensorPlan) -> list[tuple[int, int]]:
    """Return [out, in] of each matrix that a method sees of this tensor."""
    *_, rows, columns = matrix_shape(planned)
    if planned.decision.transpose:
        rows, columns = columns, rows
    return [(height, columns) for height in planned.decision.split or (rows,)]


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(length, 1), step):
        yield start, min(length, start + step)
