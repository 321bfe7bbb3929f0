"""One merged tensor as a part of an adapter: thin factors of its change, or the tensor itself.

A part goes to a small file of its own, since how many directions a layer needs is known only when
its change is: the adapter's one file is put together from them at the end.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile
from eutectic.errors import NumericalError
from eutectic.execution.input_moments import input_moment, mean_moment
from eutectic.execution.matrix_merging import (
    context_of,
    part_statistics,
    statistics_of,
    thin_deltas,
)
from eutectic.execution.merging import (
    Emit,
    Finished,
    holds_weight,
    merge_tensor,
    merge_unscaled,
    narrow_finite,
    range_factor,
    scale_tensor,
    squares_with_factors,
    with_factors,
)
from eutectic.execution.norms import Squares, square, squares_of
from eutectic.execution.post_processing import process
from eutectic.execution.shared_merging import LOST, merge_shared_stack
from eutectic.execution.tensor_values import as_map, block_ranges, read_base, read_stack
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.range_finder import Compressed, compressed
from eutectic.linalg.shift import SecondMoment, compressed_by_shift, shift_of
from eutectic.methods import Context, get_method
from eutectic.methods.matrices import missing_needs, needed
from eutectic.methods.sound_statistics import check_statistics
from eutectic.planning.adapter_plan import THIN, Carried, thin_rank
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.storage import storage_of

LEFT, RIGHT, WHOLE = "left", "right", "whole"  # names in a part's file
LOST_SHIFT = "lost_shift"  # in a tensor's record: share of ‖Δx‖² that a cut by inputs loses
LOSSLESS = 1e-7  # of the energy: so little is rounding where nothing may be lost be
PIECE = 1 << 20  # entries of the base
_READ = 1 << 22
_NOTHING = torch.zeros(1)

# Flat ranges of what `merge_unscaled` emitted; None where the tensor is merged on the way.
ReadDelta = Callable[[int, int], Tensor]


def part_name(tensor: str) -> str:
    """Return the name of the file of a tensor's part."""
    return hashlib.sha256(tensor.encode()).hexdigest()[:32] + ".safetensors"


def hash_of_part(path: Path) -> str:
    """Return the hash of a part's file; empty where there is none."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()


def write_part(
    planned: TensorPlan,
    carried: Carried,
    inputs: Inputs,
    folder: Path,
    state: Any = None,
    late: tuple[ReadDelta, Mapping[str, float], Finished] | None = None,
) -> Finished:
    """Merge one tensor and write its part; `late` is its delta, its factors and what was found.

    What is noted says under "adapter" whether the tensor changes, its rank and the lost energy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / part_name(planned.name)
    if carried.form in THIN:
        found, changes = _changes(planned, inputs, state, late)
        slot, layout = carried.slot, planned.layout
        if slot is not None and layout.stacked and slot.turned != layout.transpose:
            changes = [_transposed(change) for change in changes]  # as PEFT sees them
        told: dict[str, Any] = {}
        cut = [_cut(planned, carried, inputs, change, told) for change in changes]
        part = _together(cut) if planned.layout.stacked else cut[0]
        left, right = part.left, part.right
        if carried.dtype == torch.float16:
            left, right = _within_half(left, right)
        sides = {LEFT: left, RIGHT: right}
        held = {n: narrow_finite(planned.name, t, carried.dtype) for n, t in sides.items()}
        told = {"changed": part.rank > 0, "rank": part.rank, "lost_energy": part.lost, **told}
        if LOST in found.record:
            told[LOST] = found.record[LOST]
            found = replace(found, record={k: v for k, v in found.record.items() if k != LOST})
        with _opened(path, {name: (t.dtype, tuple(t.shape)) for name, t in held.items()}) as file:
            for name, tensor in held.items():
                file.write(name, 0, tensor.contiguous().cpu())
    else:
        with _opened(path, {WHOLE: (planned.dtype, planned.shape)}) as file:
            found, changed = _whole(planned, inputs, state, late, file)
        told = {"changed": changed}
    record = {**found.record, "adapter": told}
    return replace(found, sha256=hash_of_part(path), record=record)


