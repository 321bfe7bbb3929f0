"""The columns that rows of each kind of task have, and their labels as indices or numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from eutectic.errors import RequestError, StatisticsError
from eutectic.models.task_kinds import LABELLED, PICTURES, TaskKind

Row = Mapping[str, Any]


class Columns(BaseModel):
    """Which column holds what; one that no task needs may be absent under its default name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    source: str = "source"
    target: str = "target"
    image: str = "image"


class RowsOfTask(Protocol):
    """Whatever says what its rows are for and how their columns are called."""

    @property
    def kind(self) -> TaskKind:
        """What the rows are for."""
        ...

    @property
    def columns(self) -> Columns:
        """The names of the columns."""
        ...


# Inputs of each kind by the fields of `Columns`; kinds that read rows themselves have none.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "text-classification": ("text", "text_pair"),
    "pair-classification": ("text", "text_pair"),
    "regression": ("text", "text_pair"),
    "feature-extraction": ("text", "text_pair"),
    **dict.fromkeys(PICTURES, ("image",)),
    "sequence-to-sequence": ("source",),
    "language-model": ("text",),
}
ANSWERS: Mapping[str, str] = {
    **dict.fromkeys((*LABELLED, "regression", "feature-extraction"), "label"),
    "sequence-to-sequence": "target",
}
_TEXTS = ("text", "text_pair", "source", "target")
_PAIRS_ALLOWED = ("text-classification", "regression", "feature-extraction")


def required_inputs(task: RowsOfTask) -> list[str]:
    """Return the inputs that every row must have.

    A second text may be absent, unless its column has a name of its own: that is meant to be there.
    """
    inputs = INPUTS.get(task.kind, ())
    optional = task.kind in _PAIRS_ALLOWED and task.columns.text_pair == "text_pair"
    return [name for name in inputs if not (optional and name == "text_pair")]


def check_columns(
    rows: Sequence[Row],
    columns: Columns,
    wanted: Sequence[str],
    *,
    advice: Callable[[str], str],
    where: str = "",
    first: int = 1,
) -> None:
    """Refuse rows that lack a value in one of the `wanted` fields of `Columns`."""
    names = {field: getattr(columns, field) for field in wanted}
    for number, row in enumerate(rows, first):
        for field, name in names.items():
            if name not in row:
                raise RequestError(
                    f"{where}row {number} has no column '{name}'; it has "
                    f"{', '.join(map(str, row))}.\n{advice(field)}"
                )
            if row[name] is None:
                raise RequestError(f"{where}row {number} is empty in the column '{name}'.")
            if field in _TEXTS:
                check_text(row[name], name, f"{where}row {number}")


def check_text(value: Any, column: str, where: str) -> None:
    """Refuse (RequestError) what is no text, and would become the text of a Python value."""
    if not isinstance(value, Mapping | list | tuple | set | bytes) and not hasattr(value, "ndim"):
        return
    first = value[0] if isinstance(value, list | tuple) and value else None
    inside = f" of {type(first).__name__}" if first is not None else ""
    turns = isinstance(first, Mapping) and {"role", "from"} & set(first)
    advice = (
        "Messages of chats are not read: write what the tokenizer's apply_chat_template makes of "
        "them into a column."
        if turns
        else "Name a column of texts, or write one."
    )
    raise RequestError(
        f"{where}: the column '{column}' holds a {type(value).__name__}{inside}, no text.\n{advice}"
    )


def check_pairs(rows: Sequence[Row], task: RowsOfTask, where: str = "") -> None:
    """Refuse (RequestError) data of which some rows have a second text and others have none."""
    if task.kind not in _PAIRS_ALLOWED:
        return
    column = task.columns.text_pair
    present = [row.get(column) is not None for row in rows]
    if len(set(present)) > 1:
        raise RequestError(
            f"{where}row {present.index(False) + 1} has no '{column}', "
            f"row {present.index(True) + 1} has.\n"
            "Rows are pairs or single texts; put them into two files, one for each."
        )


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


def names_of_classes(rows: Iterable[Row], column: str) -> tuple[str, ...] | None:
    """Return the sorted labels of rows where all are names; None where they only count."""
    held = {row.get(column) for row in rows} - {None}
    names = {label for label in held if isinstance(label, str) and not label.isdecimal()}
    return tuple(sorted(names)) if held and names == held else None


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
