"""From a recipe and opened inputs to one treatment per tensor, with every fault at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.folder import module_weights
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.names import AS_THEY_ARE
from eutectic.errors import RecipeError
from eutectic.methods import Method, get_method
from eutectic.planning.collected import (
    PARTS,
    is_packed,
    lacks,
    statistics_faults,
    statistics_names,
    unknown_origin,
)
from eutectic.planning.inputs import Inputs, Statistics
from eutectic.planning.ties import tied_to
from eutectic.planning.treatment import Decision, decide
from eutectic.recipes.load import Source
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.types import Treatment

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorPlan:
    """What will be done to one tensor of the base.

    Attributes:
        entry: the tensor in the base.
        decision: treatment, reason and layout.
        method: the method that merges it, or "copy".
        experts: the experts that take part.
        scale: α.
        dtype: of the output.
        compute: dtype of the arithmetic.
        seed_name: name that seeds random numbers; a tied tensor shares its partner's.
        tunable: α is the recipe's, which a search may choose, not that of a rule.
    """

    entry: TensorEntry
    decision: Decision
    method: str
    experts: tuple[str, ...]
    scale: float
    dtype: torch.dtype
    compute: torch.dtype
    seed_name: str
    tunable: bool = False

    @property
    def name(self) -> str:
        """The tensor's name in the base."""
        return self.entry.name

    @property
    def elements(self) -> int:
        """Number of entries."""
        return self.entry.numel


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
    notes: tuple[str, ...]


def make_plan(recipe: Recipe, inputs: Inputs, source: Source | None = None) -> Plan:
    """Decide what becomes of every tensor, from headers alone.

    Raises:
        RecipeError: listing every tensor and expert that cannot be merged as asked.
    """
    source = source or Source()
    method = get_method(recipe.method)
    values = dict(recipe.parameters)
    parameters = method.parse(values)
    scale = recipe.scale
    if scale is None or isinstance(scale, ScaleSearch):
        scale = method.default_scale(len(inputs.experts))
    faults: list[str] = []
    notes = [
        f"expert '{n}': {e.alignment}"
        for n, e in inputs.experts.items()
        if e.alignment != AS_THEY_ARE
    ]
    _check_kinship(inputs, source, faults)
    names = {n: statistics_names(s, inputs) for n, s in inputs.statistics.items()}
    if recipe.statistics_of == "expert":
        faults += statistics_faults(inputs, names)
    tied = tied_to(inputs.base)
    tensors: list[TensorPlan] = []
    for entry in inputs.base.entries.values():
        planned = _plan_tensor(entry, recipe, inputs, source, tied)
        if isinstance(planned, str):
            faults.append(planned)
        else:
            tensors.append(planned)
    if faults:
        raise RecipeError(_shortened(faults), source.name)
    tensors = [
        _with_method(t, method, parameters, scale, recipe, inputs.statistics, names)
        for t in tensors
    ]
    heads = _heads(recipe, inputs, tensors)
    left_out = ()
    if recipe.heads == "drop":
        left_out = tuple(t.name for t in tensors if t.decision.treatment is Treatment.HEAD)
        tensors = [t for t in tensors if t.decision.treatment is not Treatment.HEAD]
    if method.prepare is not None and method.model_scope(parameters):
        partial = [
            t.name
            for t in tensors
            if t.method == method.name and len(t.experts) < len(inputs.experts)
        ]
        if partial:
            raise RecipeError(
                [
                    f"method '{method.name}' looks at the whole model at once, but some expert "
                    f"lacks {_some(partial)}. Choose missing: base, which counts it as unchanged."
                ],
                source.name,
            )
    if not any(t.method != "copy" for t in tensors):
        raise RecipeError(["no tensor would be merged: every one is copied."], source.name)
    notes += _notes(tensors, heads, left_out, recipe, inputs, method, parameters)
    return Plan(
        recipe, method, parameters, scale, tuple(tensors), heads, left_out, names, tuple(notes)
    )


def with_scale(plan: Plan, scale: float, note: str) -> Plan:
    """Return the plan with a number in place of a search for α; rules keep theirs.

    `note` says where the number came from.
    """
    tensors = tuple(replace(t, scale=scale) if t.tunable else t for t in plan.tensors)
    recipe = plan.recipe.model_copy(update={"scale": scale})
    return replace(plan, recipe=recipe, scale=scale, tensors=tensors, notes=(*plan.notes, note))


