"""NAI per merged model and expert, from the results of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from eutectic.errors import RequestError, suggest


class _View(BaseModel):
    """The part of results.json that is read here."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Task(_View):
    name: str
    expert: str


class _Result(_View):
    checkpoint: str
    task: str
    nai: float | None


class _Results(_View):
    schema_version: Literal[1]
    split: str
    tasks: list[_Task]
    results: list[_Result]


@dataclass(frozen=True)
class KnownNai:
    """What results say of merged models.

    Attributes:
        split: of the tasks' data that was scored.
        values: merged model -> expert -> NAI, the mean where an expert has several tasks.
    """

    split: str
    values: dict[str, dict[str, float | None]]


def read_nai(path: Path, merged: Sequence[str]) -> KnownNai:
    """Return the NAI of those merged models that the results know.

    Raises:
        RequestError: the file holds no results, or none of the merged models.
    """
    try:
        results = _Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RequestError(
            f"{path}: holds no results ({where}: {first['msg']}).\n"
            "Name the results.json of `eutectic evaluate`."
        ) from None
    expert_of = {task.name: task.expert for task in results.tasks}
    found: dict[str, dict[str, list[float]]] = {}
    for result in results.results:
        if result.checkpoint in merged:
            expert = expert_of.get(result.task, result.task)
            own = found.setdefault(result.checkpoint, {}).setdefault(expert, [])
            own += [] if result.nai is None else [result.nai]
    if not found:
        listed = list(dict.fromkeys(result.checkpoint for result in results.results))
        raise RequestError(
            f"{path}: has results of {', '.join(listed) or 'nothing'}, of none of the merged "
            f"models {', '.join(merged)}.{suggest(merged[0], listed)}\n"
            "Give merged models the names that they have in the results."
        )
    values = {
        name: {n: sum(own) / len(own) if own else None for n, own in tasks.items()}
        for name, tasks in found.items()
    }
    return KnownNai(results.split, values)
