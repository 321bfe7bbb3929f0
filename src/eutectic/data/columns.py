"""The columns that rows of each kind of task have, and their labels as indices or numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from eutectic.errors import RequestError, StatisticsError
from eutectic.models.task_kinds import GENERATIVE, LABELLED, PICTURES, TaskKind

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
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    relevant: str = "relevant"
    id: str = "id"


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


# The forms that rows of language models have, by the fields of `Columns`: a text, whose tokens all
# count, a prompt with its completion, or a chat. The first whose column a row has; one whose
# column has a name of its own comes before.
_LANGUAGE_FORMS = (("text",), ("messages",), ("prompt", "completion"))
# Inputs of each kind by the fields of `Columns`; kinds that read rows themselves have none.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "text-classification": ("text", "text_pair"),
    "pair-classification": ("text", "text_pair"),
    "regression": ("text", "text_pair"),
    "feature-extraction": ("text", "text_pair"),
    "sentence-similarity": ("text", "text_pair"),
    "retrieval": ("text",),
    **dict.fromkeys(PICTURES, ("image",)),
    "sequence-to-sequence": ("source",),
    "language-model": ("text",),
}
ANSWERS: Mapping[str, str] = {
    **dict.fromkeys((*LABELLED, "regression", "feature-extraction"), "label"),
    "sentence-similarity": "label",
    "retrieval": "relevant",
    "sequence-to-sequence": "target",
}
_TEXTS = ("text", "text_pair", "source", "target")
_PAIRS_ALLOWED = ("text-classification", "regression", "feature-extraction")


def inputs_of(task: RowsOfTask, row: Row) -> tuple[str, ...]:
    """Return the inputs of a row, as fields of `Columns`; none of kinds that read rows themselves.

    Language models take texts, prompts with completions, or messages of chats; models of sequence
    to sequence a prompt in place of a source.
    """
    columns = task.columns
    if task.kind == "language-model":
        named = [
            form
            for form in _LANGUAGE_FORMS
            if any(getattr(columns, field) != field for field in form)
        ]
        for form in (*named, *_LANGUAGE_FORMS):
            if getattr(columns, form[0]) in row:
                return form
        return (named or _LANGUAGE_FORMS)[0]
    if task.kind == "sequence-to-sequence" and columns.source not in row and columns.prompt in row:
        return ("prompt",)
    return INPUTS.get(task.kind, ())


def answer_of(task: RowsOfTask, row: Row) -> str | None:
    """Return the field of `Columns` that holds a row's answer; None where it is no column."""
    if inputs_of(task, row) == ("prompt",):
        return "completion"
    return ANSWERS.get(task.kind)


def is_spoken(task: RowsOfTask, row: Row) -> bool:
    """Tell whether a row holds messages, which a chat template writes."""
    if task.kind != "language-model":
        return False
    values = [row.get(getattr(task.columns, name)) for name in inputs_of(task, row)]
    return any(isinstance(value, list | tuple) for value in values)


def check_forms(rows: Sequence[Row], task: RowsOfTask, where: str = "") -> None:
    """Refuse (RequestError) data whose rows are of several forms, such as texts and chats."""
    if task.kind not in GENERATIVE:
        return
    forms = [inputs_of(task, row) for row in rows]
    other = next((number for number, form in enumerate(forms) if form != forms[0]), None)
    if other is not None:
        raise RequestError(
            f"{where}row {other + 1} has {' and '.join(forms[other])}, row 1 has "
            f"{' and '.join(forms[0])}.\nPut them into two files, one for each."
        )


def check_answers(rows: Iterable[Row], kind: TaskKind, columns: Columns, source: str) -> None:
    """Refuse (RequestError) prompts and chats of a language model of which none has an answer."""
    task = _Rows(kind, columns)
    empty = True
    for row in rows:
        if kind != "language-model" or inputs_of(task, row) == ("text",):
            return
        if _may_answer(row.get(getattr(columns, inputs_of(task, row)[-1]))):
            return
        empty = False
    if empty:
        return
    raise RequestError(
        f"{source}: none of its rows has an answer, and gradients are of answers alone.\n"
        "Give chats with turns of the assistant or prompts with completions, or name the column of "
        "prompts with --text-column, whose tokens all count."
    )


def _may_answer(value: Any) -> bool:
    """Tell whether a completion or a chat holds an answer, or is none at all: others refuse it."""
    if isinstance(value, str):
        return bool(value.strip())
    if not isinstance(value, list | tuple) or not value:
        return True
    turns = [turn if isinstance(turn, Mapping) else None for turn in value]
    return any(turn is None or turn.get("role", turn.get("from")) in _SPEAKERS for turn in turns)


@dataclass(frozen=True)
class _Rows:
    kind: TaskKind
    columns: Columns


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of a chat, each with a `role` and `content`.

    `from` and `value` are read as these, as are human and gpt as user and assistant; parts of a
    content that are all texts are joined. RequestError for anything else.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(
            f"{where}: messages are a list of {{role, content}}, got {type(value).__name__}"
            f"{' without any' if isinstance(value, list | tuple) else ''}.\n"
            "In csv and tsv there are none: write json lines."
        )
    return [_message(turn, f"{where}, message {number}") for number, turn in enumerate(value, 1)]


_SPEAKERS = ("assistant", "gpt", "bot", "chatgpt")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RequestError(f"{where}: is a {type(turn).__name__}, not {{role, content}}.")
    known = {str(key): value for key, value in turn.items()}
    if "role" not in known and "from" in known:
        role = str(known.pop("from"))
        known = {"role": _ROLES.get(role, role), "content": known.pop("value", None), **known}
    content = known.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            content = known["content"] = "".join(texts)
    spoken = isinstance(content, str) or (content is None and known.get("tool_calls"))
    if not isinstance(known.get("role"), str) or not spoken:
        raise RequestError(
            f"{where}: a message has a role and a content, both texts; this one has "
            f"{', '.join(known) or 'nothing'}."
        )
    return known


def required_inputs(task: RowsOfTask, row: Row | None = None) -> list[str]:
    """Return the inputs that every row must have, of rows that are of one form with `row`.

    A second text may be absent, unless its column has a name of its own: that is meant to be there.
    """
    inputs = inputs_of(task, row or {})
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
            elif field == "messages" or (
                field in ("prompt", "completion") and not isinstance(row[name], str | int | float)
            ):
                messages_of(row[name], f"{where}row {number}, column '{name}'")


def check_text(value: Any, column: str, where: str) -> None:
    """Refuse (RequestError) what is no text, and would become the text of a Python value."""
    if not isinstance(value, Mapping | list | tuple | set | bytes) and not hasattr(value, "ndim"):
        return
    first = value[0] if isinstance(value, list | tuple) and value else None
    inside = f" of {type(first).__name__}" if first is not None else ""
    turns = isinstance(first, Mapping) and {"role", "from"} & set(first)
    advice = (
        "Messages of chats are not read as texts: of language models name that column with "
        f"--messages-column (in a task: columns: {{messages: {column}}}), for others write what "
        "the tokenizer's apply_chat_template makes of them into a column."
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
