"""A merge before its scale is known: every delta once, in a scratch file; α comes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.output_format import TensorSink
from eutectic.errors import Note, RequestError
from eutectic.execution.journal import Ledger
from eutectic.execution.layer_factors import range_factor
from eutectic.execution.limits import Limits
from eutectic.execution.merging import holds_weight
from eutectic.execution.tensor_values import block_ranges, read_base
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensor_plan import TensorPlan


@dataclass(frozen=True)
class Unscaled:
    """A merge whose deltas are finished and whose α is still to be chosen.

    Attributes:
        plan: the plan; its scale is not decided.
        inputs: the opened base and experts.
        deltas: scratch file of what `merge_unscaled` emitted.
        factors: matrix -> factor of its delta besides α; see `layer_factors`.
        journal: the run's ledger, where a search may note what it has measured.
        limits: threads, memory, and whom to tell of progress.
    """

    plan: Plan
    inputs: Inputs
    deltas: TensorSink
    factors: Mapping[str, float]
    journal: Ledger
    limits: Limits

    def base(self, planned: TensorPlan) -> Tensor:
        """Return W₀ in the tensor's shape and the dtype of the arithmetic."""
        return read_base(planned, self.inputs, 0, planned.elements).view(planned.shape)

    def delta(self, planned: TensorPlan) -> Tensor:
        """Return Δ, so that the merged tensor is W₀ + α·Δ, in the tensor's shape."""
        flat = torch.empty(planned.elements, dtype=planned.compute)
        weights = holds_weight(planned)
        for start, stop in block_ranges(planned):
            chunk = self.deltas.read_back(planned.name, start, stop)
            if weights:
                chunk = chunk - read_base(planned, self.inputs, start, stop)
            flat[start:stop] = chunk * range_factor(planned, self.factors, start, stop)
        return flat.view(planned.shape)


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


def refuse_search(plan: Plan) -> None:
    """Refuse a plan whose scale is still to be searched.

    Raises:
        RequestError: it is.
    """
    if plan.search is not None:
        raise RequestError(
            f"the scale is a search ({plan.search.search}), and this takes a number.\n"
            "Search with eutectic tune, or merge with eutectic merge or eutectic.merge."
        )
