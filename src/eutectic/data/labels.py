"""Labels of rows as class indices or numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eutectic.errors import StatisticsError


@dataclass(frozen=True)
class ClassLabels:
    """What labels of rows may be."""

    names: Mapping[str, int]  # class name -> index
    classes: int | None = None  # None: labels may also be numbers, or lists of numbers

    def of_row(self, value: Any, number: int) -> int | float | list[float]:
        """Return the label of row `number`: an index, a number, or a list of numbers as it is."""
        if isinstance(value, list):
            return value
        if isinstance(value, bool) and str(value) not in self.names:
            value = int(value)
        try:
            if self.classes is None and not named_by_numbers(self.names):
                if str(value) not in self.names:
                    whole = isinstance(value, int) or str(value).isdecimal()
                    return int(value) if whole else float(value)
            return class_index(value, self.names, self.classes or math.inf)
        except (TypeError, ValueError):
            known = ", ".join([*self.names][:20])
            if self.classes is not None and not named_by_numbers(self.names):
                known += f", or 0 to {self.classes - 1}"
            raise StatisticsError(
                f"row {number}: the model knows no label '{value}'.\nIts labels: {known}."
            ) from None


def named_by_numbers(names: Mapping[str, int]) -> bool:
    """Tell whether "1", "2", "3" are names of classes 0, 1, 2: then numbers are not indices."""
    return any(name.isdecimal() and int(name) != index for name, index in names.items())


def class_index(value: Any, names: Mapping[str, int], classes: float = math.inf) -> int:
    """Return the class of a label: by its name, or by its number where names allow it.

    ValueError or TypeError where it is none. Truth values are 0 and 1 where names merely count.

    >>> class_index("yes", {"no": 0, "yes": 1}), class_index(1.0, {"no": 0, "yes": 1})
    (1, 1)
    """
    if isinstance(value, bool):
        value = _truth_value(value, names)
    if isinstance(value, float) and value.is_integer() and str(value) not in names:
        value = int(value)
    if str(value) in names:
        return names[str(value)]
    number = float(value)
    if named_by_numbers(names) or not number.is_integer() or not 0 <= number < classes:
        raise ValueError(value)
    return int(number)


def finite_number(value: Any) -> float:
    """Return a label as a number; ValueError or TypeError if it is not a finite one."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _truth_value(value: bool, names: Mapping[str, int]) -> str | int:
    """Return the name of a truth value, or 0 or 1 where no class has a name of its own."""
    for name in (str(value), str(value).lower()):
        if name in names:
            return name
    if any(name not in (f"LABEL_{i}", str(i)) for name, i in names.items()):
        raise ValueError(value)
    return int(value)
