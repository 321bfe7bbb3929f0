"""From a recipe and opened inputs to one treatment per tensor, with every fault at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import Fault, MethodError, Note, RecipeError
from eutectic.methods import Method, get_method
from eutectic.planning.assignment import with_method
from eutectic.planning.collected import statistics_faults, statistics_names
from eutectic.planning.inputs import Inputs
from eutectic.planning.notes import notes_on
from eutectic.planning.tensors import TensorPlan, plan_tensor
from eutectic.planning.ties import is_copy, tied_to
from eutectic.recipes.load import Source
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.types import Treatment
from eutectic.words import few


@dataclass(frozen=True)
class Plan:
    """A merge, decided.

    Attributes:
        recipe: what was asked for.
        method: the method's table entry.
        parameters: its checked parameters.
        scale: α where no rule says otherwise; while it is to be searched, the method's default.
        tensors: one entry per tensor of the output, in file order.
        heads: expert -> tensors kept for it alone.
        left_out: tensors of the base that the output does not hold (`heads: drop`).
        statistics_names: expert -> base name -> name in its statistics file.
        notes: what a user should know: alignments, tensors that nobody changes, fall-backs.
    """

    recipe: Recipe
    method: Method
    parameters: Any
    scale: float
    tensors: tuple[TensorPlan, ...]
    heads: Mapping[str, tuple[TensorEntry, ...]]
    left_out: tuple[str, ...]
    statistics_names: Mapping[str, Mapping[str, str]]
    notes: tuple[Note, ...]


def make_plan(recipe: Recipe, inputs: Inputs, source: Source | None = None) -> Plan:
    """Decide what becomes of every tensor, from headers alone.

    Raises:
        RecipeError: listing every tensor and expert that cannot be merged as asked.
    """
    source = source or Source()
    method = get_method(recipe.method)
    parameters = method.parse(dict(recipe.parameters))
    scale = recipe.scale
    if scale is None or isinstance(scale, ScaleSearch):
        scale = method.default_scale(len(inputs.experts))
    faults: list[Fault] = []
    _check_kinship(inputs, source, faults)
    names = {n: statistics_names(s, inputs) for n, s in inputs.statistics.items()}
    if recipe.statistics_of == "expert":
        faults += statistics_faults(inputs, names)
    tied = tied_to(inputs.base)
    tensors: list[TensorPlan] = []
    for entry in inputs.base.entries.values():
        planned = plan_tensor(entry, recipe, inputs, source, tied)
        if isinstance(planned, Fault):
            faults.append(planned)
        else:
            tensors.append(planned)
    if faults:
        raise RecipeError(_shortened(faults), source.name)
    tensors = [
        with_method(t, method, parameters, scale, recipe, inputs.statistics, names, tied)
        for t in tensors
    ]
    faults += _unfit(tensors, method, parameters, recipe)
    if faults:
        raise RecipeError(_shortened(faults), source.name)
    heads = _heads(recipe, inputs, tensors)
    left_out = ()
    if recipe.heads == "drop":
        left_out = tuple(t.name for t in tensors if t.decision.treatment is Treatment.HEAD)
        tensors = [t for t in tensors if t.decision.treatment is not Treatment.HEAD]
    if method.prepare is not None and method.model_scope(parameters):
        _refuse_partial(tensors, method, inputs, source)
    if not any(t.method != "copy" for t in tensors):
        nothing = Fault("nothing_to_merge", "no tensor would be merged: every one is copied.")
        raise RecipeError([nothing], source.name)
    notes = notes_on(tensors, heads, left_out, recipe, inputs, method, parameters)
    return Plan(
        recipe, method, parameters, scale, tuple(tensors), heads, left_out, names, tuple(notes)
    )


def with_scale(plan: Plan, scale: float, note: Note) -> Plan:
    """Return the plan with a number in place of a search for α; rules keep theirs.

    `note` says where the number came from.
    """
    tensors = tuple(replace(t, scale=scale) if t.tunable else t for t in plan.tensors)
    recipe = plan.recipe.model_copy(update={"scale": scale})
    return replace(plan, recipe=recipe, scale=scale, tensors=tensors, notes=(*plan.notes, note))


def method_of(planned: TensorPlan, plan: Plan) -> tuple[Method, Any]:
    """Return the method that merges a tensor: the recipe's, or a fall-back at its defaults."""
    return _resolved(planned.method, plan.method, plan.parameters)


