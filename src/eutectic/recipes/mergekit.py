"""mergekit's configurations as recipes: `models`, `slices` and `modules`, with every parameter.

What a configuration means is mergekit 0.1.5's rule. Parameters are looked up from the narrowest
place to the widest: the source in a slice (or under `models`), the slice, the module, the document.
Filters are parts of a tensor's name, in the file or as transformers 5 has it in memory, in the
model's own numbering for parameters of one model, in the output's for shared ones. A list is spread
over the layers of its slice: the first value for the first layer, the last for the last; what
stands outside the layers takes the first value, and a slice of one layer the last. Tensors before
the layers are merged from the first slice's models, those behind them from the last one's.

Where mergekit's own rule is ill defined, this one is defined: see docs/guides/mergekit.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from eutectic.checkpoint.hub import hub_id
from eutectic.conventions_stacks import spellings
from eutectic.errors import Fault, Note, RecipeError, suggest
from eutectic.methods import all_methods
from eutectic.recipes.document import Source, by_line, exists, no_file
from eutectic.recipes.mergekit_document import (
    MergekitDocument,
    MergekitModule,
    MergekitSlice,
    MergekitSource,
    Reading,
    read_mergekit,
)
from eutectic.recipes.mergekit_methods import (
    METHODS,
    MergekitMethod,
    Translated,
    known_method,
    translate,
)
from eutectic.recipes.mergekit_models import MergekitModel, names_of
from eutectic.recipes.mergekit_tokenizer import vocabulary_fields
from eutectic.recipes.schema import ExpertSpec, Recipe
from eutectic.recipes.script import Band, Direction, Place, Script
from eutectic.recipes.settings import Scalar, Setting, Settings, first_value
from eutectic.storage import is_url

# Keys of our own recipes that a command may add to a configuration: none says what is merged.
OPTIONS = (
    *("seed", "precision", "heads", "missing", "unmatched", "nonfinite", "side_files"),
    *("shard_size", "tensors", "vocabulary", "chat_template"),
)


def check_mergekit(
    values: Mapping[str, Any],
    source: Source,
    faults: Sequence[Fault] = (),
    options: Mapping[str, Any] | None = None,
    stages: Mapping[str, str] | None = None,
) -> Recipe:
    """Return a configuration as a recipe with a script; RecipeError lists every fault.

    `options` are keys of ours that a command adds, `stages` the outputs of other documents by name.
    """
    reading = Reading(source, list(faults), [], stages or {})
    document = read_mergekit(values, reading)
    kind = None if document is None else _method(document.method, reading)
    if document is not None and kind is not None:
        document = with_base_listed(document, kind)
        _check_parameters(document, kind, reading)
        _check_models(document, kind, reading)
    if document is not None:
        _check_paths(document, reading)
    fields: dict[str, Any] = {}
    if document is not None:
        every = document.models
        known = {**names_of(every), **dict.fromkeys(every[:1], "base")}  # the base stands first
        fields = vocabulary_fields(values, known, reading)
    if reading.faults or document is None or kind is None:
        raise RecipeError(by_line(list(dict.fromkeys(reading.faults))), source.name)
    return _recipe(document, kind, values, tuple(reading.notes), options or {}, source, fields)


def _method(name: str, reading: Reading) -> MergekitMethod | None:
    found = known_method(name)
    if found is None:
        nearest = suggest(name, [*METHODS, *all_methods()])
        known = ", ".join(METHODS)
        what = f"unknown method '{name}'. mergekit's: {known}; ours: see eutectic methods."
        reading.fault("unknown_method", what, "merge_method", next=nearest)
    return found


def with_base_listed(document: MergekitDocument, kind: MergekitMethod) -> MergekitDocument:
    """Return the document with the base among the models of `models`, as mergekit adds it.

    Behind the others where it is not listed; only methods to which it is one of them see it so.
    """
    base = document.base
    if base is None or kind.base != "unused":
        return document
    modules: dict[str, MergekitModule] = {}
    for name, module in document.modules.items():
        one = module.slices[0]
        if module.whole and base not in [s.model for s in one.sources]:
            added = MergekitSource(base, {}, ("base_model",))
            module = replace(module, slices=(replace(one, sources=(*one.sources, added)),))
        modules[name] = module
    return replace(document, modules=modules)


def base_of(document: MergekitDocument, part: MergekitSlice) -> MergekitModel | None:
    """Return the model that a slice's models are differences from."""
    return part.base or document.base


def merged_in(
    document: MergekitDocument, part: MergekitSlice, kind: MergekitMethod
) -> list[MergekitSource]:
    """Return the models of a slice that a method merges: without the base that it subtracts."""
    base = base_of(document, part)
    return [s for s in part.sources if kind.base == "unused" or s.model != base]


