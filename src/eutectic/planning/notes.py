"""What a user should know of a plan."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from eutectic.checkpoint.folder import survey
from eutectic.checkpoint.index import TensorEntry
from eutectic.conventions import classification_head
from eutectic.conventions_adapters import VERA_PROJECTIONS, adapter_part
from eutectic.conventions_patterns import fits
from eutectic.conventions_quantised import is_called_quantised
from eutectic.errors import Note
from eutectic.methods.core_space import TiesInBasisParameters, most_entries
from eutectic.methods.registry import all_methods
from eutectic.planning import coverage
from eutectic.planning.fallbacks import FALLEN, fallen_share, option_for
from eutectic.planning.inputs import Inputs, MergeRequest
from eutectic.planning.kin import kinship
from eutectic.planning.mistakes import mistakes
from eutectic.planning.shares import Shares
from eutectic.planning.statistics_match import lacks, unknown_origin
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.recipes.schema import Recipe
from eutectic.types import Treatment

Difference = tuple[int, str, str]  # an output, its class, and its class in the reference

_NAMELESS = re.compile(r"LABEL_\d+")


def label_warnings(tensors: Sequence[TensorPlan], recipe: Recipe, inputs: Inputs) -> list[Note]:
    """Return a warning where one head is merged from outputs that stand for other classes.

    Class names are those of the config.json files; names may differ and mean the same, so that this
    is no fault.
    """
    classes = {"the base": class_names(inputs.config)}
    classes |= {f"'{name}'": class_names(e.config) for name, e in inputs.experts.items()}
    donor = "the base" if recipe.side_files == "base" else f"'{recipe.side_files}'"
    found: dict[tuple[str, tuple[tuple[str, Difference], ...]], list[str]] = {}
    for planned in tensors:
        if planned.treatment in (Treatment.COPY, Treatment.HEAD):
            continue
        if not planned.shape or classification_head(planned.name) is None:
            continue
        owners = [source.owner for source in planned.experts]
        having = [f"'{n}'" for n in owners if planned.name in inputs.experts[n].entries]
        # The model whose label2id the output keeps comes first, if it names its classes.
        order = sorted(dict.fromkeys(["the base", *having]), key=lambda owner: owner != donor)
        known = [(o, n) for o in order if (n := classes[o]) and len(n) == planned.shape[0]]
        if not known:
            continue
        (owner, wanted), *others = known
        differ = tuple((o, _difference(n, wanted)) for o, n in others if n != wanted)
        if differ:
            found.setdefault((owner, differ), []).append(planned.name)
    return [
        Note(
            "mixed_classes",
            tuple(names),
            {
                "reference": owner,
                "differ": dict(differ),
                "heads": tuple(dict.fromkeys(f"{classification_head(name)}.*" for name in names)),
            },
            level="warning",
        )
        for (owner, differ), names in found.items()
    ]


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return a model's class names in the order of its outputs, None where it names none.

    `LABEL_0` and the like, which transformers makes up, are no names, nor is that of one output.
    """
    names, numbers = config.get("id2label"), config.get("label2id")
    if isinstance(names, Mapping):
        pairs = [(i, name) for i, name in cast("Mapping[Any, Any]", names).items()]
    elif isinstance(numbers, Mapping):
        pairs = [(i, name) for name, i in cast("Mapping[Any, Any]", numbers).items()]
    else:
        return None
    try:
        by_index = {int(i): str(name).strip().casefold() for i, name in pairs}
    except (TypeError, ValueError):
        return None
    if len(by_index) < 2 or set(by_index) != set(range(len(by_index))):
        return None
    if any(_NAMELESS.fullmatch(str(name)) for _, name in pairs):
        return None
    return tuple(by_index[i] for i in range(len(by_index)))


def _difference(names: tuple[str, ...], wanted: tuple[str, ...]) -> Difference:
    pairs = enumerate(zip(names, wanted, strict=True))
    return next((i, own, other) for i, (own, other) in pairs if own != other)


