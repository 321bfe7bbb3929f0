"""The matrices of a base, its experts and merged models, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.errors import NumericalError, RequestError
from eutectic.execution.tensor_values import as_map, read_base, read_delta
from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.statistics_match import lacks
from eutectic.planning.tensor_plan import Source, TensorPlan
from eutectic.planning.tensors import source_in
from eutectic.types import LayerStatistics, Treatment

_GRAM = frozenset({"gram"})


@dataclass(frozen=True, eq=False)
class LayerMatrices:
    """One matrix of the model in every checkpoint, as the linear map [out, in] that methods see."""

    name: str  # the tensor, with `[block][part]` for stacks and fused matrices
    base_norm: float  # ‖W₀‖_F
    deltas: Mapping[str, Tensor]  # expert -> Δ_t
    factors: Mapping[str, LowRank]  # expert -> thin factors of Δ_t, of adapters that store them
    merged: Mapping[str, Tensor]  # merged model -> Δ_M, the scale included
    records: Mapping[str, LayerStatistics]  # expert -> statistics with a Gram, where there are any

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        rows, columns = next(iter(self.deltas.values())).shape
        return rows, columns


def selected_layers(
    plan: Plan, merged: Mapping[str, Expert], pattern: str | None
) -> list[TensorPlan]:
    """Return the plan's matrices that match a shell pattern; every merged model has them."""
    every = [t for t in plan.tensors if t.treatment is Treatment.MATRIX]
    chosen = [t for t in every if pattern is None or fnmatchcase(t.name, pattern)]
    if not chosen:
        raise RequestError(
            "no matrix to inspect: no expert changes one."
            if not every
            else f"--layers '{pattern}' matches none of {len(every)} matrices, such as "
            f"{every[0].name}."
        )
    for name, model in merged.items():
        absent = [t.name for t in chosen if not _holds(model, t)]
        if absent:
            raise RequestError(
                f"merged model '{name}' lacks {len(absent)} of {len(chosen)} matrices, or has "
                f"them in another shape, such as {absent[0]}.\n"
                "Name a merge of this base, or leave those layers out with --layers."
            )
    return chosen


def stream_matrices(
    planned: TensorPlan, inputs: Inputs, merged: Mapping[str, Expert]
) -> Iterator[LayerMatrices]:
    """Yield every matrix of one tensor: blocks of a stack, parts of a fused matrix, or itself.

    Memory: one block of the base, of every expert and of every merged model.
    """
    blocks, size = planned.blocks
    records = _records(planned, inputs)
    factors = {} if planned.layout.stacked else _factors(planned, inputs)
    for block in range(blocks):
        start = block * size
        base = read_base(planned, inputs, start, start + size)
        weight = as_map(base, planned)
        deltas = {
            s.owner: _map_of(inputs.owner(s), s, planned, start, base) for s in planned.experts
        }
        models = {
            n: _map_of(m, source_in(n, m, planned.name, planned.seed_name), planned, start, base)
            for n, m in merged.items()
        }
        suffix = f"[{block}]" if blocks > 1 else ""
        for label, rows in planned.row_parts(len(weight)):
            yield LayerMatrices(
                planned.name + suffix + label,
                lapack.norm(weight[rows], torch.float64),
                {n: delta[rows] for n, delta in deltas.items()},
                {n: LowRank(f.left[rows], f.right) for n, f in factors.items()},
                {n: delta[rows] for n, delta in models.items()},
                records,
            )


def _map_of(model: Expert, source: Source, planned: TensorPlan, start: int, base: Tensor) -> Tensor:
    """Read one block of a model as the map Δ [out, in]; `base` is that block, flat."""
    flat = read_delta(model, source, start, base)
    if not finite(flat):
        raise NumericalError(
            f"{planned.name}: NaN or Inf in '{source.owner}' or in the base.\n"
            "Repair the checkpoint, or leave the layer out with --layers."
        )
    return as_map(flat, planned)


def _holds(model: Expert, planned: TensorPlan) -> bool:
    found = source_in("", model, planned.name, planned.seed_name).tensor
    if found is None or found not in model.entries:
        return model.is_delta
    return model.entries[found].shape == planned.shape


def _factors(planned: TensorPlan, inputs: Inputs) -> dict[str, LowRank]:
    """Return the factors of adapters whose rank is low enough to be worth it."""
    found: dict[str, LowRank] = {}
    for source in planned.experts:
        pair = inputs.owner(source).factors(source.tensor or "")
        if pair is None:
            continue
        left, right = pair
        if planned.layout.transpose:
            left, right = right.mT, left.mT
        if 4 * left.shape[1] <= min(len(left), right.shape[1]):
            found[source.owner] = LowRank(left, right)
    return found


def _records(planned: TensorPlan, inputs: Inputs) -> dict[str, LayerStatistics]:
    if planned.layout.stacked:
        return {}  # the blocks see different inputs
    return {
        source.owner: statistics.read(inside, _GRAM)
        for source in planned.experts
        if (statistics := inputs.statistics.get(source.owner)) is not None
        and (inside := source.statistics.get("")) is not None
        and not lacks(statistics, inside, _GRAM)
    }
