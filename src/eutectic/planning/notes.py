"""What a user should know of a plan, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from eutectic.checkpoint.folder import module_weights
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.names import AS_THEY_ARE
from eutectic.methods import Method, get_method
from eutectic.planning.collected import lacks, unknown_origin
from eutectic.planning.inputs import Inputs
from eutectic.planning.labels import label_warnings
from eutectic.planning.tensors import TensorPlan
from eutectic.recipes.schema import Recipe

_OPTIONS = {
    "output_gradient_gram": "--output-gradients",
    "fisher_diagonal": "--fisher",
    "block_fisher": "--block-fisher",
}


def notes_on(
    tensors: Sequence[TensorPlan],
    heads: Mapping[str, tuple[TensorEntry, ...]],
    left_out: Sequence[str],
    recipe: Recipe,
    inputs: Inputs,
    method: Method,
    parameters: Any,
) -> list[str]:
    """Return warnings, alignments, tensors that nobody changes, heads, idle rules, fall-backs."""
    notes = label_warnings(tensors, recipe, inputs)
    notes += [
        f"expert '{n}': {e.alignment}"
        for n, e in inputs.experts.items()
        if e.alignment != AS_THEY_ARE
    ]
    absent = [t.name for t in tensors if t.decision.reason == "no expert has it"]
    if absent:
        notes.append(f"copied from the base, since no expert has them: {some(absent)}")
    for name, expert in inputs.experts.items():
        if expert.extra and recipe.heads != "per_expert":
            notes.append(
                f"expert '{name}' has tensors that the base lacks, left out because of heads: "
                f"{recipe.heads}: {some(list(expert.extra))}"
            )
        missing = [k for k in expert.missing if k not in absent]
        if missing:
            notes.append(f"expert '{name}' lacks (missing: {recipe.missing}): {some(missing)}")
    if heads:
        listed = "; ".join(f"{n}: {some([e.name for e in own])}" for n, own in heads.items())
        notes.append(f"heads kept per expert: {listed}")
    if left_out:
        notes.append(f"heads left out of the output: {some(list(left_out))}")
    modules = module_weights(inputs.index.folder) if inputs.index is not None else ()
    if modules:
        notes.append(f"module weights copied from the base, not merged: {some(modules)}")
    idle = [r.match for r in recipe.tensors if not _matches_any(r.match, inputs)]
    if idle:
        notes.append(f"rules that match no tensor: {some(idle)}")
    notes += _ignored(tensors, recipe, inputs)
    if inputs.index is not None and inputs.index.skipped:
        notes.append(f"entries of the base that are no tensors: {some(inputs.index.skipped)}")
    for name, statistics in inputs.statistics.items():
        if unknown_origin(statistics, inputs.experts[name]):
            notes.append(
                f"statistics of '{name}' do not prove that they are of this expert; they may be "
                "of another checkpoint"
            )
    fallback = method.fallback(parameters)
    fallen = [t.name for t in tensors if "; no statistics of" in t.decision.reason]
    if fallen:
        rule = fallback if fallback != method.name else f"{fallback}'s own rule for such tensors"
        notes.append(f"without statistics, merged by {rule}: {some(fallen)}")
        if not inputs.statistics:
            notes.append(
                f"no expert has statistics, and {method.name} needs them: "
                "collect them (eutectic collect) and name them with --statistics, or in the recipe"
            )
        notes += _uncollected(inputs, method, parameters)
    return notes


def _ignored(tensors: Sequence[TensorPlan], recipe: Recipe, inputs: Inputs) -> list[str]:
    """Say what of the recipe some tensors cannot follow."""
    notes: list[str] = []
    for planned in tensors:
        partner = planned.seed_name
        if partner != planned.name and _rules(recipe, planned.name) != _rules(recipe, partner):
            notes.append(
                f"'{planned.name}' is a copy of '{partner}' and takes the rules of that, not those "
                "that match its own name"
            )
    whole = [t for t in tensors if t.decision.split and t.method != "copy" and _sees_all(t.method)]
    if whole:
        notes.append(
            f"split plays no part in {whole[0].method}, which looks at a tensor as a whole: "
            f"{some([t.name for t in whole])}"
        )
    if recipe.side_files in inputs.experts:
        held = inputs.experts[recipe.side_files].entries
        other = [t.name for t in tensors if t.name in held and held[t.name].shape != t.entry.shape]
        if other:
            notes.append(
                f"side_files: the configuration of '{recipe.side_files}' may not fit the output, "
                f"where these have the base's shape: {some(other)}"
            )
    return notes


def _rules(recipe: Recipe, name: str) -> list[str]:
    return [rule.match for rule in recipe.tensors if fnmatchcase(name, rule.match)]


def _sees_all(method: str) -> bool:
    own = get_method(method)
    return own.elementwise and own.prepare is not None


def _uncollected(inputs: Inputs, method: Method, parameters: Any) -> list[str]:
    """Say which experts' statistics hold nothing of a kind that the method needs."""
    notes: list[str] = []
    for name, statistics in inputs.statistics.items():
        for need in sorted(method.needs(parameters) - {"base"}):
            if all(lacks(statistics, own, {need}) for own in statistics):
                option = _OPTIONS.get(need)
                how = f": collect them with {option}" if option else ""
                notes.append(f"the statistics of '{name}' hold no {need} at all{how}")
    return notes


def _matches_any(pattern: str, inputs: Inputs) -> bool:
    held = (inputs.base.entries, *(expert.extra for expert in inputs.experts.values()))
    return any(fnmatchcase(name, pattern) for names in held for name in names)


def some(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
