"""A mergekit configuration as records: what each key says, and the faults of all of them at once.

Keys, levels and precedence are those of mergekit 0.1.5 (its `config.py`). Where it passes over an
unknown key, this reader refuses it with the nearest name; the few that are common in the wild and
change nothing there are passed over with a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from eutectic.conventions_patterns import containing
from eutectic.errors import Fault, Note, suggest
from eutectic.options import DTYPES, dtype_name
from eutectic.recipes.document import Location, Source
from eutectic.recipes.mergekit_models import MergekitModel, read_model
from eutectic.recipes.settings import Case, Gradient, Scalar, Setting, Settings

_DOCUMENT = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name"),
)
_MODULE = ("models", "slices", "parameters")
_SLICE = ("sources", "base_model", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_MODEL = ("model", "parameters")
# Keys that mergekit accepts and does nothing with.
_IGNORED = {"residual_weight", "layer_range"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NUMBERS_IN_TEXT = ("weight", "density", "normalize", "int8_mask", "rescale", "lambda", "t")


@dataclass(frozen=True)
class MergekitSource:
    """One model of a slice: its layers [first, stop), or all of them."""

    model: MergekitModel
    parameters: Settings
    place: Location
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class MergekitSlice:
    """Layers of the output, and what they are merged from. `models` are one slice of all layers."""

    sources: tuple[MergekitSource, ...]
    base: MergekitModel | None = None
    parameters: Settings = field(default_factory=dict[str, Setting])
    place: Location = ()


@dataclass(frozen=True)
class MergekitModule:
    """A part of the model, by mergekit's name of it; "" is the whole."""

    slices: tuple[MergekitSlice, ...]
    parameters: Settings = field(default_factory=dict[str, Setting])
    whole: bool = True  # `models`: every layer of each


