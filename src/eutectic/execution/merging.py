"""One tensor merged, whatever the files and whoever schedules it, and factors between layers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eutectic.conventions import layer_group
from eutectic.errors import EutecticError, NumericalError
from eutectic.execution.matrix_merging import context_of, merge_matrices
from eutectic.execution.norms import Squares, add_chunk, with_layer_factors
from eutectic.execution.post_processing import process_matrices
from eutectic.execution.shared_merging import merge_shared_stack
from eutectic.execution.tensor_values import (
    as_map,
    block_ranges,
    flat_ranges,
    merged_ranges,
    read_base,
    read_own,
    read_stack,
    read_stored,
    reads_no_base,
)
from eutectic.linalg.lowrank import LowRank
from eutectic.methods import Method, get_method
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import COPY, TensorPlan


def matrix_name(planned: TensorPlan, block: int, part: str) -> str:
    """Return the name under which a matrix is compared with others.

    A stack's matrices are numbered as layers are, so that they are like layers, as they would be
    with a tensor each. Parts of a fused matrix keep their brackets: they are different layers.
    """
    return planned.name + (f".{block}" if planned.layout.stacked else "") + part


def layer_factors(method: Method, norms: Mapping[str, float], parameters: Any) -> dict[str, float]:
    """Return the factor of every merged matrix by a method that compares like layers.

    `norms` are the Frobenius norms of all matrices that the method merged, by name.
    """
    assert method.finish is not None
    groups: dict[str, list[str]] = {}
    for name in norms:
        groups.setdefault(layer_group(name), []).append(name)
    factors: dict[str, float] = {}
    for names in groups.values():
        own = method.finish([norms[name] for name in names], parameters)
        factors |= zip(names, own, strict=True)
    return factors


def matrix_norms(planned: TensorPlan, block: int, delta: Tensor) -> dict[str, float]:
    """Return the Frobenius norms of the matrices in one block of a tensor, flat as in the file."""
    matrix = as_map(delta, planned)
    if matrix.ndim == 0:
        return {matrix_name(planned, block, ""): abs(float(matrix))}
    return {
        matrix_name(planned, block, part): float(
            torch.linalg.vector_norm(matrix[rows], dtype=torch.float64)
        )
        for part, rows in planned.row_parts(len(matrix))
    }


def range_factor(
    planned: TensorPlan, factors: Mapping[str, float], start: int, stop: int
) -> float | Tensor:
    """Return the factor of a flat range inside one block: a number, or one per entry."""
    _, size = planned.blocks
    block = start // max(size, 1)
    if not planned.layout.split:
        return factors.get(matrix_name(planned, block, ""), 1.0)
    names = [matrix_name(planned, block, part) for part, _ in planned.row_parts(0)]
    if not factors.keys() & set(names):
        return 1.0
    own = torch.tensor([factors.get(name, 1.0) for name in names], dtype=planned.compute)
    per_row = own.repeat_interleave(torch.tensor(planned.layout.split))
    entries = torch.arange(start - block * size, stop - block * size)
    columns = planned.matrix_shape[-1]
    return per_row[entries % columns if planned.layout.transpose else entries // columns]


def factors_of(planned: TensorPlan, factors: Mapping[str, float]) -> dict[str, float]:
    """Return the factors of one tensor's matrices."""
    names = (name for _, name in _matrices(planned)) if factors else ()
    return {name: factors[name] for name in names if name in factors}


def with_factors(
    record: Mapping[str, Any], planned: TensorPlan, factors: Mapping[str, float]
) -> dict[str, Any]:
    """Return what a method reported of a tensor, with the factor of each of its matrices."""
    found = dict(record)
    for label, name in _matrices(planned):
        if name in factors:
            told = {"layer_factor": factors[name]}
            found |= {label: {**found.get(label, {}), **told}} if label else told
    return found


def squares_with_factors(
    squares: Squares, planned: TensorPlan, factors: Mapping[str, float]
) -> Squares:
    """Return the squares of a tensor's matrices with the factor of each besides α."""
    return with_layer_factors(squares, factors, dict(_matrices(planned)))


def _matrices(planned: TensorPlan) -> Iterator[tuple[str, str]]:
    """Yield (label in records, name) of every matrix of a tensor."""
    blocks, _ = planned.blocks
    for block in range(blocks):
        for part, _ in planned.row_parts(0):
            suffix = f"[{block}]" if blocks > 1 else ""
            yield suffix + part, matrix_name(planned, block, part)


def stream_chunks(planned: TensorPlan, inputs: Inputs) -> Iterator[Tensor]:
    """Yield `[T, n]` chunks of what the method takes: deltas, or weights."""
    for start, stop in merged_ranges(planned):
        yield _as_seen(planned, *_read_chunk(planned, inputs, start, stop)).to(inputs.device)


