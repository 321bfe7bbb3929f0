"""A mergekit configuration in our own words, where it can be said.

What the configuration says of a tensor is asked for at sample places: names that its filters
fit, alone and together, and a name that none fits, at several depths. Settings are fitted to the
answers, and the recipe that they make is asked the same: it is returned only if it answers alike
everywhere.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eutectic.conventions_patterns import containing
from eutectic.errors import Fault, RecipeError
from eutectic.methods import get_method
from eutectic.recipes.document import Source, exists
from eutectic.recipes.load import check_recipe
from eutectic.recipes.mergekit import check_mergekit
from eutectic.recipes.particular import Particular
from eutectic.recipes.schema import Recipe
from eutectic.recipes.script import Direction, Place, Script
from eutectic.recipes.settings import Gradient
from eutectic.storage import local_path, seen_from

_NOWHERE = "\u2205"  # a name that no filter fits
_STEPS = 24  # depths at which answers are compared
_CLOSE = 1e-9

Ask = Callable[[str, float], Any]


def converted(values: Mapping[str, Any], source: Source, folder: Path) -> dict[str, Any]:
    """Return a configuration as a recipe of ours that lies in a folder.

    RecipeError says what cannot be said in our words.
    """
    recipe = check_mergekit(values, source)
    script = recipe.script
    assert script is not None
    _refuse_unsaid(recipe, script, values, source)
    samples = _Samples.of(recipe, script, values)
    found = _written(recipe, script, samples, partial(_spelt, folder))
    _refuse(_differences(found, samples, Source(folder=folder)), source)
    return found


def _spelt(folder: Path, path: str) -> str:
    """Return how a recipe in a folder writes a path; a name on the hub stands as it is."""
    if not exists(Path(path)):
        return path
    if (there := seen_from(path, folder)) is not None:
        return there
    near = os.path.relpath(local_path(path), folder)
    return near if near.startswith(("..", "/")) else f"./{near}"


def _refuse_unsaid(
    recipe: Recipe, script: Script, values: Mapping[str, Any], source: Source
) -> None:
    faults: list[Fault] = []

    def cannot(what: str, *place: str) -> None:
        faults.append(Fault("cannot_be_said", what, ".".join(place), source.line(*place)))

    if "modules" in values:
        cannot("our recipes have no parts of models.", "modules")
    owners = {b.base[0] for bands in script.bands.values() for b in bands if b.base is not None}
    if owners - {"base"}:
        cannot("our recipes have one base for all layers.", "slices")
    if script.bands and any(c.isdigit() for text in _filters(values) for c in text):
        cannot("filters with layers' numbers mean each model's own here, and the output's there.")
    if not get_method(recipe.method).elementwise:
        cannot(
            f"{recipe.method} treats vectors and tables as mergekit does only in its own words.",
            "merge_method",
        )
    _refuse(faults, source)


def _refuse(faults: Sequence[Fault], source: Source) -> None:
    if faults:
        raise RecipeError(faults, source.name)


def _filters(value: object) -> Iterator[str]:
    """Yield the filters of a document, each once, in order."""
    seen: dict[str, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            text = value.get("filter")
            if isinstance(text, str) and text not in ("", "*"):
                seen[text] = None
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(value)
    yield from seen


def _lengths(value: object) -> Iterator[int]:
    """Yield the lengths of lists in a document, which may be gradients."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _lengths(item)
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _lengths(item)


@dataclass(frozen=True)
class _Samples:
    """The places that are asked about."""

    recipe: Recipe
    script: Script
    filters: tuple[str, ...]
    lengths: tuple[int, ...]  # of lists that may be gradients, shortest first

    @classmethod
    def of(cls, recipe: Recipe, script: Script, values: Mapping[str, Any]) -> _Samples:
        lengths = sorted({n for n in _lengths(values) if n > 1})
        return cls(recipe, script, tuple(_filters(values)), tuple(lengths))

    @property
    def bands(self) -> int:
        return max(1, len(self.script.bands.get("", ())))

    @property
    def names(self) -> list[str]:
        pairs = [f"{a}.{b}" for a in self.filters for b in self.filters if a != b]
        return [_NOWHERE, *self.filters, *pairs]

    @property
    def depths(self) -> list[float]:
        return [step / _STEPS for step in range(_STEPS + 1)]

    def owners(self, band: int) -> tuple[str, ...]:
        bands = self.script.bands.get("", ())
        return tuple(bands[band].takes) if bands else self.script.takes[""]

    def ask(self, name: str, depth: float, band: int) -> Direction:
        owners = self.owners(band)
        place = Place(name, dict.fromkeys(owners, name), depth, "", band)
        found = self.script.direct(place, owners)
        if isinstance(found, list):
            raise RecipeError(found)
        return found