@dataclass(frozen=True)
class MergekitDocument:
    """A whole configuration."""

    method: str
    modules: Mapping[str, MergekitModule]
    base: MergekitModel | None = None
    parameters: Settings = field(default_factory=dict[str, Setting])
    dtype: str | None = None
    out_dtype: str | None = None
    notes: tuple[Note, ...] = ()

    @property
    def models(self) -> list[MergekitModel]:
        """Every model that it names, in order of mention, the base first."""
        found = [] if self.base is None else [self.base]
        for module in self.modules.values():
            for part in module.slices:
                found += [source.model for source in part.sources]
                found += [] if part.base is None else [part.base]
        return list(dict.fromkeys(found))


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Tell whether a document is a mergekit configuration, by its keys."""
    if "experts" in values or "method" in values:
        return False
    return "merge_method" in values or any(key in values for key in ("models", "slices", "modules"))


@dataclass(frozen=True)
class Reading:
    """Where a document stands, and what was found wrong and notable in it so far."""

    source: Source
    faults: list[Fault]
    notes: list[Note]
    stages: Mapping[str, str] = field(default_factory=dict[str, str])  # see `read_model`

    def fault(self, kind: str, what: str, *place: str | int, **told: str) -> None:
        """Note that something is wrong at a place."""
        where = ".".join(str(part) for part in place)
        self.faults.append(Fault(kind, what, where, self.source.line(*place), **told))


def read_mergekit(values: Mapping[str, Any], reading: Reading) -> MergekitDocument | None:
    """Return the document as records; None where it is too broken to be looked at further."""
    check_keys(values, _DOCUMENT, (), reading)
    method = values.get("merge_method")
    if not isinstance(method, str):
        what = "'merge_method' is missing." if method is None else "must be the name of a method."
        reading.fault("missing_key", what, *(() if method is None else ("merge_method",)))
    base = model_at(values.get("base_model"), ("base_model",), reading)
    kinds = [key for key in ("models", "slices", "modules") if values.get(key)]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "none of them"
        what = "exactly one of 'models', 'slices' and 'modules' says what is merged."
        reading.fault("models_slices_modules", what, got=got)
        return None
    modules: dict[str, MergekitModule] = {}
    if kinds == ["modules"]:
        given = mapping_at(values["modules"], ("modules",), reading)
        for name, module in given.items():
            place: Location = ("modules", name)
            inner = mapping_at(module, place, reading)
            check_keys(inner, _MODULE, place, reading)
            if bool(inner.get("models")) == bool(inner.get("slices")):
                what = "a module has either models or slices."
                reading.fault("models_slices_modules", what, *place)
            else:
                modules[str(name)] = _module(inner, place, reading)
    else:
        modules[""] = replace(_module(values, (), reading), parameters={})
    read = {key: _dtype(values.get(key), key, reading) for key in ("dtype", "out_dtype")}
    parameters = _parameters(values.get("parameters"), ("parameters",), reading)
    if not isinstance(method, str) or not modules:
        return None
    return MergekitDocument(method, modules, base, parameters, read["dtype"], read["out_dtype"])


def _module(values: Mapping[str, Any], place: Location, reading: Reading) -> MergekitModule:
    parameters = _parameters(values.get("parameters"), (*place, "parameters"), reading)
    if values.get("models"):
        where = (*place, "models")
        found = [
            _source(item, (*where, n), reading, ranged=False)
            for n, item in enumerate(_list(values["models"], where, reading))
        ]
        one = MergekitSlice(tuple(s for s in found if s is not None), place=where)
        return MergekitModule((one,), parameters)
    where = (*place, "slices")
    slices: list[MergekitSlice] = []
    for n, item in enumerate(_list(values["slices"], where, reading)):
        at = (*where, n)
        inner = mapping_at(item, at, reading)
        check_keys(inner, _SLICE, at, reading)
        listed = _list(inner.get("sources"), (*at, "sources"), reading)
        found = [
            _source(own, (*at, "sources", k), reading, ranged=True) for k, own in enumerate(listed)
        ]
        sources = tuple(s for s in found if s is not None)
        _check_lengths(sources, at, reading)
        base = model_at(inner.get("base_model"), (*at, "base_model"), reading)
        own = _parameters(inner.get("parameters"), (*at, "parameters"), reading)
        slices.append(MergekitSlice(sources, base, own, at))
    return MergekitModule(tuple(slices), parameters, whole=False)


def _source(
    value: object, place: Location, reading: Reading, *, ranged: bool
) -> MergekitSource | None:
    if isinstance(value, str):
        value = {"model": value}
    inner = mapping_at(value, place, reading)
    check_keys(inner, _SOURCE if ranged else _MODEL, place, reading)
    model = model_at(inner.get("model"), (*place, "model"), reading)
    if "model" not in inner and inner:
        reading.fault("missing_key", "'model' is missing.", *place)
    layers = None
    if ranged:
        layers = _range(inner.get("layer_range"), (*place, "layer_range"), reading)
    parameters = _parameters(inner.get("parameters"), (*place, "parameters"), reading)
    return None if model is None else MergekitSource(model, parameters, place, layers)


def _range(value: object, place: Location, reading: Reading) -> tuple[int, int] | None:
    if value is None:
        reading.fault("missing_key", "'layer_range' is missing.", *place[:-1])
        return None
    items = cast("list[object]", value) if isinstance(value, (list, tuple)) else []
    numbers = [n for n in items if isinstance(n, int) and not isinstance(n, bool)]
    if len(items) != 2 or len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        what = "must be [first, end], two layer numbers of which the end is not taken."
        reading.fault("layer_range", what, *place, got=str(value))
        return None
    return numbers[0], numbers[1]


def _check_lengths(sources: Sequence[MergekitSource], place: Location, reading: Reading) -> None:
    lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers is not None}
    if len(lengths) > 1:
        listed = ", ".join(f"{s.model} {list(s.layers or ())}" for s in sources)
        what = "the models of a slice must give equally many layers"
        reading.fault("layer_range", f"{what}.", *place, got=listed)
    named = [str(s.model) for s in sources]
    if twice := next((name for name in named if named.count(name) > 1), None):
        what = f"{twice} stands twice in one slice, so that nobody can tell its parameters apart."
        choose = "Take the layers in slices of their own, or name the model by another path."
        reading.fault("model_twice", what, *place, next=choose)


def _parameters(value: object, place: Location, reading: Reading) -> Settings:
    if value is None:
        return {}
    found: dict[str, Setting] = {}
    for name, given in mapping_at(value, place, reading).items():
        setting = read_setting(given, (*place, str(name)), reading)
        if setting is not None:
            found[str(name)] = setting
    return found


def read_setting(value: object, place: Location, reading: Reading) -> Setting | None:
    """Return a scalar, a gradient or cases; None where it is none of them."""
    if _is_scalar(value):
        return _number(value)
    if isinstance(value, Mapping):
        case = _case(cast("Mapping[str, Any]", value), place, reading)
        return None if case is None else (case,)
    if isinstance(value, (list, tuple)) and value:
        items = cast("list[object]", value)
        if all(_is_scalar(item) for item in items):
            return Gradient(tuple(_number(item) for item in items))
        if all(isinstance(item, Mapping) for item in items):
            inner = cast("list[Mapping[str, Any]]", items)
            cases = [_case(item, (*place, n), reading) for n, item in enumerate(inner)]
            return tuple(case for case in cases if case is not None)
    allowed = "a number, a list of numbers over depth, or a list of {filter, value}"
    reading.fault("setting", "has no such value.", *place, got=_shown(value), allowed=allowed)
    return None


def _case(values: Mapping[str, Any], place: Location, reading: Reading) -> Case | None:
    check_keys(values, ("filter", "value"), place, reading)
    pattern = values.get("filter")
    if not (pattern is None or isinstance(pattern, str)):
        what = "must be a part of tensor names."
        reading.fault("filter", what, *place, "filter", got=_shown(pattern))
        return None
    if "value" not in values:
        reading.fault("missing_key", "'value' is missing.", *place)
        return None
    setting = read_setting(values["value"], (*place, "value"), reading)
    if setting is None:
        return None
    return Case(None if pattern is None or pattern in ("*", "") else containing(pattern), setting)


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _number(value: Any) -> Scalar:
    """Return a number that YAML took for a text, such as `1e-5`, as a number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def model_at(value: object, place: Location, reading: Reading) -> MergekitModel | None:
    """Return the model that is named at a place; None without one, and where it is noted."""
    if value is None:
        return None
    found = read_model(value, reading.source, reading.stages)
    if isinstance(found, MergekitModel):
        return found
    reading.faults.append(
        replace(found, where=".".join(map(str, place)), line=reading.source.line(*place))
    )
    return None