def notes_on(
    tensors: Sequence[TensorPlan],
    heads: Mapping[str, tuple[TensorEntry, ...]],
    left_out: Sequence[str],
    shares: Shares,
    request: MergeRequest,
) -> list[Note]:
    """Return warnings, alignments, tensors that nobody changes, heads, idle rules, fall-backs."""
    recipe, inputs = request.recipe, request.inputs
    method, parameters = request.method, request.parameters
    notes = [*label_warnings(tensors, recipe, inputs), *inputs.notes]
    notes += recipe.script.notes if recipe.script is not None else ()
    for name, expert in inputs.experts.items():
        if expert.alignment.strip and expert.alignment.add:
            if expert.alignment.strip != expert.alignment.add:
                notes.append(
                    Note("other_prefix", (name, expert.alignment.strip, expert.alignment.add))
                )
        elif expert.alignment.strip:
            notes.append(Note("extra_prefix", (name, expert.alignment.strip)))
        elif expert.alignment.add:
            notes.append(Note("lacking_prefix", (name, expert.alignment.add)))
        for read in expert.alignment.readings:
            notes.append(Note("read_as", (name, read.own, read.base), {"count": read.count}))
        if copies := expert.alignment.copies:
            notes.append(Note("repeated", copies, {"expert": name}))

    notes += _on_quantised(inputs)
    notes += _drawn_again(inputs)
    notes += _odd_factors(inputs)
    notes += _trimmed_away(tensors, inputs)
    notes += request.ties.notes

    def tell(kind: str, subject: Iterable[str], numbers: Mapping[str, Any] | None = None) -> None:
        names = tuple(subject)
        if names:
            notes.append(Note(kind, names, numbers or {}))

    def of_base(names: Sequence[str]) -> float:
        return coverage.numbers(names, inputs.base.entries) / max(shares.base, 1)

    notes += named_bases(recipe, inputs)
    notes += _untaken(tensors, request)
    notes += mistakes(request)
    notes += kinship(tensors, request)
    absent = _because({"in_no_expert"}, tensors)
    tell("copied", absent, {"share": of_base(absent)})
    for name, expert in inputs.experts.items():
        if recipe.heads != "per_expert":
            extra = [k for k in expert.extra if k not in request.ties.explained[name]]
            tell("extra_left_out", extra, {"expert": name, "heads": recipe.heads})
        lacking = (k for k in expert.missing if request.ties.source(name, expert, k) is None)
        missing = [k for k in lacking if k not in absent]
        numbers = {"expert": name, "missing": recipe.missing, "share": of_base(missing)}
        tell("expert_lacks", missing, numbers)
        own = shares.experts[name]
        share = own.left / max(own.numbers, 1)
        tell("left_alone", own.left_tensors, {"expert": name, "share": share})
    tell("heads_kept", heads, {n: tuple(e.name for e in own) for n, own in heads.items()})
    tell("heads_left_out", left_out)
    if inputs.index is not None:
        found = survey(inputs.index.folder, inputs.index.weight_files)
        tell("side_files_left", found.left)
    held = {*inputs.base.entries}.union(*(expert.extra for expert in inputs.experts.values()))
    patterns = [rule.match for rule in recipe.tensors]
    tell("idle_rules", [p for p in patterns if not any(fits(n, p) for n in held)])
    notes += _ignored(tensors, recipe, inputs)
    if inputs.index is not None:
        tell("no_tensors", inputs.index.skipped)
    for name, statistics in inputs.statistics.items():
        if unknown_origin(statistics, inputs.experts[name]):
            notes.append(Note("unproven_statistics", (name,)))
    fallen = _because(FALLEN, tensors)
    if fallen:
        fallback, share = method.fallback(parameters), fallen_share(tensors, request)
        kind = "own_fallback" if fallback == method.name else "fallback"
        mostly = share["share"] > 0.5
        level = "warning" if mostly else "note"
        notes.append(Note(kind, fallen, {**share, "method": fallback}, level))
        if not inputs.statistics:
            notes.append(Note("statistics_needed", numbers={"method": method.name}))
        for name, statistics in inputs.statistics.items():
            for need in sorted(method.needs(parameters) - {"base"}):
                if all(lacks(statistics, own, {need}) for own in statistics):
                    tell("uncollected", (name,), {"need": need, "option": option_for(need)})
    return notes


def _on_quantised(inputs: Inputs) -> list[Note]:
    """Return what was dequantised, owners of the same together, and which adapters are on it."""
    held = {"the base": inputs.base.notes}
    held |= {f"expert '{name}'": e.source.notes for name, e in inputs.experts.items()}
    if inputs.initial is not None:
        held["init"] = inputs.initial.source.notes
    owners: dict[str, tuple[Note, list[str]]] = {}
    for owner, own in held.items():
        for note in own:
            owners.setdefault(f"{note.kind} {note.numbers}", (note, []))[1].append(owner)
    notes = [replace(note, subject=tuple(names)) for note, names in owners.values()]
    if any(note.kind == "dequantised" for note in inputs.base.notes):
        adapters = (name for name, expert in inputs.experts.items() if expert.is_delta)
        notes += [Note("adapter_on_quantised", (name,)) for name in adapters]
    else:
        for name, expert in inputs.experts.items():
            trained_on = expert.config.get("base_model_name_or_path") if expert.is_delta else None
            if isinstance(trained_on, str) and is_called_quantised(trained_on):
                numbers = {"trained_on": trained_on}
                notes.append(Note("adapter_of_quantised", (name,), numbers))
    return notes


def _drawn_again(inputs: Inputs) -> list[Note]:
    """Return which adapters have projections that are drawn from a seed, since no file has them."""
    notes: list[Note] = []
    for name, expert in inputs.experts.items():
        if expert.is_delta and expert.config.get("peft_type") == "VERA":
            held = {part[1] for key in expert.source.entries if (part := adapter_part(key))}
            if not held & VERA_PROJECTIONS:
                seed = expert.config.get("projection_prng_key", 0)
                notes.append(Note("projections_drawn", (name,), {"seed": seed}))
    return notes