def _written(
    recipe: Recipe, script: Script, samples: _Samples, spelt: Callable[[str], str]
) -> dict[str, Any]:
    """Return the recipe with a setting for everything that was answered."""
    first = samples.ask(_NOWHERE, 0.0, 0)
    extra = "base" in first.weights  # slerp takes the base as the first model
    names = _named(recipe, extra)
    experts: dict[str, Any] = {}
    for owner, name in names.items():
        if owner == "base":
            experts[name] = {"path": spelt(recipe.reference)}
            continue
        spec = recipe.experts[owner]
        experts[name] = {"path": spelt(spec.path)}
        if spec.adapter is not None:
            experts[name]["adapter"] = spelt(spec.adapter)
    found: dict[str, Any] = {"base": spelt(recipe.base or "") if script.based else None}
    if recipe.base_adapter is not None:
        found["base_adapter"] = spelt(recipe.base_adapter)
    found |= {"experts": experts, "method": first.method}
    layers = [_layer(samples, band, names, first) for band in range(len(script.bands.get("", ())))]
    shared = [_shared(samples, band) for band in range(samples.bands)]
    common = {k: v for k, v in shared[0].items() if all(s.get(k) == v for s in shared)}
    if common:
        found["parameters"] = common
    for owner, name in names.items():
        taking = [n for n in range(samples.bands) if owner in (*samples.owners(n), "base")]
        each = [_of_owner(samples, n, owner) for n in taking]
        for key in ("weight", "parameters"):
            values = [own[key] for own in each]
            if all(value == values[0] for value in values):
                if values[0] not in (1.0, {}):
                    experts[name][key] = values[0]
            else:
                for n, value in zip(taking, values, strict=True):
                    where = layers[n].setdefault(
                        {"weight": "weights"}.get(key, "parameters_of"), {}
                    )
                    where[name] = value
    for own, layer in zip(shared, layers, strict=False):
        particular = {k: v for k, v in own.items() if k not in common}
        if particular:
            layer["parameters"] = particular
    if layers:
        found["layers"] = layers
    scale = first.scale
    if scale is not None and scale != get_method(first.method).default_scale(len(names)):
        found["scale"] = scale
    found |= _of_output(recipe)
    for name, spec in experts.items():
        experts[name] = spec["path"] if len(spec) == 1 else spec
    return found


def _named(recipe: Recipe, extra: bool) -> dict[str, str]:
    names = {owner: owner for owner in recipe.experts}
    if extra:
        name = "first"
        while name in names:
            name += "-model"
        return {"base": name, **names}
    return names


def _layer(
    samples: _Samples, band: int, names: Mapping[str, str], first: Direction
) -> dict[str, Any]:
    own = samples.script.bands[""][band]
    take = {names[o]: [start, start + own.count] for o, start in own.takes.items()}
    if own.base is not None:
        base = [own.base[1], own.base[1] + own.count]
        take = {names["base"]: base, **take} if "base" in names else {**take, "base": base}
    return {"take": take}


def _of_output(recipe: Recipe) -> dict[str, Any]:
    keys = ("dtype", "missing", "vocabulary", "chat_template", "heads", "seed")
    kept = {key for key in keys if key in recipe.model_fields_set}
    return recipe.model_dump(mode="json", include=kept, exclude_defaults=True)


def _shared(samples: _Samples, band: int) -> dict[str, Any]:
    """Return the parameters that all models of a band share, as settings; defaults left out."""
    method = get_method(samples.ask(_NOWHERE, 0.0, band).method)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(method.parameters):
        if field.name in method.per_expert:
            continue

        def ask(name: str, depth: float, key: str = field.name) -> Any:
            return getattr(samples.ask(name, depth, band).parameters, key)

        value = _fitted(ask, samples)
        if value != field.default:
            found[field.name] = value
    return found


