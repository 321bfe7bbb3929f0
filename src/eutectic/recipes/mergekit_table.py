"""The table of mergekit's merge methods: their parameters, defaults and contracts.

Those of mergekit 0.1.5 (github.com/arcee-ai/mergekit), with the method here that each one is.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from eutectic.methods import all_methods

Base = Literal["required", "optional", "unused"]


@dataclass(frozen=True)
class MergekitParameter:
    """One parameter of a mergekit method.

    Attributes:
        kind: its type. Lists of numbers are gradients over depth, lists of truth values are steps.
        default: its value where the recipe gives none; without meaning if `required`.
        required: the recipe must give it.
        idle: mergekit accepts it, and it changes nothing.
    """

    kind: type
    default: Any = None
    required: bool = False
    idle: bool = False


@dataclass(frozen=True, kw_only=True)
class MergekitMethod:
    """What a mergekit method takes.

    Attributes:
        method: the name of the method here.
        shared: parameters that a tensor has once.
        each: parameters that each model has.
        base: "required", "optional", or "unused": then a `base_model` is one of the models, which
            mergekit adds after the others where the recipe does not list it.
        fewest: the smallest number of models, without the base unless it is one of them.
        most: the largest one.
    """

    method: str
    shared: Mapping[str, MergekitParameter] = field(default_factory=dict[str, MergekitParameter])
    each: Mapping[str, MergekitParameter] = field(default_factory=dict[str, MergekitParameter])
    base: Base = "required"
    fewest: int = 1
    most: int | None = None


def _p(kind: type, default: Any = None, **more: Any) -> MergekitParameter:
    return MergekitParameter(kind, default, **more)


_WEIGHT = {"weight": _p(float, required=True)}
_DENSITY = {"density": _p(float, 1.0)}
_INT8 = {"int8_mask": _p(bool, False, idle=True)}


def _sparse(
    method: str, normalize: bool, rescale: bool, each: Mapping[str, MergekitParameter] | None = None
) -> MergekitMethod:
    """Return one of the methods that add up thinned task vectors."""
    shared = {
        "normalize": _p(bool, normalize),
        "rescale": _p(bool, rescale),
        "lambda": _p(float, 1.0),
        **_INT8,
    }
    return MergekitMethod(
        method=method, shared=shared, each={**_WEIGHT, **_DENSITY, **(each or {})}, fewest=0
    )


_ARITHMETIC = MergekitMethod(
    method="task_arithmetic",
    shared={
        "normalize": _p(bool, False),
        "lambda": _p(float, 1.0),
        "rescale": _p(bool, False, idle=True),
        **_INT8,
    },
    each={**_WEIGHT, "density": _p(float, 1.0, idle=True)},
    fewest=0,
)
_GAMMA = {"gamma": _p(float, 0.01)}
_EPSILON = {"epsilon": _p(float, 0.15)}

METHODS: Mapping[str, MergekitMethod] = MappingProxyType(
    {
        "arcee_fusion": MergekitMethod(method="arcee_fusion", most=1),
        "breadcrumbs": _sparse("breadcrumbs", False, False, _GAMMA),
        "breadcrumbs_ties": _sparse("breadcrumbs_ties", False, False, _GAMMA),
        "dare_linear": _sparse("dare_linear", False, True),
        "dare_ties": _sparse("dare_ties", False, True),
        "della": _sparse("della", True, True, _EPSILON),
        "della_linear": _sparse("della_linear", False, True, _EPSILON),
        "karcher": MergekitMethod(
            method="karcher",
            shared={"max_iter": _p(int, 10), "tol": _p(float, 1e-5)},
            base="unused",
        ),
        "linear": MergekitMethod(
            method="linear", shared={"normalize": _p(bool, True)}, each=_WEIGHT, base="unused"
        ),
        "model_stock": MergekitMethod(
            method="model_stock", shared={"filter_wise": _p(bool, False)}, fewest=2
        ),
        "multislerp": MergekitMethod(
            method="multislerp",
            shared={"normalize_weights": _p(bool, True), "eps": _p(float, 1e-8)},
            each=_WEIGHT,
            base="optional",
        ),
        "nearswap": MergekitMethod(
            method="nearswap", shared={"t": _p(float, required=True)}, most=1
        ),
        "nuslerp": MergekitMethod(
            method="nuslerp",
            shared={"nuslerp_flatten": _p(bool, True), "nuslerp_row_wise": _p(bool, False)},
            each=_WEIGHT,
            base="optional",
            fewest=2,
            most=2,
        ),
        "passthrough": MergekitMethod(
            method="passthrough", each={"scale": _p(float)}, base="unused", most=1
        ),
        "ram": MergekitMethod(method="ram", shared={"epsilon": _p(float, 1e-5)}, fewest=0),
        "ramplus_tl": MergekitMethod(
            method="ramplus_tl",
            shared={"r": _p(float, 0.1), "alpha": _p(float, 0.2), "epsilon": _p(float, 1e-5)},
            fewest=0,
        ),
        "sce": MergekitMethod(
            method="sce", shared={"select_topk": _p(float, 1.0), **_INT8}, fewest=0
        ),
        "slerp": MergekitMethod(method="slerp", shared={"t": _p(float, required=True)}, most=1),
        "task_arithmetic": _ARITHMETIC,
        "ties": _sparse("ties", True, False),
    }
)


def known_method(name: str) -> MergekitMethod | None:
    """Return what a `merge_method` takes: one of mergekit's, or one of ours by the same syntax.

    Ours take each model's `weight` (1 unless given), their own parameters, and `scale` or `lambda`
    for α. None where there is no such method.
    """
    return METHODS.get(name) or _ours(name)


@cache
def _ours(name: str) -> MergekitMethod | None:
    method = all_methods().get(name)
    if method is None:
        return None
    values = {f.name: _p(object, required=False) for f in dataclasses.fields(method.parameters)}
    per_model = {n: p for n, p in values.items() if n in method.per_expert}
    fewest, most = method.experts
    return MergekitMethod(
        method=name,
        shared={**values, "scale": _p(float), "lambda": _p(float)},
        each={"weight": _p(float, 1.0), **per_model},
        fewest=fewest,
        most=most,
    )
