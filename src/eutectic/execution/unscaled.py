"""A merge before its scale is known: every delta once, in a scratch file; α comes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.writer import CheckpointWriter
from eutectic.errors import Note
from eutectic.execution.compute import holds_weight
from eutectic.execution.factors import range_factor
from eutectic.execution.jobs import Ledger, Limits, Sink
from eutectic.execution.stages import delta_layout, merged_tensors, run_unscaled
from eutectic.planning.inputs import Inputs
from eutectic.planning.journal import Journal, request_identity
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import block_ranges, read_base


@dataclass(frozen=True)
class Unscaled:
    """A merge whose deltas are finished and whose α is still to be chosen.

    Attributes:
        plan: the plan; its scale is not decided.
        inputs: the opened base and experts.
        deltas: scratch file of what `merge_unscaled` emitted.
        factors: matrix -> factor of its delta besides α; see `execution.factors`.
        journal: the run's ledger, where a search may note what it has measured.
        limits: threads, memory, and whom to tell of progress.
    """

    plan: Plan
    inputs: Inputs
    deltas: Sink
    factors: Mapping[str, float]
    journal: Ledger
    limits: Limits

    def base(self, planned: TensorPlan) -> Tensor:
        """Return W₀ in the tensor's shape and the dtype of the arithmetic."""
        return read_base(planned, self.inputs, 0, planned.elements).view(planned.entry.shape)

    def delta(self, planned: TensorPlan) -> Tensor:
        """Return Δ, so that the merged tensor is W₀ + α·Δ, in the tensor's shape."""
        flat = torch.empty(planned.elements, dtype=planned.compute)
        weights = holds_weight(planned, self.plan)
        for start, stop in block_ranges(planned):
            chunk = self.deltas.read_back(planned.name, start, stop)
            if weights:
                chunk = chunk - read_base(planned, self.inputs, start, stop)
            flat[start:stop] = chunk * range_factor(planned, self.factors, start, stop)
        return flat.view(planned.entry.shape)


@dataclass(frozen=True)
class Choice:
    """A chosen α.

    Attributes:
        scale: α.
        note: where it comes from, for the model card.
        record: the whole search, JSON-serialisable; `search` in the output's `eutectic.json`.
    """

    scale: float
    note: Note
    record: dict[str, Any]


Choose = Callable[[Unscaled], Choice]
# Takes what is known before any work and raises RequestErrors; see eutectic.tuning.
Chooser = Callable[[Plan, Inputs], Choose]


@contextmanager
def unscaled_merge(
    folder: Path, plan: Plan, inputs: Inputs, journal: Ledger, limits: Limits
) -> Iterator[Unscaled]:
    """Merge into a scratch file in `folder`, before α; finished tensors are kept."""
    layout = delta_layout(merged_tensors(plan))
    with CheckpointWriter(folder, [layout], resume=(folder / layout.name).exists()) as deltas:
        factors = run_unscaled(plan, inputs, deltas, journal, limits)
        yield Unscaled(plan, inputs, deltas, factors, journal, limits)


@contextmanager
def unscaled_folder(
    folder: Path, plan: Plan, inputs: Inputs, limits: Limits, restart: bool = False
) -> Iterator[Unscaled]:
    """Merge into a scratch folder of its own, before α, for any number of searches.

    The folder stays. The same recipe finds its deltas there again, whatever it says of the scale.

    Raises:
        ResumeError: the folder is not of this recipe and these inputs.
    """
    plain = replace(plan, recipe=plan.recipe.model_copy(update={"scale": None}))
    identity = request_identity(_at_one(plain), inputs)
    with (
        Journal(folder, identity, restart=restart) as journal,
        unscaled_merge(folder, plan, inputs, journal, limits) as unscaled,
    ):
        yield unscaled


def _at_one(plan: Plan) -> Plan:
    """Return the plan with α = 1 wherever it is the recipe's."""
    tensors = tuple(replace(t, scale=1.0) if t.tunable else t for t in plan.tensors)
    return replace(plan, scale=1.0, tensors=tensors)