def _dtype(value: object, key: str, reading: Reading) -> str | None:
    if value is None:
        return None
    name = dtype_name(value) if isinstance(value, str) else ""
    if name in DTYPES:
        return name
    what = "is no dtype that can be written."
    reading.fault("dtype", what, key, got=_shown(value), allowed=", ".join(DTYPES))
    return None


def check_keys(
    values: Mapping[str, Any], known: Iterable[str], place: Location, reading: Reading
) -> None:
    """Note keys that are not known, and those that mergekit passes over."""
    names = [str(key) for key in known]
    for key in values:
        text = str(key)
        if text in names:
            continue
        if text in _IGNORED:
            where = ".".join(map(str, (*place, text)))
            reading.notes.append(Note("recipe_key_ignored", (where,)))
            continue
        hint = suggest(text, names)
        if not hint and text in _NUMBERS_IN_TEXT:
            hint = "It is a parameter: write it under 'parameters'."
        reading.fault("unknown_key", f"unknown key '{text}'.", *place, text, next=hint)


def mapping_at(value: object, place: Location, reading: Reading) -> Mapping[str, Any]:
    """Return what stands at a place; an empty mapping where it is none, which is noted."""
    if isinstance(value, Mapping):
        return cast("Mapping[str, Any]", value)
    reading.fault("not_a_mapping", "must be a mapping of keys.", *place, got=_shown(value))
    return {}


def _list(value: object, place: Location, reading: Reading) -> Sequence[Any]:
    if isinstance(value, (list, tuple)) and value:
        return cast("Sequence[Any]", value)
    reading.fault("not_a_list", "must be a list of at least one.", *place, got=_shown(value))
    return ()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