@contextmanager
def _opened(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Iterator[CheckpointWriter]:
    rows = tuple((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    storage_of(path).remove(path)  # what a killed run had begun
    with CheckpointWriter(path.parent, [OutputFile(path.name, rows)]) as writer:
        yield writer
        writer.sync()


@contextmanager
def open_part(folder: Path, tensor: str) -> Iterator[CheckpointReader]:
    """Open a tensor's part."""
    path = folder / part_name(tensor)
    reader = CheckpointReader(open_index(path))
    try:
        yield reader
    finally:
        reader.close()


def _within_half(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors, direction by direction of alike size, by powers of two.

    Float16 has no room for a trained B of 1e-6 beside an A of 1, though it has for their product.
    """
    here, there = left.abs().amax(-2), right.abs().amax(-1)
    acts = (here > 0) & (there > 0)
    ratio = torch.where(acts, there.double() / here.double(), 1.0)
    factor = torch.exp2((ratio.log2() / 2).round())
    return left.double() * factor[..., None, :], right.double() / factor[..., None]


def _transposed(change: Tensor | LowRank) -> Tensor | LowRank:
    if isinstance(change, LowRank):
        return LowRank(change.right.mT, change.left.mT)
    return change.mT


def _together(cut: Sequence[Compressed]) -> Compressed:
    """Return the factors of a stack's matrices, `[E, out, r]` and `[E, r, in]`, r their largest."""
    rank = max(part.rank for part in cut)
    first = cut[0]
    left = first.left.new_zeros(len(cut), first.left.shape[0], rank)
    right = first.right.new_zeros(len(cut), rank, first.right.shape[1])
    kept = whole = 0.0
    for number, part in enumerate(cut):
        left[number, :, : part.rank], right[number, : part.rank] = part.left, part.right
        own = sum(squares_of(LowRankStack((part.left,), (part.right,)), None, _NOTHING)[2:])
        kept += own
        whole += own / (1 - part.lost)
    return Compressed(left, right, 1 - kept / whole if whole else 0.0)


def _changes(
    planned: TensorPlan,
    inputs: Inputs,
    state: Any,
    late: tuple[ReadDelta, Mapping[str, float], Finished] | None,
) -> tuple[Finished, list[Tensor | LowRank]]:
    """Return α·Δ of each matrix as a map `[out, in]`, thin where the method keeps it so."""
    if late is None and planned.compress is not None and planned.post is None:
        found = Finished()
        changes, record = merge_shared_stack(planned, inputs, found.squares)
        return replace(found, record=record), [_scaled(c, planned.scale) for c in changes]
    if late is None:
        thin = _thin_change(planned, inputs)
        if thin is not None:
            return thin[0], [thin[1]]
    flat = torch.empty(planned.elements, dtype=planned.compute)
    weights = holds_weight(planned)

    def put(start: int, values: Tensor) -> None:
        stop = start + values.numel()
        if weights:
            values = values - read_base(planned, inputs, start, stop)
        flat[start:stop] = values

    if late is None:
        found = merge_unscaled(planned, inputs, put, state)
        flat.mul_(planned.scale)
    else:
        read, factors, before = late
        for start, stop in block_ranges(planned):
            put(start, read(start, stop))
            flat[start:stop] *= range_factor(planned, factors, start, stop) * planned.scale
        found = replace(
            before,
            record=with_factors(before.record, planned, factors),
            squares=squares_with_factors(before.squares, planned, factors),
        )
    rows = planned.shape[1 if planned.layout.stacked else 0]
    matrices = flat.view(planned.blocks[0], rows, -1)
    return found, [m.mT if planned.layout.transpose else m for m in matrices]


def _scaled(change: Tensor | LowRank, scale: float) -> Tensor | LowRank:
    if isinstance(change, LowRank):
        return LowRank(change.left * scale, change.right)
    return change * scale


def _thin_change(planned: TensorPlan, inputs: Inputs) -> tuple[Finished, LowRank] | None:
    """Return the merged change as thin factors, without ever expanding it."""
    method = get_method(planned.method)
    if method.thin is None or planned.compress is not None:
        return None
    deltas = thin_deltas(planned, inputs)
    if deltas is None:
        return None
    found, record = Squares(), dict[str, Any]()
    near: Tensor | None = None  # the base, where its parts are measured
    parts: list[LowRank] = []
    for part, rows, own in _parts(planned, inputs, deltas):
        seen = deltas.rows(rows) if part else deltas
        needs = needed(method, planned.parameters)
        if missing_needs(method, planned.parameters, own):
            return None
        if needs:
            check_statistics(needs, tuple(seen.shape[1:]), own)
        merged = method.thin(seen, planned.parameters, own)
        if merged is None:
            return None
        if planned.post is not None:
            merged, record[part or "matrix"] = process(planned, merged, seen, own)
            assert isinstance(merged, LowRank)
        found[part] = squares_of(seen, None, _NOTHING)
        alone = LowRankStack((merged.left,), (merged.right,))
        found[part][0] = squares_of(alone, None, _NOTHING)[2]
        if part and near is None:
            near = as_map(read_base(planned, inputs, 0, planned.elements), planned)
        found[part][1] = _base_square(planned, inputs) if near is None else square(near[rows])
        parts.append(merged)
    whole = parts[0]
    if len(parts) > 1:  # one below the other
        left = torch.block_diag(*(own.left for own in parts))
        whole = LowRank(left, torch.cat([own.right for own in parts]))
    scaled = LowRank(whole.left * planned.scale, whole.right)
    return Finished(squares=found, record=record), scaled


def _base_square(planned: TensorPlan, inputs: Inputs) -> float:
    """Return ‖W₀‖² of a tensor, a piece of which is in memory at a time."""
    starts = range(0, planned.elements, PIECE)
    spans = [(start, min(start + PIECE, planned.elements)) for start in starts]
    return math.fsum(square(read_base(planned, inputs, *span)) for span in spans)


def _parts(
    planned: TensorPlan, inputs: Inputs, deltas: LowRankStack
) -> Iterator[tuple[str, slice, Context]]:
    """Yield (label, rows, context) of each matrix that a method sees of a tensor."""
    context = context_of(planned)
    if planned.needs:
        context = replace(context, statistics=statistics_of(planned, inputs))
    if planned.post is None and get_method(planned.method).elementwise:
        yield "", slice(None), context  # entries do not look at the part that they lie in
        return
    for part, rows in planned.row_parts(deltas.shape[1]):
        if not part:
            yield part, rows, context
            continue
        known = part_statistics(planned, inputs, context.statistics, rows)
        yield part, rows, replace(context, tensor=context.tensor + part, statistics=known)


def _cut(
    planned: TensorPlan,
    carried: Carried,
    inputs: Inputs,
    change: Tensor | LowRank,
    told: dict[str, Any],
) -> Compressed:
    """Return the change as balanced factors of the rank and energy that are asked for.

    What a cut in the metric of the inputs loses of the outputs is noted in `told`.
    """
    seed = context_of(planned).seed_for("adapter")
    most, energy = carried.rank, carried.energy
    lossless = most is None and energy is None
    if lossless:
        most = thin_rank(planned, inputs)
        if isinstance(change, LowRank):
            fewer = _without_loss(change, most, seed)
            if fewer is not None:
                return fewer
    moment = mean_moment(planned, inputs) if planned.cut_in_inputs else None
    flat = _is_flat(planned, "plain" if moment is None else "inputs") and not lossless
    if moment is not None or flat:
        among = _experts_shifts(planned, inputs, moment is None) if flat else []
        how: dict[str, Any] = {"rank": most, "energy": energy, "seed": seed, "among": among}
        metric = moment or _even(planned, inputs)
        nearest = compressed_by_shift(change, metric, **how)
        if moment is not None:
            told[LOST_SHIFT] = nearest.lost
        return nearest.factors
    found = compressed(change, rank=most, energy=energy, seed=seed)
    if lossless and found.lost > LOSSLESS:
        raise NumericalError(
            f"{planned.name}: what {planned.method} makes of the experts' factors has more than "
            f"{most} directions; at that rank {found.lost:.2g} of its energy is lost.\n"
            "Choose a rank, or rank: auto with an energy."
        )
    return found


def _without_loss(change: LowRank, rank: int, seed: int) -> Compressed | None:
    """Return a change at a rank, or at its own where it has more; None where that is no thin one.

    Matrices of a fused one that stand below each other are given with as many factors each.
    """
    whole = Compressed(change.left, change.right, 0.0)
    if whole.rank <= rank:
        return whole
    found = compressed(change, rank=rank, seed=seed)
    if found.lost <= LOSSLESS:
        return found
    return whole if whole.rank <= min(change.shape) else None


def _is_flat(planned: TensorPlan, metric: str) -> bool:
    """Tell whether all directions of a merge are alike, so that the experts say which to keep."""
    alone = planned.post is None and planned.compress is None and not planned.layout.stacked
    return alone and get_method(planned.method).flat_in == metric


def _even(planned: TensorPlan, inputs: Inputs) -> SecondMoment:
    """Return the second moment of inputs that are all alike."""
    width = planned.matrix_shapes[0][1]
    return SecondMoment(torch.ones(width, dtype=torch.float64, device=inputs.device))


def _experts_shifts(planned: TensorPlan, inputs: Inputs, plain: bool) -> list[Tensor]:
    """Return F_t of each expert, F_tF_tᵀ = w_t²Δ_tC_tΔ_tᵀ, by which a flat merge is cut.

    C_t is that of its inputs, or the identity.
    """
    deltas: Iterable[Tensor | LowRank] | None = thin_deltas(planned, inputs)
    if deltas is None:
        base = read_base(planned, inputs, 0, planned.elements)
        stack = read_stack(planned, inputs, (0, planned.elements), base, weights=False)
        deltas = as_map(stack, planned).to(inputs.device)
    found: list[Tensor] = []
    for place, delta in enumerate(deltas):
        moment = _even(planned, inputs) if plain else input_moment(planned, inputs, place)
        if moment is not None:
            found.append(planned.experts[place].weight * shift_of(delta, moment))
    return found


def _whole(
    planned: TensorPlan,
    inputs: Inputs,
    state: Any,
    late: tuple[ReadDelta, Mapping[str, float], Finished] | None,
    file: CheckpointWriter,
) -> tuple[Finished, bool]:
    """Write the merged tensor itself; tell whether it differs from the base's as it is stored."""
    changed = False

    def emit(start: int, values: Tensor) -> None:
        nonlocal changed
        base = read_base(planned, inputs, start, start + values.numel()).to(values.dtype)
        changed = changed or not torch.equal(base, values)
        file.write(WHOLE, start, values)

    emitted: Emit = emit
    if late is None:
        return merge_tensor(planned, inputs, emitted, state), changed
    read, factors, before = late
    scale_tensor(planned, inputs, emitted, read, factors)
    return (
        replace(
            before,
            record=with_factors(before.record, planned, factors),
            squares=squares_with_factors(before.squares, planned, factors),
        ),
        changed,
    )
