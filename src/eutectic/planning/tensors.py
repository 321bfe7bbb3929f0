"""One tensor of the base: its treatment, where it is kept, and the method that merges it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.conventions import PARTS, is_counter, is_output_vocabulary, is_packed
from eutectic.conventions_heads import is_output_layer
from eutectic.conventions_patterns import fits
from eutectic.errors import Fault, Note
from eutectic.methods import get_method
from eutectic.planning.inputs import MergeRequest
from eutectic.planning.kernels import rows_apart, with_kernels
from eutectic.planning.statistics_match import lacks
from eutectic.planning.tensor_plan import Source, TensorPlan
from eutectic.planning.treatment import Decision, decide
from eutectic.types import Treatment

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plan_tensor(entry: TensorEntry, request: MergeRequest) -> TensorPlan | Fault:
    """Decide one tensor, or return its fault; the method follows in `with_method`."""
    recipe, ties = request.recipe, request.ties
    partner = ties.partner.get(entry.name, entry.name)
    decision = _decide(entry, partner, request)
    if isinstance(decision, Fault):
        return decision
    decision = with_kernels(entry, decision, request)
    having: dict[str, TensorEntry] = {}
    lacking: list[str] = []
    taking = request.taking(entry.name)
    kept = {name: ties.source(name, expert, entry.name) for name, expert in taking.items()}
    for name, expert in taking.items():
        own = kept[name]
        found = None if own is None else expert.entries.get(own) or expert.extra.get(own)
        if found is not None:
            having[name] = found
        elif own is None:
            lacking.append(name)
    decision = _meet_experts(entry, decision, having, lacking, request)
    if isinstance(decision, Fault):
        return decision
    fixed = decision.treatment in (Treatment.COPY, Treatment.HEAD)
    if not fixed and (fault := _dtype_fault(entry, having)):
        return fault
    left_out = lacking if recipe.missing == "available" else []
    owners = [name for name in taking if name not in left_out]
    dtypes = [entry.dtype, *(e.dtype for e in having.values())]
    wide = torch.float64 in dtypes or recipe.dtype == "float64"
    floating = entry.dtype.is_floating_point
    free = decision.ruled or is_counter(entry.name)
    return TensorPlan(
        name=entry.name,
        shape=entry.shape,
        dtype=getattr(torch, recipe.dtype) if recipe.dtype and floating else entry.dtype,
        compute=torch.float64 if wide else torch.float32,
        treatment=decision.treatment,
        reason=decision.reason,
        layout=decision.layout,
        base=Source("base", ties.added.get(entry.name, entry.name)),
        experts=tuple(_expert_source(name, kept[name], entry.name, request) for name in owners),
        scale=1.0 if decision.scale is None else decision.scale,
        tunable=decision.scale is None,
        seed=recipe.seed,
        seed_name=partner,
        precision=recipe.precision,
        nonfinite=recipe.nonfinite,
        must_agree=decision.treatment is Treatment.COPY and not floating and not free,
    )


def _decide(entry: TensorEntry, partner: str, request: MergeRequest) -> Decision | Fault:
    """Decide a tensor of the base; a tied one as the tensor that it is a copy of.

    One that an expert unties follows the rules that match its own name, if there are any.
    """
    rules, config, held = request.recipe.tensors, request.inputs.config, request.inputs.base.entries
    apart = entry.name in request.ties.apart
    if partner == entry.name or (apart and any(fits(entry.name, r.match) for r in rules)):
        return decide(entry, rules, config, held)
    decision = decide(replace(entry, name=partner), rules, config, held)
    if isinstance(decision, Fault):
        return decision
    return decision.because(Note("tied_by_base" if apart else "tied", (partner,)))


def source_in(owner: str, expert: Expert, name: str, partner: str) -> Source:
    """Return where a merged checkpoint keeps a tensor: under its name, or its tied partner's.

    An adapter that does not act on the tensor still has it: its change there is zero.
    """
    own = name in expert.entries or name in expert.extra
    held = own or expert.is_delta or partner in expert.entries
    return Source(owner, (name if own else partner) if held else None)


_NONE: Mapping[str, str] = {}  # one for all: there are as many sources as tensors times experts


def _expert_source(owner: str, kept: str | None, name: str, request: MergeRequest) -> Source:
    own = request.statistics_names.get(owner)
    parts = (
        {part: own[name + part] for part in ("", *PARTS) if name + part in own} if own else _NONE
    )
    weight = request.recipe.experts[owner].weight
    weight = weight if isinstance(weight, (int, float)) else 1.0  # the script says each tensor's
    return Source(owner, kept, weight=weight, statistics=parts)


def _meet_experts(
    entry: TensorEntry,
    decision: Decision,
    having: Mapping[str, TensorEntry],
    lacking: Sequence[str],
    request: MergeRequest,
) -> Decision | Fault:
    """Adjust a decision to what the experts hold of this tensor."""
    fixed = decision.treatment in (Treatment.COPY, Treatment.HEAD)
    shapes = {name: e.shape for name, e in having.items() if e.shape != entry.shape}
    if _empty(entry, shapes, decision):
        return Fault("other_shape", "has no numbers on one side.", entry.name)
    if shapes and not fixed:
        listed = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
        table = decision.treatment is Treatment.EMBEDDING or is_output_vocabulary(entry.name)
        alike = table and all(shape[-1:] == entry.shape[-1:] for shape in shapes.values())
        alone = request.recipe.adapter_options is not None and len(request.inputs.experts) == 1
        if alike and alone:  # an adapter keeps the expert's whole table, with its further rows
            grown = {n: str(list(s)) for n, s in shapes.items()}
            differ = Note("other_shape", tuple(shapes), grown)
            return decision.because(differ, treatment=Treatment.HEAD)
        if alike:
            return Fault(
                "table_size",
                f"the base has {list(entry.shape)}, but {listed}. Tables of different size cannot "
                "be merged row by row.",
                entry.name,
                next="Match rows by their tokens (vocabulary: union, base, intersection or an "
                "expert's name), or keep each expert's own: add a rule: treatment head.",
            )
        if not is_output_layer(entry.name):
            return Fault("other_shape", f"another shape: {listed}.", entry.name)
        differ = Note("other_shape", tuple(shapes), {n: str(list(s)) for n, s in shapes.items()})
        return decision.because(differ, treatment=Treatment.HEAD)
    if shapes and decision.treatment is Treatment.COPY and not entry.dtype.is_floating_point:
        what = f"{entry.dtype} buffer of shape {list(entry.shape)} differs: {shapes}."
        return Fault("buffer", what, entry.name)
    if fixed:
        return decision
    if not having:
        absent = len(lacking) == len(request.taking(entry.name))
        reason = Note("in_no_expert") if absent else Note("unchanged_by_adapters")
        return decision.because(reason, treatment=Treatment.COPY)
    if lacking and request.recipe.missing == "error":
        return Fault(
            "missing_tensor",
            f"missing from {', '.join(lacking)}.",
            entry.name,
            request.document.line("experts", lacking[0]),
            next="Choose missing: base (count it as unchanged) or missing: available.",
        )
    return decision


def _empty(entry: TensorEntry, shapes: Mapping[str, tuple[int, ...]], decision: Decision) -> bool:
    """Tell whether one side holds no numbers of a tensor that is to be merged, or a head by shape.

    An empty tensor of the base is copied, but not where an expert has numbers for it.
    """
    if decision.ruled or not entry.dtype.is_floating_point:
        return False
    return any((0 in shape) != (0 in entry.shape) for shape in shapes.values())


def _dtype_fault(entry: TensorEntry, having: Mapping[str, TensorEntry]) -> Fault | None:
    for owner, dtype in [("the base", entry.dtype), *((n, e.dtype) for n, e in having.items())]:
        if dtype not in _FLOATS:
            return Fault(
                "dtype",
                f"{owner} holds {dtype}, which cannot be merged.",
                entry.name,
                allowed="float16, bfloat16, float32, float64",
                next="Save it in one of these, or keep each expert's by a rule: treatment head.",
            )
    return None


def with_method(planned: TensorPlan, request: MergeRequest) -> TensorPlan:
    """Name the method that merges the tensor, with its parameters and α.

    A diagonal Fisher weighs entry by entry, so tables and convolutions have one as matrices do.
    Copies of a tied table are merged alike: statistics know it by one of its names only.
    """
    treatment, method, parameters = planned.treatment, request.method, request.parameters
    if treatment in (Treatment.COPY, Treatment.HEAD):
        return replace(planned, scale=1.0, tunable=False)
    chosen = method.name
    reason = planned.reason
    needs = {n for n in method.needs(parameters) if n != "base"}
    if treatment is not Treatment.MATRIX and not method.elementwise:
        has_rule = method.vectors and treatment is Treatment.VECTOR
        if needs == {"fisher_diagonal"} and not has_rule:
            tied = request.ties.partner
            has_rule = planned.name not in {*tied, *tied.values()}
            reason += () if has_rule else (Note("averaged_as_tied"),)
        chosen = method.name if has_rule else "average"
    elif rows_apart(planned) and not (method.in_entries(parameters) or method.each_row):
        chosen, reason = "average", (*reason, Note("kernels_of_one_row"))
    if chosen == method.name and needs and planned.layout.stacked:
        chosen = method.fallback(parameters)
        reason += (Note("no_statistics_of_stacks"),)
    elif chosen == method.name and needs:
        lacking = _experts_without(planned, needs, request)
        if lacking and is_packed(planned.name):
            lacking = experts_without(planned, needs, request)
            if not lacking:
                reason += (Note("split_by_inputs"),)
                planned, lacking = _in_parts(planned)
        if lacking:
            chosen = method.fallback(parameters)
            reason += (Note("no_statistics", tuple(lacking)),)
    own = get_method(chosen)
    is_matrix = treatment is Treatment.MATRIX
    plain = request.recipe.scale_tensors == "matrix" and not is_matrix
    experts, initial, start = planned.experts, None, request.inputs.initial
    if own is method:
        particular = request.own_parameters
        if particular:
            experts = tuple(replace(s, parameters=particular.get(s.owner)) for s in experts)
        if start is not None:
            initial = Source("initial", request.ties.source("initial", start, planned.name))
    return replace(
        planned,
        method=chosen,
        parameters=parameters if own is method else own.parameters(),
        post=request.post if is_matrix else None,
        experts=experts,
        reason=reason,
        scale=request.scale if planned.tunable and not plain else planned.scale,
        tunable=planned.tunable and not plain,
        compared=method.finish is not None and is_matrix and not own.elementwise,
        initial=initial,
    )


def _in_parts(planned: TensorPlan) -> tuple[TensorPlan, list[str]]:
    """Split a packed in-projection into query, key and value, whose statistics are apart.

    A rule may cut them further. One that cuts across them leaves no expert with statistics.
    """
    third = planned.shape[0] // len(PARTS)
    heights = planned.layout.split or (third,) * len(PARTS)
    if not {third, 2 * third} <= set(accumulate(heights)):
        return planned, [source.owner for source in planned.experts]
    return replace(planned, layout=replace(planned.layout, split=heights)), []


def experts_without(planned: TensorPlan, needs: set[str], request: MergeRequest) -> list[str]:
    """Return the experts that lack what is needed of a tensor, be it of one of its parts."""
    lacking = _experts_without(planned, needs, request)
    if lacking and is_packed(planned.name):
        parts = [_experts_without(planned, needs, request, part) for part in PARTS]
        lacking = list(dict.fromkeys(name for part in parts for name in part))
    return lacking


def _experts_without(
    planned: TensorPlan, needs: set[str], request: MergeRequest, part: str = ""
) -> list[str]:
    """Return the experts that lack what is needed of a tensor, or of a part of it."""
    held = request.inputs.statistics
    return [
        s.owner
        for s in planned.experts
        if all(lacks(held.get(s.owner), s.statistics.get(p), needs) for p in (part, ""))
    ]
