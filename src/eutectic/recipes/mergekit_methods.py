"""One tensor of a recipe in mergekit's dialect: its method, parameters, weights and α here.

Such a recipe is resolved to plain values tensor by tensor; `translate` makes of them what a tensor
plan holds. `METHODS` says what may be given.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from eutectic.errors import Fault, suggest
from eutectic.methods import all_methods, get_method
from eutectic.recipes.mergekit_table import (
    METHODS,
    MergekitMethod,
    MergekitParameter,
    known_method,
)

__all__ = [
    "METHODS",
    "MergekitMethod",
    "MergekitParameter",
    "Translated",
    "known_method",
    "translate",
]

Values = Mapping[str, Any]

BALANCED = 1e-8  # below this sum of weights mergekit does not divide by it
EVEN = 1e-6  # below this sum of two weights mergekit's nuslerp takes the middle
NEGLIGIBLE = 1e-6  # below it mergekit counts energies as equal, and products of norms as no larger


@dataclass(frozen=True, kw_only=True)
class Translated:
    """How one tensor is merged here.

    Attributes:
        method: a registered method, or "copy": the base's values.
        parameters: the method's checked parameters; None for a copy.
        own: for each expert its own parameters, None where they are the tensor's.
        weights: w_t of each expert.
        scale: α.
        space: "delta": the base is W₀ and what is merged are the differences to it. "weight": the
            models' weights are merged, and the base plays no part.
        base_first: the base is the first expert, before the models; `own` and `weights` have a
            place for it.
    """

    method: str
    parameters: Any
    own: tuple[Any, ...]
    weights: tuple[float, ...]
    scale: float = 1.0
    space: Literal["delta", "weight"] = "delta"
    base_first: bool = False


def translate(
    name: str, parameters: Values, each: Sequence[Values], base: bool
) -> Translated | list[Fault]:
    """Return how a tensor is merged here, or everything that is wrong with what it is given.

    Args:
        name: a `merge_method`: mergekit's, or one of our own.
        parameters: the tensor's shared parameters, resolved: no lists, no filters. Those that the
            recipe leaves out take their defaults.
        each: the parameters of each model, in the recipe's order; without the base, unless the
            method counts it as one of the models (`MergekitMethod.base` is "unused").
        base: whether the tensor has a base model.
    """
    kind = known_method(name)
    if kind is None:
        close = suggest(name, [*METHODS, *all_methods()])
        return [Fault("unknown_method", f"unknown method '{name}'.{close}", "merge_method")]
    faults = _structure(name, kind, len(each), base)
    shared = _checked(parameters, kind.shared, name, faults)
    models = [_checked(values, kind.each, name, faults) for values in each]
    if faults:
        return faults
    builder = _BUILDERS.get(name, _own_method)
    try:
        found = builder(_Call(kind, shared, models, base))
    except ValidationError as error:
        return get_method(kind.method).faults(error)
    if found.method != "copy":
        method = get_method(found.method)
        fault = method.check(found.parameters, found.weights) if method.check else None
        if fault:
            return [Fault("method_check", fault)]
    return found


def _structure(name: str, kind: MergekitMethod, count: int, base: bool) -> list[Fault]:
    faults: list[Fault] = []
    if kind.base == "required" and not base:
        faults.append(Fault("no_base", f"{name} needs a base_model.", "base_model"))
    low, high = kind.fewest, kind.most
    if count < low or (high is not None and count > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        span = str(low) if low == high else span
        beside = "" if kind.base == "unused" else " beside the base"
        faults.append(Fault("models", f"{name} takes {span} models{beside}.", got=str(count)))
    return faults


def _checked(
    values: Values, known: Mapping[str, MergekitParameter], method: str, faults: list[Fault]
) -> dict[str, Any]:
    """Return every known parameter's value; add to `faults` what is unknown, missing or wrong."""
    for name in values:
        if name not in known:
            what = f"unknown parameter '{name}' of {method}.{suggest(name, list(known))}"
            faults.append(Fault("unknown_parameter", what, allowed=", ".join(known) or "none"))
    found: dict[str, Any] = {}
    for name, parameter in known.items():
        value = values.get(name)
        if value is None:
            if parameter.required:
                faults.append(Fault("missing_parameter", f"{method} needs '{name}'."))
            found[name] = parameter.default
            continue
        try:
            found[name] = value = _adapter(parameter.kind).validate_python(value)
        except ValidationError:
            found[name] = value
            what = f"'{name}' must be a {_WORDS[parameter.kind]}."
            faults.append(Fault("parameter_type", what, got=repr(value)))
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(Fault("not_finite", f"'{name}' must be finite.", got=repr(value)))
    return found


_WORDS = {float: "number", int: "whole number", bool: "truth value", object: "value"}


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(Any if kind is object else kind)


def _merged(
    kind: MergekitMethod,
    values: Values,
    weights: Sequence[float],
    own: Sequence[Values] | None = None,
    **more: Any,
) -> Translated:
    """Return the translation with checked parameters, each expert's own where they differ."""
    adapter = get_method(kind.method).adapter
    each = [adapter.validate_python({**values, **mine}) for mine in own or [{}] * len(weights)]
    common = each[0] if each else adapter.validate_python(dict(values))
    return Translated(
        method=kind.method,
        parameters=common,
        own=tuple(None if mine == common else mine for mine in each),
        weights=tuple(weights),
        **more,
    )


