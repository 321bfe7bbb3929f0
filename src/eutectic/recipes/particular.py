"""What a recipe of ours says of single tensors: values over depth and by name, rules, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eutectic.conventions_patterns import fits
from eutectic.errors import Fault, MethodError
from eutectic.methods import Method, get_method
from eutectic.recipes.document import Source
from eutectic.recipes.schema import LayerSpec, Recipe, TensorRule
from eutectic.recipes.script import Band, Direction, Place, Script
from eutectic.recipes.settings import Settings, first_value, scalars, setting_of, varies

BASE = "base"


def is_particular(recipe: Recipe) -> bool:
    """Tell whether a recipe says something of single tensors."""
    return (
        recipe.base is None
        or bool(recipe.layers)
        or any(varies(spec.weight) for spec in recipe.experts.values())
        or bool(varying(get_method(recipe.method), recipe.parameters))
        or any(
            varying(get_method(recipe.method), spec.parameters) for spec in recipe.experts.values()
        )
        or any(rule.method or rule.parameters or rule.weights for rule in recipe.tensors)
    )


def varying(method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that are given as lists or cases, and take no lists themselves."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if not varies(value):
            continue
        try:
            setting_of(value)
            method.parse({name: value})
        except MethodError:
            found[name] = value
        except ValueError:
            continue  # of another kind, which the method refuses
    return found


def variants(method: Method, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return parameters without any that varies, and with each value of each that does."""
    plain = constant(method, parameters)
    return [
        plain,
        *(
            {**plain, name: value}
            for name, given in varying(method, parameters).items()
            for value in scalars(setting_of(given))
        ),
    ]


def rule_faults(recipe: Recipe, source: Source) -> list[Fault]:
    """Return what is wrong with methods, parameters and weights of rules."""
    faults: list[Fault] = []
    for n, rule in enumerate(recipe.tensors):
        where, line = f"tensors.{n}", source.line("tensors", n)
        for name in rule.weights:
            if name not in recipe.experts:
                what, listed = f"'{name}' is no expert.", ", ".join(recipe.experts)
                faults.append(Fault("unknown_expert", what, where, line, allowed=listed))
        try:
            method = get_method(rule.method or recipe.method)
            own = rule.method in (None, recipe.method)
            given = {**recipe.parameters, **rule.parameters} if own else rule.parameters
            for values in variants(method, given):
                method.parse(values)
        except MethodError as error:
            what = " ".join(str(error).split())
            faults.append(Fault("parameters", what, where, line))
    return faults


def scripted(recipe: Recipe, source: Source) -> Recipe:
    """Return the recipe with a script, if it says something of single tensors."""
    if not is_particular(recipe):
        return recipe
    particular = Particular(recipe)
    owners = tuple(recipe.experts)
    script = Script(
        direct=particular.direct,
        bands={"": tuple(_band(recipe, n, source) for n in range(len(recipe.layers)))}
        if recipe.layers
        else {},
        takes={"": owners},
        based=recipe.base is not None,
    )
    if recipe.layers and "heads" not in recipe.model_fields_set:
        recipe = recipe.model_copy(update={"heads": "base"})
    return recipe.with_script(script)


def layer_faults(recipe: Recipe, source: Source) -> list[Fault]:
    """Return what is wrong with layers, and with a recipe without a base."""
    faults: list[Fault] = []
    for n, spec in enumerate(recipe.layers):
        place = ("layers", n)
        line = source.line(*place)
        where = f"layers.{n}"
        for name in [*spec.take, *spec.weights, *spec.parameters_of]:
            if name not in recipe.experts and name != BASE:
                what = f"'{name}' is no expert."
                listed = ", ".join(recipe.experts)
                faults.append(Fault("unknown_expert", what, where, line, allowed=listed))
        lengths = {stop - start for start, stop in spec.take.values()}
        if len(lengths) > 1:
            what = "the experts of an entry must give equally many layers."
            faults.append(Fault("layer_range", what, where, line))
        if not [name for name in spec.take if name != BASE]:
            what = "no expert gives a layer here."
            faults.append(Fault("layer_range", what, where, line))
        if recipe.base is None and BASE in spec.take:
            what = "there is no base to take layers of."
            faults.append(Fault("no_base", what, where, line))
    if recipe.layers and recipe.heads == "per_expert" and "heads" in recipe.model_fields_set:
        what = "an expert's own folder cannot have the layers of several models."
        line = source.line("heads")
        faults.append(Fault("heads_of_layers", what, "heads", line, next="Choose heads: base."))
    if recipe.base is None:
        for name in _methods(recipe):
            method = get_method(name)
            try:
                parameters = method.parse(constant(method, recipe.parameters))
            except MethodError:
                continue  # told with the parameters
            if method.space(parameters) == "delta":
                what = f"method '{name}' merges differences from a base, and there is none."
                line = source.line("base")
                faults.append(Fault("no_base", what, "base", line, next="Name one."))
    return faults