def _of_owner(samples: _Samples, band: int, owner: str) -> dict[str, Any]:
    """Return one model's weight and its own parameters, as settings."""
    method = get_method(samples.ask(_NOWHERE, 0.0, band).method)

    def weight(name: str, depth: float) -> Any:
        return samples.ask(name, depth, band).weights[owner]

    parameters: dict[str, Any] = {}
    for field in dataclasses.fields(method.parameters):
        if field.name not in method.per_expert:
            continue

        def ask(name: str, depth: float, key: str = field.name) -> Any:
            return getattr(_own(samples.ask(name, depth, band), owner), key)

        value = _fitted(ask, samples)
        if value != field.default:
            parameters[field.name] = value
    return {"weight": _fitted(weight, samples), "parameters": parameters}


def _own(direction: Direction, owner: str) -> Any:
    return direction.own.get(owner, direction.parameters)


def _fitted(ask: Ask, samples: _Samples) -> Any:
    """Return a setting that answers like `ask`, as a recipe writes it."""
    rest = _over_depth(lambda depth: ask(_NOWHERE, depth), samples)
    cases: list[dict[str, Any]] = []
    for text in samples.filters:
        value = _over_depth(lambda depth, name=text: ask(name, depth), samples)
        if value != rest:
            cases.append({"match": containing(text), "value": value})
    return [*cases, {"value": rest}] if cases else rest


def _over_depth(ask: Callable[[float], Any], samples: _Samples) -> Any:
    """Return a value, or a list over depth, that answers like `ask`."""
    wanted = [ask(depth) for depth in samples.depths]
    if all(_alike(value, wanted[0]) for value in wanted):
        return wanted[0]
    for length in samples.lengths:
        values = [ask(n / (length - 1)) for n in range(length)]
        if all(isinstance(v, (int, float, str)) for v in values):
            made = Gradient(tuple(values))
            pairs = zip(samples.depths, wanted, strict=True)
            if all(_alike(made.at(depth), value) for depth, value in pairs):
                return values
    return wanted[0]  # what differs is found when both are compared


def _alike(one: Any, other: Any) -> bool:
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers):
        return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)
    return one == other


def _differences(values: Mapping[str, Any], samples: _Samples, source: Source) -> list[Fault]:
    """Return what a recipe of ours says otherwise than the configuration."""
    made = Particular(check_recipe(values, source))
    scale = made.recipe.scale
    names = list(made.recipe.experts)
    faults: dict[str, Fault] = {}
    for band in range(samples.bands):
        for name in samples.names:
            for depth in samples.depths:
                asked = samples.ask(name, depth, band)
                owners = list(asked.weights)
                ours = names if not samples.script.bands else _taking(made.recipe, band)
                place = Place(name, dict.fromkeys(ours, name), depth, "", band)
                answer = made.direct(place, tuple(ours))
                if isinstance(answer, list):
                    return answer
                number = get_method(asked.method).default_scale(len(names))
                own = scale if isinstance(scale, (int, float)) else number
                for what in _unlike(asked, answer, owners, ours, own):
                    text = f"{what} differs from tensor to tensor in a way that has no words here."
                    faults.setdefault(what, Fault("cannot_be_said", text))
    return list(faults.values())


def _taking(recipe: Recipe, band: int) -> list[str]:
    return [name for name in recipe.layers[band].take if name != "base"]


def _unlike(
    asked: Direction,
    answer: Direction,
    owners: Sequence[str],
    ours: Sequence[str],
    scale: float,
) -> Iterator[str]:
    if asked.method != answer.method or len(owners) != len(ours):
        yield "the method"
        return
    if not _alike(asked.scale, scale):
        yield "α"
    for owner, own in zip(owners, ours, strict=True):
        if not _alike(asked.weights[owner], answer.weights[own]):
            yield f"the weight of '{own}'"
        left = dataclasses.asdict(_own(asked, owner))
        right = dataclasses.asdict(_own(answer, own))
        for key, value in left.items():
            if not _alike(value, right[key]):
                yield key