_COPY = Translated(method="copy", parameters=None, own=(), weights=())


def _weights(models: Sequence[Values]) -> list[float]:
    return [model["weight"] for model in models]


def _total(weights: Sequence[float]) -> float:
    """Return what mergekit divides a sum by: that of the weights, unless they balance out."""
    total = sum(weights)
    return 1.0 if abs(total) < BALANCED else total


def _share(value: float) -> float:
    """Return a density: mergekit keeps all from 1 on, and nothing from 0 down."""
    return min(1.0, max(0.0, value))


@dataclass(frozen=True)
class _Call:
    """A method and its checked values."""

    kind: MergekitMethod
    shared: Values
    models: Sequence[Values]
    base: bool


def _added(call: _Call) -> Translated:
    """Translate those that add up: normalising is part of α."""
    if not call.models:
        return _COPY
    weights = _weights(call.models)
    alpha = call.shared["lambda"] / (_total(weights) if call.shared["normalize"] else 1.0)
    return _merged(call.kind, {}, weights, scale=alpha)


def _thinned(call: _Call) -> Translated:
    """Translate those that thin the task vectors and add them up, or merge them by sign."""
    if not call.models:
        return _COPY
    weights, alpha = _weights(call.models), call.shared["lambda"]
    values: dict[str, Any] = {"rescale": "l1" if call.shared["rescale"] else False}
    own: list[dict[str, Any]] = []
    for place, model in enumerate(call.models):
        mine = {name: model[name] for name in ("gamma", "epsilon") if name in model}
        density = _share(model["density"])
        if density == 0 and call.kind.method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            # Nothing is kept of it: the methods that draw at random have no such density.
            density, weights[place] = 1.0, 0.0
        own.append({**mine, "density": density})
    names = {f.name for f in dataclasses.fields(get_method(call.kind.method).parameters)}
    if "aggregate" in names:
        values["aggregate"] = "mean" if call.shared["normalize"] else "sum"
    elif call.shared["normalize"]:
        alpha /= _total(_weights(call.models))
    if "consensus" in names:
        values["consensus"] = "weighted"
    if call.kind.method == "ties":
        values["keep_at_least"] = 1
    return _merged(call.kind, values, weights, own, scale=alpha)


def _linear(call: _Call) -> Translated:
    return _merged(call.kind, call.shared, _weights(call.models), space="weight")


def _slerp(call: _Call) -> Translated:
    return _merged(call.kind, {"t": call.shared["t"]}, (1.0, 1.0), space="weight", base_first=True)


def _nuslerp(call: _Call) -> Translated:
    weights = _weights(call.models)
    if abs(sum(weights)) < EVEN:
        weights = [0.5, 0.5]
    lines = "columns" if call.shared["nuslerp_row_wise"] else "rows"
    space = "delta" if call.base else "weight"
    values = {"vectors": "tensor" if call.shared["nuslerp_flatten"] else lines, "space": space}
    return _merged(call.kind, values, weights, space=space)


def _multislerp(call: _Call) -> Translated:
    space = "delta" if call.base else "weight"
    values = {
        "normalize": call.shared["normalize_weights"],
        "eps": call.shared["eps"],
        "space": space,
    }
    weights = [1.0] if len(call.models) == 1 else _weights(call.models)
    return _merged(call.kind, values, weights, space=space)


def _karcher(call: _Call) -> Translated:
    values = {**call.shared, "space": "weight"}
    return _merged(call.kind, values, [1.0] * len(call.models), space="weight")


def _passthrough(call: _Call) -> Translated:
    scale = call.models[0]["scale"]
    return _merged(call.kind, {"scale": 1.0 if scale is None else scale}, (1.0,), space="weight")


def _unweighted(call: _Call) -> Translated:
    """Translate methods that know no weights and take their parameters by their own names."""
    if not call.models:
        return _COPY
    names = {f.name for f in dataclasses.fields(get_method(call.kind.method).parameters)}
    values = {name: value for name, value in call.shared.items() if name in names}
    if "negligible" in names:
        values["negligible"] = NEGLIGIBLE
    return _merged(call.kind, values, [1.0] * len(call.models))


def _own_method(call: _Call) -> Translated:
    """Translate a method of ours: its own defaults, and α unless `scale` or `lambda` names it."""
    method = get_method(call.kind.method)
    given = {name: value for name, value in call.shared.items() if value is not None}
    scale, factor = given.pop("scale", None), given.pop("lambda", None)
    alpha = method.default_scale(len(call.models)) if scale is None else scale
    own = [{n: v for n, v in m.items() if n != "weight" and v is not None} for m in call.models]
    alpha *= 1.0 if factor is None else factor
    return _merged(call.kind, given, _weights(call.models), own, scale=alpha)


_Builder = Callable[[_Call], Translated]
_BUILDERS: Mapping[str, _Builder] = {
    **dict.fromkeys(
        ("arcee_fusion", "model_stock", "nearswap", "ram", "ramplus_tl", "sce"), _unweighted
    ),
    **{name: _thinned for name, kind in METHODS.items() if "density" in kind.each},
    "karcher": _karcher,
    "linear": _linear,
    "multislerp": _multislerp,
    "nuslerp": _nuslerp,
    "passthrough": _passthrough,
    "slerp": _slerp,
    "task_arithmetic": _added,
}