def _resolved(name: str, method: Method, parameters: Any) -> tuple[Method, Any]:
    own = get_method(name)
    return own, parameters if own is method else own.parameters()


def _check_kinship(inputs: Inputs, source: Source, faults: list[Fault]) -> None:
    """Refuse experts whose tensors mostly differ in shape: they come from another base."""
    for name, expert in inputs.experts.items():
        shared = [(k, e) for k, e in expert.entries.items() if k in inputs.base.entries]
        differ = [k for k, e in shared if inputs.base.entries[k].shape != e.shape]
        if shared and 2 * len(differ) > len(shared):
            first = differ[0]
            what = (
                f"expert '{name}' is not of this base: {len(differ)} of {len(shared)} tensors have "
                f"another shape, such as {first} {list(expert.entries[first].shape)} against "
                f"{list(inputs.base.entries[first].shape)}."
            )
            faults.append(Fault("another_base", what, line=source.line("experts", name)))


def _unfit(
    tensors: Sequence[TensorPlan], method: Method, parameters: Any, recipe: Recipe
) -> list[Fault]:
    """Return what is wrong with the number or the weights of the experts that hold a tensor."""
    faults: list[Fault] = []
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for planned in tensors:
        if planned.method == "copy" or (planned.method, planned.experts) in seen:
            continue
        seen.add((planned.method, planned.experts))
        own, chosen = _resolved(planned.method, method, parameters)
        try:
            own.check_expert_count(len(planned.experts))
        except MethodError as error:
            choose = "Choose missing: base, which counts an expert without the tensor as unchanged."
            faults.append(Fault("expert_count", str(error), planned.name, next=choose))
            continue
        weights = [recipe.experts[name].weight for name in planned.experts]
        fault = None if own.check is None else own.check(chosen, weights)
        if fault is not None:
            faults.append(Fault("method_check", fault, planned.name))
    return faults


def _refuse_partial(
    tensors: Sequence[TensorPlan], method: Method, inputs: Inputs, source: Source
) -> None:
    """Refuse tensors that some expert lacks, for a method that looks at the whole model at once."""
    partial = [
        t.name for t in tensors if t.method == method.name and len(t.experts) < len(inputs.experts)
    ]
    if partial:
        raise RecipeError(
            [
                Fault(
                    "missing_tensor",
                    f"method '{method.name}' looks at the whole model at once, but some expert "
                    f"lacks {few(partial)}.",
                    next="Choose missing: base, which counts it as unchanged.",
                )
            ],
            source.name,
        )


def _heads(
    recipe: Recipe, inputs: Inputs, tensors: Sequence[TensorPlan]
) -> dict[str, tuple[TensorEntry, ...]]:
    """Return, per expert, the head tensors that it has."""
    if recipe.heads != "per_expert":
        return {}
    shared = [t.name for t in tensors if t.decision.treatment is Treatment.HEAD]
    heads: dict[str, tuple[TensorEntry, ...]] = {}
    for name, expert in inputs.experts.items():
        own = [replace(expert.entries[k], name=k) for k in shared if k in expert.entries]
        own += [replace(e, name=k) for k, e in expert.extra.items() if not is_copy(expert, k)]
        if own:
            heads[name] = tuple(own)
    return heads


def _shortened(faults: Sequence[Fault], limit: int = 30) -> list[Fault]:
    if len(faults) <= limit:
        return list(faults)
    return [*faults[:limit], Fault("more", f"and {len(faults) - limit} more of the same kind.")]
