"""Files of tasks: read, checked as a whole with line numbers, paths resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eutectic.errors import Fault, TaskError
from eutectic.evaluation.schema import ColumnNames, HarnessOptions, Part, Task, TaskFile, TaskSpec
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
        faults += _path_faults(name, spec, source)
        try:
            tasks[name] = _resolved(name, spec, source.folder)
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
        return list(ColumnNames.model_fields)
    if inside[:1] == ["harness"] and len(inside) > 1:
        return list(HarnessOptions.model_fields)
    return list(TaskSpec.model_fields)


def _path_faults(name: str, spec: TaskSpec, source: Source) -> list[Fault]:
    named: list[tuple[Location, str]] = [
        (("tasks", name, "data", split), part.path) for split, part in spec.data.items()
    ]
    named += [
        (("tasks", name, key), value)
        for key, value in (("head", spec.head), ("base_head", spec.base_head))
        if value is not None
    ]
    if spec.harness is not None and spec.harness.include_path is not None:
        named.append((("tasks", name, "harness", "include_path"), spec.harness.include_path))
    if spec.function is not None and ".py:" in spec.function:
        file = spec.function.rpartition(":")[0]
        named.append((("tasks", name, "function"), file))
    return [
        no_file(where, path, source)
        for where, path in named
        if not _inside(path, source.folder).exists()
    ]


def _resolved(name: str, spec: TaskSpec, folder: Path) -> Task:
    values: dict[str, Any] = spec.model_dump() | {"name": name}
    for part in values["data"].values():
        part["path"] = str(_inside(part["path"], folder))
    for key in ("head", "base_head"):
        if values[key] is not None:
            values[key] = str(_inside(values[key], folder))
    if values["harness"] is not None and values["harness"]["include_path"] is not None:
        values["harness"]["include_path"] = str(_inside(values["harness"]["include_path"], folder))
    if spec.function is not None and ".py:" in spec.function:
        values["function"] = str(_inside(spec.function, folder))
    return Task.model_validate(values)


def _inside(path: str, folder: Path) -> Path:
    return folder / Path(path).expanduser()
