"""The public entry: a merge of state dicts in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from eutectic.checkpoint.memory import MemoryWriter
from eutectic.errors import RequestError
from eutectic.execution.limits import limits_of
from eutectic.execution.recipe_options import sorted_options
from eutectic.execution.schedule import Desk, run_schedule
from eutectic.execution.tasks import Finished
from eutectic.planning.inputs import in_memory_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe
from eutectic.types import LayerStatistics


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    method: str,
    weights: Mapping[str, float] | None = None,
    statistics: Mapping[str, Mapping[str, LayerStatistics]] | None = None,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory by the same plan and arithmetic as files.

    Args:
        base: name -> tensor of the base model.
        experts: name -> state dict.
        method: a name from `eutectic.methods()`.
        weights: name -> w_t (default 1).
        statistics: name -> statistics, for methods that use data.
        threads: jobs side by side.
        config: the base's `config.json` as a mapping (`model.config.to_dict()`). GPT-2 and its
            relatives keep some matrices as [in, out], which only their `model_type` tells.
        **options: other keys of a recipe (`scale`, `tensors`, `dtype`, `missing`, …) or the
            method's parameters.

    Returns:
        The merged state dict: the base's keys, order, shapes and dtypes, in new memory. Heads are
        the base's.

    Raises:
        RequestError: the request is wrong.
        NumericalError: NaN or Inf in an expert.
    """
    weights = dict(weights or {})
    unknown = [name for name in {**weights, **(statistics or {})} if name not in experts]
    if unknown:
        raise RequestError(f"weights or statistics name experts that are not given: {unknown}.")
    specs = {n: {"path": "memory", "weight": weights.get(n, 1.0)} for n in experts}
    values = {"base": "memory", "experts": specs, "method": method, "heads": "base", **options}
    recipe = check_recipe(sorted_options(values))
    inputs = in_memory_inputs(base, experts, statistics or {}, config)
    plan = make_plan(recipe, inputs)
    sink = MemoryWriter([(t.name, t.dtype, t.shape) for t in plan.tensors])
    desk = Desk(
        inputs,
        _Recollection(),
        limits_of(threads, None),
        open_deltas=lambda layout: nullcontext(MemoryWriter(layout.entries)),
        open_output=lambda plan: nullcontext(sink),
    )
    run_schedule(plan, desk)
    return sink.tensors


class _Recollection:
    """The ledger of a merge in memory: it ends with the process."""

    durable = False

    def __init__(self) -> None:
        self.finished: dict[tuple[str, str], Finished] = {}

    def add(self, stage: str, tensor: str, finished: Finished) -> None:
        self.finished[stage, tensor] = finished
