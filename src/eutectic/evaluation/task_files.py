"""Files of tasks: read, checked as a whole with line numbers, paths resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eutectic.data.columns import Columns
from eutectic.errors import Fault, TaskError
from eutectic.evaluation.task_schema import HarnessOptions, Part, Task, TaskFile, TaskSpec
from eutectic.recipes.document import (
    Location,
    Source,
    by_line,
    no_file,
    read_document,
    schema_fault,
)


def load_tasks(path: str | Path) -> dict[str, Task]:
    """Return the tasks of a YAML file by name, in its order.

    Relative paths in it start at the file's folder.

    Raises:
        TaskError: listing every fault, each with its line.
    """
    values, source, faults = read_document(path, "a file of tasks", "tasks", TaskError)
    try:
        checked = TaskFile.model_validate(dict(values))
    except ValidationError as error:
        faults += [schema_fault(item, source, _known_keys) for item in error.errors()]
        raise TaskError(by_line(faults), source.name) from None
    tasks: dict[str, Task] = {}
    for name, spec in checked.tasks.items():
        values, missing = _resolved(name, spec, source)
        faults += missing
        try:
            tasks[name] = Task.model_validate(values)
        except ValidationError as error:  # two names of one file are one only when resolved
            found = [{**item, "loc": ("tasks", name, *item["loc"])} for item in error.errors()]
            faults += [schema_fault(item, source, _known_keys) for item in found]
    if faults:
        raise TaskError(by_line(faults), source.name)
    return tasks


def _known_keys(location: Location) -> list[str]:
    inside = [str(part) for part in location[2:]]
    if len(location) == 1:
        return list(TaskFile.model_fields)
    if inside[:1] == ["data"] and len(inside) > 2:
        return list(Part.model_fields)
    if inside[:1] == ["columns"] and len(inside) > 1:
        return list(Columns.model_fields)
    if inside[:1] == ["harness"] and len(inside) > 1:
        return list(HarnessOptions.model_fields)
    return list(TaskSpec.model_fields)


def _resolved(name: str, spec: TaskSpec, source: Source) -> tuple[dict[str, Any], list[Fault]]:
    """Return a task's values with paths that start at the file's folder, and those not there."""
    values: dict[str, Any] = spec.model_dump() | {"name": name}
    harness = values["harness"] or {}
    places: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        (values["data"][split], "path", ("data", split)) for split in spec.data
    ]
    places += [(values, key, (key,)) for key in ("head", "base_head")]
    places.append((harness, "include_path", ("harness", "include_path")))
    if spec.function is not None and ".py:" in spec.function:
        places.append((values, "function", ("function",)))
    faults: list[Fault] = []
    for holder, key, inside in places:
        stated = holder.get(key)
        if stated is None:
            continue
        file = stated.rpartition(":")[0] if key == "function" else stated
        path = source.folder / Path(file).expanduser()
        if not path.exists():
            faults.append(no_file(("tasks", name, *inside), file, source))
        holder[key] = f"{path}{stated.removeprefix(file)}"
    return values, faults