def _plan_tensor(
    entry: TensorEntry,
    recipe: Recipe,
    inputs: Inputs,
    source: Source,
    tied: Mapping[str, str],
) -> TensorPlan | str:
    """Decide one tensor; the method follows in `_with_method`."""
    rule_entry = replace(entry, name=tied.get(entry.name, entry.name))
    decision = decide(rule_entry, recipe.tensors, inputs.config)
    if isinstance(decision, str):
        return decision
    if entry.name in tied:
        decision = replace(decision, reason=f"tied to {tied[entry.name]}")
    partner = tied.get(entry.name, entry.name)
    having = {
        n: e.entries[own]
        for n, e in inputs.experts.items()
        if (own := stored_name(e, entry.name, partner)) in e.entries
    }
    lacking = [n for n, e in inputs.experts.items() if n not in having and entry.name in e.missing]
    decision = _meet_experts(entry, decision, having, lacking, recipe, inputs, source)
    if isinstance(decision, str):
        return decision
    merged = decision.treatment not in (Treatment.COPY, Treatment.HEAD)
    if merged:
        fault = _dtype_fault(entry, having)
        if fault:
            return fault
    takes_part = tuple(inputs.experts)
    if recipe.missing == "available":
        takes_part = tuple(n for n in inputs.experts if n not in lacking)
    dtypes = [entry.dtype, *(e.dtype for e in having.values())]
    wide = torch.float64 in dtypes or recipe.dtype == "float64"
    floating = entry.dtype.is_floating_point
    return TensorPlan(
        entry=entry,
        decision=decision,
        method="copy",
        experts=takes_part,
        scale=1.0,
        dtype=getattr(torch, recipe.dtype) if recipe.dtype and floating else entry.dtype,
        compute=torch.float64 if wide else torch.float32,
        seed_name=tied.get(entry.name, entry.name),
    )


def stored_name(expert: Expert, name: str, partner: str) -> str:
    """Return under which name an expert stores a tensor: its tied partner's, if it dropped it."""
    return name if name in expert.entries else partner


def _meet_experts(
    entry: TensorEntry,
    decision: Decision,
    having: Mapping[str, TensorEntry],
    lacking: Sequence[str],
    recipe: Recipe,
    inputs: Inputs,
    source: Source,
) -> Decision | str:
    """Adjust a decision to what the experts hold of this tensor."""
    fixed = decision.treatment in (Treatment.COPY, Treatment.HEAD)
    shapes = {name: e.shape for name, e in having.items() if e.shape != entry.shape}
    if shapes and not fixed:
        listed = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
        if decision.treatment is Treatment.EMBEDDING:
            return (
                f"{entry.name}: the base has {list(entry.shape)}, but {listed}. Tables of "
                "different size cannot be merged row by row; add a rule: treatment copy or head."
            )
        return replace(decision, treatment=Treatment.HEAD, reason=f"shape differs: {listed}")
    if shapes and decision.treatment is Treatment.COPY and not entry.dtype.is_floating_point:
        return f"{entry.name}: {entry.dtype} buffer of shape {list(entry.shape)} differs: {shapes}."
    if fixed:
        return decision
    if not having:
        if len(lacking) < len(inputs.experts):
            reason = "no adapter changes it"
        else:
            reason = "no expert has it"
        return replace(decision, treatment=Treatment.COPY, reason=reason)
    if lacking and recipe.missing == "error":
        return (
            f"{source.at('experts', lacking[0])}{entry.name}: missing from {', '.join(lacking)}. "
            "Choose missing: base (count it as unchanged) or missing: available."
        )
    return decision


def _dtype_fault(entry: TensorEntry, having: Mapping[str, TensorEntry]) -> str | None:
    for owner, dtype in [("the base", entry.dtype), *((n, e.dtype) for n, e in having.items())]:
        if dtype not in _FLOATS:
            return (
                f"{entry.name}: {owner} holds {dtype}, which cannot be merged. Allowed: float16, "
                "bfloat16, float32, float64; dequantise it first, or add a rule: treatment copy."
            )
    return None


def _with_method(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    scale: float,
    recipe: Recipe,
    statistics: Mapping[str, Statistics],
    names: Mapping[str, Mapping[str, str]],
) -> TensorPlan:
    """Name the method that merges the tensor: the recipe's, its fall-back, or the mean."""
    treatment = planned.decision.treatment
    if treatment in (Treatment.COPY, Treatment.HEAD):
        return planned
    chosen = method.name
    reason = planned.decision.reason
    if treatment is not Treatment.MATRIX and not method.elementwise:
        has_rule = method.vectors and treatment is Treatment.VECTOR
        chosen = method.name if has_rule else "average"
    needs = {n for n in method.needs(parameters) if n != "base"}
    if chosen == method.name and needs:
        lacking = _experts_without(planned, needs, statistics, names)
        if lacking and is_packed(planned.name):
            parts = [_experts_without(planned, needs, statistics, names, p) for p in PARTS]
            lacking = list(dict.fromkeys(name for part in parts for name in part))
            if not lacking:
                reason += "; query, key and value saw different inputs"
                planned, lacking = _in_parts(planned)
        if lacking:
            chosen = method.fallback(parameters)
            reason += f"; no statistics of {', '.join(lacking)}"
    alpha = planned.decision.scale
    plain = recipe.scale_tensors == "matrix" and treatment is not Treatment.MATRIX
    tunable = alpha is None and not plain
    if alpha is None:
        alpha = 1.0 if plain else scale
    return replace(
        planned,
        method=chosen,
        scale=alpha,
        tunable=tunable,
        decision=replace(planned.decision, reason=reason),
    )


