"""Values that a recipe gives to many tensors at once: over depth, and by the tensors' names.

A setting is a scalar, a list of scalars spread over the layers, or cases of which the first that
fits a tensor's name decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from eutectic.conventions_patterns import fits

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Gradient:
    """Values at equal distances from the first layer to the last."""

    values: tuple[Scalar, ...]

    def at(self, depth: float) -> Scalar:
        """Return the value at a depth from 0 to 1.

        Numbers are interpolated between the two nearest; words and truth values are not, the one
        at or before the depth is taken.
        """
        place = depth * (len(self.values) - 1)
        first = int(place)
        low, high = self.values[first], self.values[min(len(self.values) - 1, first + 1)]
        if isinstance(low, (bool, str)) or isinstance(high, (bool, str)):
            return low
        share = place - first
        return (1 - share) * low + share * high


@dataclass(frozen=True)
class Case:
    """A setting for the tensors whose names a shell pattern fits; None fits all."""

    match: str | None
    value: Setting


Setting = Scalar | Gradient | tuple[Case, ...]
Settings = Mapping[str, Setting]


def value_of(setting: Setting, name: str | Sequence[str], depth: float) -> Scalar | None:
    """Return the value that a setting gives to a tensor; None where no case fits its name.

    The first case that fits decides, be it that it says nothing of this tensor in its turn. A
    tensor may have several spellings, of which one has to fit.
    """
    if isinstance(setting, Gradient):
        return setting.at(depth)
    if isinstance(setting, tuple):
        names = (name,) if isinstance(name, str) else name
        found = next(
            (c for c in setting if c.match is None or any(fits(n, c.match) for n in names)), None
        )
        return None if found is None else value_of(found.value, name, depth)
    return setting


def first_value(
    places: Sequence[Settings], parameter: str, name: str | Sequence[str], depth: float
) -> Scalar | None:
    """Return the value of a parameter by the first of several places that gives one."""
    for settings in places:
        if parameter in settings:
            value = value_of(settings[parameter], name, depth)
            if value is not None:
                return value
    return None


def scalars(setting: Setting) -> Iterator[Scalar]:
    """Yield every scalar of a setting."""
    if isinstance(setting, Gradient):
        yield from setting.values
    elif isinstance(setting, tuple):
        for case in setting:
            yield from scalars(case.value)
    else:
        yield setting


def is_constant(setting: Setting) -> bool:
    """Tell whether a setting gives every tensor the same value."""
    return not isinstance(setting, (Gradient, tuple))


def setting_of(value: object) -> Setting:
    """Return what a recipe of ours says as a setting; ValueError says what is wrong.

    A list of numbers is a gradient, a list of `{match: PATTERN, value: …}` are cases.
    """
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, (list, tuple)) and value:
        items = cast("Sequence[object]", value)
        if all(isinstance(item, (int, float, str)) for item in items):
            return Gradient(tuple(cast("Sequence[Scalar]", items)))
        if all(isinstance(item, Mapping) for item in items):
            return tuple(_case_of(cast("Mapping[str, object]", item)) for item in items)
    if isinstance(value, (int, float, str)):
        return value
    raise ValueError("is a value, a list of values over depth, or a list of {match: …, value: …}")


def _case_of(item: Mapping[str, object]) -> Case:
    if unknown := [key for key in item if key not in ("match", "value")]:
        raise ValueError(f"a case has match and value, not '{unknown[0]}'")
    match = item.get("match")
    if "value" not in item or not (match is None or isinstance(match, str)):
        raise ValueError("a case is {match: PATTERN, value: …}; without match it fits all tensors")
    return Case(None if match == "*" else match, setting_of(item["value"]))


def varies(value: object) -> bool:
    """Tell whether a value of a recipe of ours may differ from tensor to tensor."""
    return isinstance(value, (list, tuple, Mapping))