def _check_parameters(document: MergekitDocument, kind: MergekitMethod, reading: Reading) -> None:
    """Note parameters that no method has, and those that this one passes over as mergekit does."""
    known = {*kind.shared, *kind.each}
    every = known.union(*({*method.shared, *method.each} for method in METHODS.values()))
    idle = {n for n, p in {**kind.shared, **kind.each}.items() if p.idle}
    passed_over: dict[str, None] = {}
    for settings, place in _settings_of(document):
        for name in settings:
            if name not in every:
                what = f"unknown parameter '{name}' of {document.method}."
                listed = ", ".join(sorted(known)) or "none"
                nearest = suggest(name, sorted(known))
                reading.fault("unknown_parameter", what, *place, name, allowed=listed, next=nearest)
            elif name not in known or name in idle:
                passed_over[name] = None
    if passed_over:
        numbers = {"method": document.method}
        reading.notes.append(Note("parameters_ignored", tuple(passed_over), numbers))


def _settings_of(document: MergekitDocument) -> list[tuple[Settings, tuple[str | int, ...]]]:
    found: list[tuple[Settings, tuple[str | int, ...]]] = [(document.parameters, ("parameters",))]
    for name, module in document.modules.items():
        found.append((module.parameters, ("modules", name, "parameters")))
        for part in module.slices:
            found.append((part.parameters, (*part.place, "parameters")))
            found += [(s.parameters, (*s.place, "parameters")) for s in part.sources]
    return found


def _check_models(document: MergekitDocument, kind: MergekitMethod, reading: Reading) -> None:
    """Note slices whose models, base or parameters do not fit the method."""
    name = document.method
    parts = [part for module in document.modules.values() for part in module.slices]
    if not any(merged_in(document, part, kind) for part in parts):
        what = "nothing but the base is named, so that nothing would be merged."
        reading.fault("nothing_to_merge", what, "merge_method")
        return
    if kind.base == "required" and document.base is None:
        if any(part.base is None for module in document.modules.values() for part in module.slices):
            what = f"{name} merges differences from a base, and no base_model is named."
            reading.fault("no_base", what, "merge_method", next="Add base_model.")
            return
    for module in document.modules.values():
        for part in module.slices:
            base, merged = base_of(document, part), merged_in(document, part, kind)
            place = part.place
            if kind.base != "unused" and base is not None and not module.whole:
                if base not in [s.model for s in part.sources]:
                    what = f"the base {base} gives no layers to this slice."
                    choose = "List it among the sources with its layer_range."
                    reading.fault("no_base", what, *place, next=choose)
            low, high = kind.fewest, kind.most
            if len(merged) < low or (high is not None and len(merged) > high):
                wanted = (
                    str(low)
                    if low == high
                    else f"at least {low}"
                    if high is None
                    else f"{low} to {high}"
                )
                beside = "" if kind.base == "unused" or base is None else " beside the base"
                what = f"{name} takes {wanted} models{beside}."
                reading.fault("expert_count", what, *place, got=str(len(merged)))
            _check_required(document, module, part, merged, kind, reading)


def _check_required(
    document: MergekitDocument,
    module: MergekitModule,
    part: MergekitSlice,
    merged: Sequence[MergekitSource],
    kind: MergekitMethod,
    reading: Reading,
) -> None:
    """Note parameters that nothing gives, wherever a tensor may look for them."""
    wide: list[Mapping[str, Setting]] = [part.parameters, module.parameters, document.parameters]
    for name, parameter in kind.shared.items():
        if parameter.required and not any(name in settings for settings in wide):
            what = f"{document.method} needs '{name}', a number."
            reading.fault("missing_parameter", what, "parameters")
    for own in merged:
        for name, parameter in kind.each.items():
            if parameter.required and not any(name in s for s in (own.parameters, *wide)):
                what = f"{document.method} needs the {name} of {own.model}."
                choose = f"Write parameters: {{{name}: …}} under the model, or for all of them."
                if own.place == ("base_model",):
                    choose = (
                        f"It merges the models as they are, and the base as one of them: give it a "
                        f"{name} under models, or leave base_model out."
                    )
                reading.fault("missing_parameter", what, *own.place, next=choose)


def _check_paths(document: MergekitDocument, reading: Reading) -> None:
    """Note local paths that lead nowhere."""
    for model, place in _mentions(document):
        for path in (model.path, model.adapter):
            if path is None or path in reading.stages.values():
                continue
            if hub_id(path) is None and not is_url(path) and not exists(Path(path)):
                reading.faults.append(no_file(place, path, reading.source))


def _mentions(document: MergekitDocument) -> list[tuple[MergekitModel, tuple[str | int, ...]]]:
    found: list[tuple[MergekitModel, tuple[str | int, ...]]] = []
    if document.base is not None:
        found.append((document.base, ("base_model",)))
    for module in document.modules.values():
        for part in module.slices:
            found += [(s.model, (*s.place, "model")) for s in part.sources]
            found += [(part.base, (*part.place, "base_model"))] if part.base else []
    return found


