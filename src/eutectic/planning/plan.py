"""From a recipe and opened inputs to one treatment per tensor, with every fault at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from eutectic.checkpoint.adapters import WEIGHT_NAMES
from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import Fault, MethodError, Note, RecipeError
from eutectic.methods import Method, get_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.merge_request import MergeRequest, StatedRequest, stated_request
from eutectic.planning.notes import notes_on
from eutectic.planning.statistics_match import statistics_faults, statistics_names
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.planning.tensors import plan_tensor, with_method
from eutectic.planning.treatment import is_copy, tied_to
from eutectic.recipes.load import Source
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.types import Treatment
from eutectic.words import few


@dataclass(frozen=True)
class OutputOptions:
    """What is decided of the output as a whole.

    Attributes:
        dtype: of all floating-point tensors; None where each keeps its own.
        heads: what becomes of the experts' heads.
        side_files: "base", or the expert whose config and tokenizer files are copied.
        shard_bytes: most bytes of tensors in one file; None where files are the base's.
    """

    dtype: torch.dtype | None
    heads: Literal["per_expert", "base", "drop"]
    side_files: str
    shard_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """A merge, decided. Its tensors own what decides their bytes; the rest is told of the whole.

    Attributes:
        method: the recipe's method.
        parameters: its checked parameters.
        scale: α where no rule says otherwise; while it is to be searched, the method's default.
        search: how α is to be chosen; None where it is a number.
        tensors: one entry per tensor of the output, in file order.
        heads: expert -> tensors kept for it alone.
        left_out: tensors of the base that the output does not hold (`heads: drop`).
        output: what is decided of the output as a whole.
        request: what was asked for, for the card and the journal.
        notes: what a user should know: alignments, tensors that nobody changes, fall-backs.
    """

    method: Method
    parameters: Any
    scale: float
    search: ScaleSearch | None
    tensors: tuple[TensorPlan, ...]
    heads: Mapping[str, tuple[TensorEntry, ...]]
    left_out: tuple[str, ...]
    output: OutputOptions
    request: StatedRequest
    notes: tuple[Note, ...]

    @property
    def merged(self) -> list[TensorPlan]:
        """The tensors that are not copied."""
        return [t for t in self.tensors if t.merged]


def make_plan(recipe: Recipe, inputs: Inputs, source: Source | None = None) -> Plan:
    """Decide what becomes of every tensor, from headers alone.

    Raises:
        RecipeError: listing every tensor and expert that cannot be merged as asked.
    """
    source = source or Source()
    faults: list[Fault] = []
    _check_kinship(inputs, source, faults)
    _check_shards(recipe, inputs, source, faults)
    request = _request(recipe, inputs, source)
    if recipe.statistics_of == "expert":
        faults += statistics_faults(inputs, request.statistics_names)
    planned = [plan_tensor(entry, request) for entry in inputs.base.entries.values()]
    faults += [fault for fault in planned if isinstance(fault, Fault)]
    _refuse(faults, source)
    tensors = [with_method(t, request) for t in planned if not isinstance(t, Fault)]
    _refuse(_unfit(tensors), source)
    heads = _heads(recipe, inputs, tensors)
    left_out = ()
    if recipe.heads == "drop":
        left_out = tuple(t.name for t in tensors if t.treatment is Treatment.HEAD)
        tensors = [t for t in tensors if t.treatment is not Treatment.HEAD]
    method, parameters = request.method, request.parameters
    if method.prepare is not None and method.model_scope(parameters):
        _refuse_partial(tensors, request)
    if not any(t.merged for t in tensors):
        nothing = Fault("nothing_to_merge", "no tensor would be merged: every one is copied.")
        raise RecipeError([nothing], source.name)
    return Plan(
        method=method,
        parameters=parameters,
        scale=request.scale,
        search=recipe.scale if isinstance(recipe.scale, ScaleSearch) else None,
        tensors=tuple(tensors),
        heads=heads,
        left_out=left_out,
        output=OutputOptions(
            getattr(torch, recipe.dtype) if recipe.dtype else None,
            recipe.heads,
            recipe.side_files,
            recipe.shard_size,
        ),
        request=stated_request(recipe),
        notes=tuple(notes_on(tensors, heads, left_out, request)),
    )


def with_scale(plan: Plan, scale: float, note: Note) -> Plan:
    """Return the plan with a number in place of a search for α; rules keep theirs.

    `note` says where the number came from.
    """
    return replace(
        plan,
        scale=scale,
        search=None,
        tensors=tuple(replace(t, scale=scale) if t.tunable else t for t in plan.tensors),
        notes=(*plan.notes, note),
    )


def _request(recipe: Recipe, inputs: Inputs, source: Source) -> MergeRequest:
    method = get_method(recipe.method)
    scale = recipe.scale
    if scale is None or isinstance(scale, ScaleSearch):
        scale = method.default_scale(len(inputs.experts))
    own = {
        name: method.parse({**recipe.parameters, **spec.parameters})
        for name, spec in recipe.experts.items()
        if spec.parameters
    }
    return MergeRequest(
        recipe=recipe,
        inputs=inputs,
        document=source,
        method=method,
        parameters=method.parse(dict(recipe.parameters)),
        scale=scale,
        own_parameters=own,
        tied=tied_to(inputs.base),
        statistics_names={n: statistics_names(s, inputs) for n, s in inputs.statistics.items()},
    )


def _refuse(faults: Sequence[Fault], source: Source) -> None:
    if faults:
        raise RecipeError(_shortened(faults), source.name)


def _check_shards(recipe: Recipe, inputs: Inputs, source: Source, faults: list[Fault]) -> None:
    """Refuse shards of an adapter."""
    adapter = inputs.index is not None and inputs.index.files[0] in WEIGHT_NAMES
    if recipe.shard_size is not None and adapter:
        faults.append(
            Fault(
                "adapter_in_shards",
                "the output is an (IA)³ adapter, which PEFT reads from one file.",
                "shard_size",
                source.line("shard_size"),
                next="Leave shard_size out.",
            )
        )


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


def _unfit(tensors: Sequence[TensorPlan]) -> list[Fault]:
    """Return what is wrong with the number or the weights of the experts that hold a tensor."""
    faults: list[Fault] = []
    seen: set[tuple[str, tuple[tuple[str, float], ...]]] = set()
    for planned in tensors:
        held = (planned.method, tuple((s.owner, s.weight) for s in planned.experts))
        if not planned.merged or held in seen:
            continue
        seen.add(held)
        method = get_method(planned.method)
        try:
            method.check_expert_count(len(planned.experts))
        except MethodError as error:
            choose = "Choose missing: base, which counts an expert without the tensor as unchanged."
            faults.append(Fault("expert_count", str(error), planned.name, next=choose))
            continue
        weights = [source.weight for source in planned.experts]
        fault = None if method.check is None else method.check(planned.parameters, weights)
        if fault is not None:
            faults.append(Fault("method_check", fault, planned.name))
    return faults


def _refuse_partial(tensors: Sequence[TensorPlan], request: MergeRequest) -> None:
    """Refuse tensors that some expert lacks, for a method that looks at the whole model at once."""
    name, count = request.method.name, len(request.inputs.experts)
    partial = [t.name for t in tensors if t.method == name and len(t.experts) < count]
    if partial:
        raise RecipeError(
            [
                Fault(
                    "missing_tensor",
                    f"method '{name}' looks at the whole model at once, but some expert "
                    f"lacks {few(partial)}.",
                    next="Choose missing: base, which counts it as unchanged.",
                )
            ],
            request.document.name,
        )


def _heads(
    recipe: Recipe, inputs: Inputs, tensors: Sequence[TensorPlan]
) -> dict[str, tuple[TensorEntry, ...]]:
    """Return, per expert, the head tensors that it has."""
    if recipe.heads != "per_expert":
        return {}
    shared = [t.name for t in tensors if t.treatment is Treatment.HEAD]
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