def _in_parts(planned: TensorPlan) -> tuple[TensorPlan, list[str]]:
    """Split a packed in-projection into query, key and value, whose statistics are apart.

    A rule may cut them further. One that cuts across them leaves no expert with statistics.
    """
    third = planned.entry.shape[0] // len(PARTS)
    heights = planned.decision.split or (third,) * len(PARTS)
    if not {third, 2 * third} <= set(accumulate(heights)):
        return planned, list(planned.experts)
    return replace(planned, decision=replace(planned.decision, split=heights)), []


def _experts_without(
    planned: TensorPlan,
    needs: set[str],
    statistics: Mapping[str, Statistics],
    names: Mapping[str, Mapping[str, str]],
    part: str = "",
) -> list[str]:
    """Return the experts that lack what is needed of a tensor, or of a part of it."""
    lacking: list[str] = []
    for expert in planned.experts:
        own = names.get(expert, {})
        candidates = {own.get(planned.name + part), own.get(planned.name)}
        if all(lacks(statistics.get(expert, {}), name, needs) for name in candidates):
            lacking.append(expert)
    return lacking


def _check_kinship(inputs: Inputs, source: Source, faults: list[str]) -> None:
    """Refuse experts whose tensors mostly differ in shape: they come from another base."""
    for name, expert in inputs.experts.items():
        shared = [(k, e) for k, e in expert.entries.items() if k in inputs.base.entries]
        differ = [k for k, e in shared if inputs.base.entries[k].shape != e.shape]
        if shared and 2 * len(differ) > len(shared):
            first = differ[0]
            faults.append(
                f"{source.at('experts', name)}expert '{name}' is not of this base: "
                f"{len(differ)} of {len(shared)} tensors have another shape, such as {first} "
                f"{list(expert.entries[first].shape)} against "
                f"{list(inputs.base.entries[first].shape)}."
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
        own += [replace(e, name=k) for k, e in expert.extra.items()]
        if own:
            heads[name] = tuple(own)
    return heads


def _notes(
    tensors: Sequence[TensorPlan],
    heads: Mapping[str, tuple[TensorEntry, ...]],
    left_out: Sequence[str],
    recipe: Recipe,
    inputs: Inputs,
    method: Method,
    parameters: Any,
) -> list[str]:
    notes: list[str] = []
    absent = [t.name for t in tensors if t.decision.reason == "no expert has it"]
    if absent:
        notes.append(f"copied from the base, since no expert has them: {_some(absent)}")
    for name, expert in inputs.experts.items():
        if expert.extra and recipe.heads != "per_expert":
            notes.append(
                f"expert '{name}' has tensors that the base lacks, left out because of heads: "
                f"{recipe.heads}: {_some(list(expert.extra))}"
            )
        missing = [k for k in expert.missing if k not in absent]
        if missing:
            notes.append(f"expert '{name}' lacks (missing: {recipe.missing}): {_some(missing)}")
    if heads:
        listed = "; ".join(f"{n}: {_some([e.name for e in own])}" for n, own in heads.items())
        notes.append(f"heads kept per expert: {listed}")
    if left_out:
        notes.append(f"heads left out of the output: {_some(list(left_out))}")
    modules = module_weights(inputs.index.folder) if inputs.index is not None else ()
    if modules:
        notes.append(f"module weights copied from the base, not merged: {_some(modules)}")
    idle = [r.match for r in recipe.tensors if not _matches_any(r.match, inputs)]
    if idle:
        notes.append(f"rules that match no tensor: {_some(idle)}")
    if inputs.index is not None and inputs.index.skipped:
        notes.append(f"entries of the base that are no tensors: {_some(inputs.index.skipped)}")
    for name, statistics in inputs.statistics.items():
        if unknown_origin(statistics, inputs.experts[name]):
            notes.append(
                f"statistics of '{name}' do not prove that they are of this expert; they may be "
                "of another checkpoint"
            )
    fallback = method.fallback(parameters)
    fallen = [t.name for t in tensors if "; no statistics of" in t.decision.reason]
    if fallen:
        notes.append(f"without statistics, merged by {fallback}: {_some(fallen)}")
    return notes


def _matches_any(pattern: str, inputs: Inputs) -> bool:
    held = (inputs.base.entries, *(expert.extra for expert in inputs.experts.values()))
    return any(fnmatchcase(name, pattern) for names in held for name in names)


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _shortened(faults: Sequence[str], limit: int = 30) -> list[str]:
    if len(faults) <= limit:
        return list(faults)
    return [*faults[:limit], f"and {len(faults) - limit} more of the same kind."]
