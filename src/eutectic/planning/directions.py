"""How each tensor is merged: as the recipe says of all of them, or of this one alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eutectic.errors import Fault, Note
from eutectic.methods import get_method
from eutectic.planning.inputs import MergeRequest
from eutectic.planning.tensor_plan import COPY, Layout, Source, TensorPlan
from eutectic.planning.tensors import with_method
from eutectic.recipes.script import Direction
from eutectic.types import Treatment


def directed(planned: TensorPlan, request: MergeRequest) -> TensorPlan | list[Fault]:
    """Return the plan of a tensor with its method, parameters, weights and α."""
    script = request.script
    if script is None or planned.treatment in (Treatment.COPY, Treatment.HEAD):
        return with_method(planned, request)
    found = script.direct(
        request.place(_named(planned, request)), tuple(s.owner for s in planned.experts)
    )
    if isinstance(found, list):
        return found
    if found.method == COPY:
        reason = (Note("base_alone"),)
        copied = replace(planned, treatment=Treatment.COPY, experts=(), reason=reason)
        return with_method(copied, request)
    if not found.from_base and (faults := _apart(planned, request)):
        return faults
    planned = _with_sources(planned, found)
    method = get_method(found.method)
    scale = request.scale if found.scale is None else found.scale
    if found.scale is not None and planned.tunable:
        planned = replace(planned, scale=scale, tunable=False)
    own = replace(
        request,
        method=method,
        parameters=found.parameters,
        own_parameters=found.own,
        scale=scale,
    )
    if not found.whole:
        return with_method(planned, own)
    experts = tuple(replace(s, parameters=found.own.get(s.owner)) for s in planned.experts)
    return replace(
        planned,
        method=method.name,
        parameters=found.parameters,
        layout=Layout(whole=True),
        experts=experts,
        scale=scale if planned.tunable else planned.scale,
    )


def _apart(planned: TensorPlan, request: MergeRequest) -> list[Fault]:
    """Refuse adapters without a model where models are merged as they are."""
    experts = request.inputs.experts
    alone = [s.owner for s in planned.experts if experts[s.owner].is_delta]
    what = "is an adapter, and models are merged as they are here, not their differences."
    choose = "Name the model that it belongs to: {path: MODEL, adapter: PATH}, or model+adapter."
    lines = request.document
    return [
        Fault("adapter_alone", what, f"expert '{n}'", lines.line("experts", n), next=choose)
        for n in alone
    ]


def _named(planned: TensorPlan, request: MergeRequest) -> str:
    """Return the name by which a tensor is asked for: a tied one by that of its partner."""
    ties = request.ties
    if request.inputs.rows or planned.name in ties.apart:
        return planned.name
    return ties.partner.get(planned.name, planned.name)


def _with_sources(planned: TensorPlan, found: Direction) -> TensorPlan:
    """Return the plan with every model's weight, and with a base or without one."""
    experts = [replace(s, weight=found.weights.get(s.owner, s.weight)) for s in planned.experts]
    if "base" in found.weights and planned.base is not None:
        weight = found.weights["base"]
        experts.insert(0, Source("base", planned.base.tensor, planned.base.rows, weight))
    like = "" if planned.base is None else planned.base.tensor or ""
    base = planned.base if found.from_base else None
    return replace(planned, experts=tuple(experts), base=base, like=like)


def first_direction(request: MergeRequest) -> Direction | None:
    """Return what the recipe says of the first tensor of which it says anything."""
    script = request.script
    assert script is not None
    for name, entry in request.inputs.base.entries.items():
        taking = tuple(request.taking(name))
        if not taking or not entry.dtype.is_floating_point:
            continue
        found: Any = script.direct(request.place(name), taking)
        if isinstance(found, Direction) and found.method != COPY:
            return found
    return None