def constant(method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with the first value in place of each that varies."""
    found = dict(parameters)
    for name, value in varying(method, parameters).items():
        found[name] = next(scalars(setting_of(value)))
    return found


def _methods(recipe: Recipe) -> list[str]:
    named = [rule.method for rule in recipe.tensors if rule.method is not None]
    return list(dict.fromkeys([recipe.method, *named]))


def _band(recipe: Recipe, number: int, source: Source) -> Band:
    spec = recipe.layers[number]
    takes = {name: first for name, (first, _) in spec.take.items() if name != BASE}
    first, stop = next(iter(spec.take.values()))
    base = None
    if recipe.base is not None:
        base = (BASE, spec.take.get(BASE, (first, stop))[0])
    return Band(stop - first, takes, base, source.line("layers", number))


@dataclass(frozen=True)
class Particular:
    """Answers for single tensors what a recipe of ours says of them."""

    recipe: Recipe

    def direct(self, place: Place, owners: tuple[str, ...]) -> Direction | list[Fault]:
        """Return how a tensor is merged from the experts that hold it.

        Rules come first, in order, then the entry of `layers`, the expert, the recipe.
        """
        recipe = self.recipe
        rules = [rule for rule in recipe.tensors if fits(place.name, rule.match)]
        name = next((rule.method for rule in rules if rule.method), recipe.method)
        method = get_method(name)
        layer = recipe.layers[place.band] if recipe.layers else None
        own_method = name == recipe.method
        wide: list[Settings] = [_settings(rule.parameters) for rule in rules]
        if own_method:
            wide += [_settings(layer.parameters)] if layer else []
            wide.append(_settings(recipe.parameters))
        shared = _values(wide, place.name, place.depth)
        try:
            parameters = method.parse(shared)
            own: dict[str, Any] = {}
            for owner in owners:
                given = recipe.experts[owner].parameters if own_method else {}
                places = [_settings(layer.parameters_of.get(owner, {}))] if layer else []
                particular = _values([*places, _settings(given)], place.name, place.depth)
                particular = {k: v for k, v in particular.items() if k in method.per_expert}
                if particular and not any(k in s for k in particular for s in wide[: len(rules)]):
                    own[owner] = method.parse({**shared, **particular})
        except MethodError as error:
            return [Fault("parameters", str(error), place.name)]
        weights = {owner: float(_weight(recipe, rules, layer, owner, place)) for owner in owners}
        return Direction(
            name,
            parameters,
            weights,
            own,
            None
            if own_method or recipe.scale is not None or recipe.post is not None
            else method.default_scale(len(owners)),
            from_base=recipe.base is not None,
        )


def _weight(
    recipe: Recipe,
    rules: Sequence[TensorRule],
    layer: LayerSpec | None,
    owner: str,
    place: Place,
) -> Any:
    places = [rule.weights for rule in rules]
    places += [layer.weights] if layer is not None else []
    places.append({owner: recipe.experts[owner].weight})
    settings = [{owner: setting_of(p[owner])} for p in places if owner in p]
    found = first_value(settings, owner, place.name, place.depth)
    return 1.0 if found is None else found


def _settings(parameters: Mapping[str, Any]) -> Settings:
    return {name: _setting(value) for name, value in parameters.items()}


def _setting(value: Any) -> Any:
    try:
        return setting_of(value)
    except ValueError:
        return value  # a value of another kind, which the method checks


def _values(places: Sequence[Settings], name: str, depth: float) -> dict[str, Any]:
    """Return every parameter that one of the places gives, by the first that does."""
    found: dict[str, Any] = {}
    for parameter in dict.fromkeys(p for settings in places for p in settings):
        value = first_value(places, parameter, name, depth)
        if value is not None:
            found[parameter] = value
    return found