def _odd_factors(inputs: Inputs) -> list[Note]:
    """Return which adapters are scaled by 0, and which have more directions than a layer has."""
    notes: list[Note] = []
    for name, expert in inputs.experts.items():
        factored = expert.factored
        if factored and all(own.scaling == 0 for own in factored.values()):
            notes.append(Note("scaled_by_zero", (name,), level="warning"))
        sides = {n: min(expert.entries[n].shape[:2]) for n in factored if n in expert.entries}
        above = {n: r for n in sides if (r := factored[n].a.shape[0]) > sides[n]}
        if above:
            first, rank = next(iter(above.items()))
            numbers = {"rank": rank, "side": sides[first], "count": len(above)}
            notes.append(Note("rank_above_layer", (name, first), numbers))
    return notes


def _trimmed_away(tensors: Sequence[TensorPlan], inputs: Inputs) -> list[Note]:
    """Return a warning where a core is so small that its density keeps no entry of any expert.

    The number of entries is a bound: factors that depend on each other have a smaller core.
    """
    found: dict[tuple[str, float], dict[str, int]] = {}
    for planned in tensors:
        if not planned.merged or not isinstance(planned.parameters, TiesInBasisParameters):
            continue
        ranks = [
            source.tensor and inputs.owner(source).inner_rank(source.tensor)
            for source in planned.experts
        ]
        given = [s.parameters or planned.parameters for s in planned.experts if s.weight]
        density = max((p.density for p in given), default=0.0)
        sizes: list[int] = []
        for shape in planned.matrix_shapes:
            rank = sum(min(shape) if own is None else int(own or 0) for own in ranks)
            sizes.append(most_entries(planned.method, shape, rank) or 0)
        if all(entries and int(density * entries) < 1 for entries in sizes):
            found.setdefault((planned.method, density), {})[planned.name] = max(sizes)
    notes: list[Note] = []
    for (method, density), entries in found.items():
        told: dict[str, Any] = {"method": method, "density": density, "count": len(entries)}
        told["entries"] = most = max(entries.values())
        told["least"] = math.ceil(1000 / most) / 1000
        notes.append(Note("trimmed_away", tuple(entries), told, level="warning"))
    return notes


def _untaken(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[Note]:
    """Return a warning where no tensor takes the method that was asked for."""
    merged_by = Counter(t.method for t in tensors if t.merged)
    if request.method.name in merged_by or _because(FALLEN, tensors):
        return []
    numbers = {"method": request.method.name, "merged_by": dict(merged_by.most_common())}
    return [Note("untaken", numbers=numbers, level="warning")]


def named_bases(recipe: Recipe, inputs: Inputs) -> list[Note]:
    """Return a note for every adapter whose configuration names a base of another name.

    Names alone do not tell two models apart: folders are renamed, and hubs hold copies.
    """
    place = None if inputs.paths is None else inputs.paths.base
    called = {recipe.reference, str(inputs.config.get("_name_or_path") or "")}
    called |= {part.replace("--", "/") for part in ([] if place is None else place.parts[-3:])}
    known = {_last(name) for name in called if name}
    notes: list[Note] = []
    for name, expert in inputs.experts.items():
        stated = expert.trained_on
        if not stated or _last(stated) in known:
            continue
        numbers = {"stated": stated, "base": _last(recipe.reference)}
        notes.append(Note("other_base_named", (name,), numbers, level="warning"))
    return notes


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def _because(kinds: Collection[str], tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    """Return the tensors that are treated as they are for a reason of such a kind."""
    return tuple(t.name for t in tensors if any(r.kind in kinds for r in t.reason))


def _ignored(tensors: Sequence[TensorPlan], recipe: Recipe, inputs: Inputs) -> list[Note]:
    """Return what of the recipe some tensors cannot follow."""
    notes: list[Note] = []
    for planned in tensors:
        partner = planned.seed_name
        follows = any(reason.kind in ("tied", "tied_by_base") for reason in planned.reason)
        if follows and _rules(recipe, planned.name) != _rules(recipe, partner):
            notes.append(Note("rules_of_tied", (planned.name, partner)))
    for_all = {m.name: m for m in all_methods().values() if m.elementwise and m.prepare is not None}
    split = [t for t in tensors if t.layout.split and t.method in for_all]
    whole = [t for t in split if for_all[t.method].prepares(t.parameters)]
    if whole:
        names = tuple(t.name for t in whole)
        notes.append(Note("split_ignored", names, {"method": whole[0].method}))
    if recipe.side_files in inputs.experts:
        held = inputs.experts[recipe.side_files].entries
        other = tuple(t.name for t in tensors if t.name in held and held[t.name].shape != t.shape)
        if other:
            notes.append(Note("side_files_shape", other, {"expert": recipe.side_files}))
    return notes


def _rules(recipe: Recipe, name: str) -> list[str]:
    return [rule.match for rule in recipe.tensors if fits(name, rule.match)]