def _recipe(
    document: MergekitDocument,
    kind: MergekitMethod,
    values: Mapping[str, Any],
    notes: tuple[Note, ...],
    options: Mapping[str, Any],
    source: Source,
    more: Mapping[str, Any],
) -> Recipe:
    """Return the recipe: models as experts, and a script that answers for each tensor."""
    every = document.models
    names = names_of(every)
    parts = [part for module in document.modules.values() for part in module.slices]
    merged = [s.model for part in parts for s in merged_in(document, part, kind)]
    template = document.base or every[0]
    bases = [b for part in parts if (b := base_of(document, part)) and b != template]
    whole = all(module.whole for module in document.modules.values())
    thin = whole and kind.base != "unused" and not bases
    experts = {names[m]: _spec(m, document.base if thin else None) for m in dict.fromkeys(merged)}
    others = {names[b]: b for b in bases if names[b] not in experts}
    if refused := [key for key in options if key not in OPTIONS]:
        what = f"'{refused[0]}' does not fit a mergekit configuration: it says it in its own words."
        raise RecipeError([Fault("option", what, allowed=", ".join(OPTIONS))], source.name)
    resolver = Resolver(document, kind, {names[m]: m for m in every})
    script = Script(
        direct=resolver.direct,
        stated={**values, **options},
        bands={
            name: tuple(
                _band(document, part, kind, names, template, source.line(*part.place))
                for part in module.slices
            )
            for name, module in document.modules.items()
            if not module.whole
        },
        takes={
            name: tuple(
                dict.fromkeys(
                    names[s.model] for part in m.slices for s in merged_in(document, part, kind)
                )
            )
            for name, m in document.modules.items()
        },
        bases={name: model.path for name, model in others.items()},
        based=document.base is not None,
        notes=notes,
    )
    fields: dict[str, Any] = {
        "base": template.path,
        "base_adapter": template.adapter,
        "experts": experts,
        "method": kind.method,
        "dtype": document.out_dtype or document.dtype,
        "missing": "available",
        **({} if whole else {"heads": "base", "unmatched": "leave"}),
        **more,
        **options,
    }
    return Recipe.model_validate(fields).with_script(script)


def _spec(model: MergekitModel, base: MergekitModel | None) -> ExpertSpec:
    """Return a model as an expert; an adapter of the base itself needs no model of its own."""
    if model.adapter is None:
        return ExpertSpec(path=model.path)
    if base is not None and base.adapter is None and base.path == model.path:
        return ExpertSpec(path=model.adapter)
    return ExpertSpec(path=model.path, adapter=model.adapter)


def _band(
    document: MergekitDocument,
    part: MergekitSlice,
    kind: MergekitMethod,
    names: Mapping[MergekitModel, str],
    template: MergekitModel,
    line: int,
) -> Band:
    first = part.sources[0].layers or (0, 0)
    merged = {names[s.model]: (s.layers or (0, 0))[0] for s in merged_in(document, part, kind)}
    model, base = base_of(document, part), None
    if kind.base != "unused" and model is not None:
        own = next(s for s in part.sources if s.model == model)
        base = ("base" if model == template else names[model], (own.layers or (0, 0))[0])
    return Band(first[1] - first[0], merged, base, line)


@dataclass(frozen=True)
class Resolver:
    """Answers for single tensors what a document says of them."""

    document: MergekitDocument
    kind: MergekitMethod
    models: Mapping[str, MergekitModel]  # name of an expert -> the model as the document names it

    def direct(self, place: Place, owners: tuple[str, ...]) -> Direction | list[Fault]:
        """Return how a tensor is merged from the models that hold it."""
        document, kind = self.document, self.kind
        module = document.modules.get(place.module) or document.modules[""]
        part = module.slices[place.band]
        wide = [part.parameters, module.parameters, document.parameters]
        shared = {
            name: first_value(wide, name, spellings(place.name), place.depth)
            for name in kind.shared
        }
        sources = {s.model: s for s in part.sources}
        each: list[dict[str, Any]] = []
        for owner in owners:
            own = sources[self.models[owner]]
            look = partial(
                first_value,
                [own.parameters, *wide],
                name=spellings(place.own.get(owner, place.name)),
                depth=place.depth,
            )
            each.append({name: look(parameter=name) for name in kind.each})
        base = base_of(document, part) is not None
        found = _translated(
            document.method, _given(shared), tuple(_given(own) for own in each), base
        )
        if isinstance(found, list):
            return [replace(fault, where=fault.where or place.name) for fault in found]
        taking = ("base", *owners) if found.base_first else owners
        return Direction(
            found.method,
            found.parameters,
            dict(zip(taking, found.weights, strict=False)),
            {o: p for o, p in zip(taking, found.own, strict=False) if p is not None},
            found.scale,
            from_base=found.space == "delta",
            whole=document.method in METHODS,
        )


_Given = tuple[tuple[str, Scalar], ...]


def _given(values: Mapping[str, Any]) -> _Given:
    return tuple((name, value) for name, value in values.items() if value is not None)


@lru_cache(maxsize=1 << 14)  # most tensors of a model are told the same
def _translated(
    method: str, shared: _Given, each: tuple[_Given, ...], base: bool
) -> Translated | list[Fault]:
    return translate(method, dict(shared), [dict(own) for own in each], base)
