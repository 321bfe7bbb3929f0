"""Which columns the rows of each kind of task have, and the check that they have them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from eutectic.errors import RequestError
from eutectic.models.task_kinds import CLASSIFICATION, TaskKind

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
    "image-classification": ("image",),
    "sequence-to-sequence": ("source",),
    "language-model": ("text",),
}
ANSWERS: Mapping[str, str] = {
    **dict.fromkeys((*CLASSIFICATION, "regression", "feature-extraction"), "label"),
    "sequence-to-sequence": "target",
}
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