def merge_elementwise(
    planned: TensorPlan, inputs: Inputs, state: Any, squares: Squares
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (flat start, merged delta or weight, base or None) of each chunk; add its squares."""
    method, parameters = get_method(planned.method), planned.parameters
    context = context_of(planned, state)
    ranges = list(merged_ranges(planned))
    whole = _read_chunk(planned, inputs, *ranges[0]) if len(ranges) == 1 else None
    if method.prepare is not None and state is None:

        def chunks() -> Iterator[Tensor]:
            if whole is None:
                return stream_chunks(planned, inputs)
            return iter([_as_seen(planned, *whole).to(inputs.device)])

        context = dataclasses.replace(context, state=method.prepare(chunks, parameters, context))
    for start, stop in ranges:
        stack, base = whole or _read_chunk(planned, inputs, start, stop)
        own = dataclasses.replace(context, offset=start)
        seen = _as_seen(planned, stack, base).to(inputs.device)
        result = method.function(seen, parameters, own)
        assert isinstance(result, Tensor)
        result = result.cpu()
        add_chunk(squares, planned, inputs, (start, stack, base), result, holds_weight(planned))
        yield start, result, base


def _read_chunk(
    planned: TensorPlan, inputs: Inputs, start: int, stop: int
) -> tuple[Tensor, Tensor | None]:
    """Read one flat range of every expert as `[T, n]` deltas or weights, and of the base."""
    in_weights = holds_weight(planned)
    base = None
    spared = in_weights and planned.scale == 1 and reads_no_base(planned, inputs)
    if _takes_base(planned) or not spared:
        base = read_base(planned, inputs, start, stop)
    return read_stack(planned, inputs, (start, stop), base, in_weights), base


def _takes_base(planned: TensorPlan) -> bool:
    return "base" in get_method(planned.method).needs(planned.parameters)


def _as_seen(planned: TensorPlan, stack: Tensor, base: Tensor | None) -> Tensor:
    """Return a chunk as the method gets it: after W₀ where it needs the base."""
    if not _takes_base(planned):
        return stack
    assert base is not None
    return torch.cat([base.unsqueeze(0), stack])


Emit = Callable[[int, Tensor], None]  # takes (flat start, values)


@dataclass(frozen=True)
class Finished:
    """What is to be noted of a finished tensor."""

    sha256: str = ""  # of the bytes written; empty before they are, and in memory
    record: dict[str, Any] = field(default_factory=dict[str, Any])  # what the method reported
    # Frobenius norms of its matrices' deltas, before α; see `layer_factors`
    norms: dict[str, float] = field(default_factory=dict[str, float])
    squares: Squares = field(default_factory=Squares)  # how large its change is; see `norms`


def copy_tensor(planned: TensorPlan, inputs: Inputs, emit: Emit) -> Finished:
    """Emit the base's values; buffers of integers must agree in every expert unless ruled."""
    assert planned.base is not None
    for start, stop in flat_ranges(planned.elements):
        values = read_stored(planned.base, inputs, start, stop)
        for source in planned.experts if planned.must_agree else ():
            expert = inputs.owner(source)
            if source.tensor is None or expert.is_delta:
                continue
            own = read_own(expert, source, start, values)
            if not torch.equal(own, values):
                raise EutecticError(
                    f"{planned.name}: the {values.dtype} buffer of expert '{source.owner}' "
                    "differs from the base's, and such values cannot be averaged.\n"
                    "Add a rule for it: treatment head (kept per expert) or copy (the base's)."
                )
        emit(start, narrow(values, planned))
    return Finished()


def merge_tensor(planned: TensorPlan, inputs: Inputs, emit: Emit, state: Any = None) -> Finished:
    """Merge one tensor and emit W₀ + α·Δ in ascending flat ranges, in the output's dtype.

    `state` is what `prepare` returned for the whole model, if the method's scope is the model.
    """
    if planned.in_chunks:
        found = Finished()
        for start, result, base in merge_elementwise(planned, inputs, state, found.squares):
            emit(start, narrow(scaled(base, result, planned, planned.scale), planned))
        return found

    def emit_weight(start: int, delta: Tensor) -> None:
        base = read_base(planned, inputs, start, start + delta.numel())
        emit(start, narrow(scaled(base, delta, planned, planned.scale), planned))

    return merge_unscaled(planned, inputs, emit_weight, state)


def merge_unscaled(planned: TensorPlan, inputs: Inputs, emit: Emit, state: Any = None) -> Finished:
    """Emit the merged delta itself, before α, in the dtype of the arithmetic.

    Methods that work on weights give W₀ + Δ, see `holds_weight`.
    """
    found = Finished()
    if planned.post is not None:
        return _merge_processed(planned, inputs, emit, state)
    if planned.compress is not None:
        changes, told = merge_shared_stack(planned, inputs, found.squares)
        found.record.update(told)
        size = planned.blocks[1]
        for block, change in enumerate(changes):
            matrix = change.dense() if isinstance(change, LowRank) else change
            flat = (matrix.mT if planned.layout.transpose else matrix).flatten()
            delta = flat.to(planned.compute).cpu()
            found.norms.update(matrix_norms(planned, block, delta))
            emit(block * size, delta)
        return found
    if planned.in_chunks:
        for start, result, _ in merge_elementwise(planned, inputs, state, found.squares):
            emit(start, result)
        return found
    matrices = merge_matrices(planned, inputs, found.squares)
    for block, (start, delta, record) in enumerate(matrices):
        found.norms.update(matrix_norms(planned, block, delta))
        found.record.update(record)
        emit(start, delta)
    return found


def _merge_processed(planned: TensorPlan, inputs: Inputs, emit: Emit, state: Any) -> Finished:
    """Merge a tensor by its method, then emit what the post-processor makes of its matrices."""
    plain = dataclasses.replace(planned, post=None)
    flat = torch.empty(planned.elements, dtype=planned.compute)

    def put(start: int, values: Tensor) -> None:
        stop = start + values.numel()
        if holds_weight(plain):
            values = values - read_base(planned, inputs, start, stop)
        flat[start:stop] = values

    before = merge_unscaled(plain, inputs, put, state)
    found = Finished(record=dict(before.record))
    matrices = process_matrices(planned, inputs, flat, found.squares)
    for block, (start, delta, told) in enumerate(matrices):
        found.norms.update(matrix_norms(planned, block, delta))
        for label, record in told.items():
            found.record[label] = {**found.record.get(label, {}), **record}
        emit(start, delta)
    return found


def scale_tensor(
    planned: TensorPlan,
    inputs: Inputs,
    emit: Emit,
    read_delta: Callable[[int, int], Tensor],
    factors: Mapping[str, float],
) -> None:
    """Emit W₀ + α·Δ from what `merge_unscaled` emitted: the bytes of `merge_tensor`.

    `read_delta` returns a flat range of it, `factors` are those of `layer_factors`.
    """
    for start, stop in block_ranges(planned):
        base = read_base(planned, inputs, start, stop)
        merged = read_delta(start, stop)
        alpha, factor = planned.scale, range_factor(planned, factors, start, stop)
        if isinstance(factor, Tensor):
            merged = merged * factor
        else:
            alpha *= factor
        emit(start, narrow(scaled(base, merged, planned, alpha), planned))


def scaled(base: Tensor | None, merged: Tensor, planned: TensorPlan, alpha: float) -> Tensor:
    """Return W₀ + α·Δ from what `merge_unscaled` emits; `base` may be absent where α = 1."""
    if abs(alpha) > torch.finfo(planned.compute).max:
        raise NumericalError(
            f"{planned.name}: the scale {alpha:.3g} is beyond the range of {planned.compute}.\n"
            "Choose a smaller scale."
        )
    if not holds_weight(planned):
        assert base is not None
        return torch.add(base, merged, alpha=alpha)
    return merged if alpha == 1 or base is None else torch.lerp(base, merged, alpha)


def holds_weight(planned: TensorPlan) -> bool:
    """Tell whether a tensor's method gives the merged weight W₀ + Δ itself, instead of Δ."""
    return planned.in_chunks and get_method(planned.method).space(planned.parameters) != "delta"


def narrow(values: Tensor, planned: TensorPlan) -> Tensor:
    """Return values in the output's dtype; NaN and Inf are refused, whatever they come from."""
    if planned.nonfinite == "allow":
        return values.to(planned.dtype)
    where = "the base" if planned.method == COPY else ""
    return narrow_finite(planned.name, values, planned.dtype, where)


def narrow_finite(name: str, values: Tensor, dtype: torch.dtype, where: str = "") -> Tensor:
    """Return values in a dtype; NaN and Inf are refused as those of `where`, or of the merge."""
    result = values.to(dtype)
    if dtype.is_floating_point and not finite(result):
        raise _not_finite(name, values, dtype, where)
    return result


def _not_finite(name: str, values: Tensor, dtype: torch.dtype, where: str) -> NumericalError:
    """Return the error that a tensor of the output would hold NaN or Inf; `where` holds it."""
    short = str(dtype).removeprefix("torch.")
    if finite(values):
        wider = "float32" if dtype in (torch.float16, torch.bfloat16) else "float64"
        if dtype == torch.float16:
            wider = "bfloat16 or float32"
        return NumericalError(
            f"{name}: {'values of ' + where if where else 'merged values'} reach "
            f"{float(values.abs().max()):.3g}, beyond the range of {short}.\n"
            f"Choose dtype: {wider}, or a smaller scale."
        )
    if where:
        return NumericalError(
            f"{name}: NaN or Inf in {where}, which the output would hold as it is.\n"
            "Repair the checkpoint, or set nonfinite: allow."
        )
    return NumericalError(
        f"{name}: the merged values are NaN or Inf: they overflow {str(values.dtype)[6:]}.\n"
        "Choose a smaller scale or weight, or set nonfinite: allow."
    )
