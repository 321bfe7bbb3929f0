"""Tasks that are a Python function: code that runs, so only when the caller allows it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from eutectic.errors import RequestError
from eutectic.evaluation.metrics import Outcomes
from eutectic.evaluation.schema import Task
from eutectic.statistics.rows import Row, look_in


def call_function(
    task: Task, folder: Path, rows: Sequence[Row], base: Path | None, *, trust_code: bool
) -> Outcomes:
    """Return what `function(folder, rows, **options)` says: one number per row, higher is better.

    Without data it is called with no rows and says how many numbers there are. Adapters also get
    `base=`.

    Raises:
        RequestError: without `trust_code`; no such function; another number of values than rows.
    """
    name = str(task.function)
    if not trust_code:
        raise RequestError(
            f"task '{task.name}' runs the Python code of '{name}'.\n"
            "Add --trust-code (trust_code=True) if you trust it."
        )
    further: dict[str, Any] = {} if base is None else {"base": str(base)}
    function = _function(task, name)
    try:
        values = function(str(folder), list(rows), **further, **task.options)
    except Exception as error:
        raise RequestError(
            f"task '{task.name}': '{name}' failed: {type(error).__name__}: {error}."
        ) from error
    try:
        numbers = np.array([float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError):
        raise RequestError(
            f"task '{task.name}': '{name}' gave a {type(values).__name__}; it must give a list of "
            "numbers, one per row."
        ) from None
    if not len(numbers) or (rows and len(numbers) != len(rows)) or not np.isfinite(numbers).all():
        raise RequestError(
            f"task '{task.name}': '{name}' gave {len(numbers)} values for {len(rows)} rows; it "
            "must give one finite number per row."
        )
    return Outcomes(numbers, np.ones(len(numbers)))


def source_file(where: str) -> Path | None:
    """Return the file of a function's code, without running any: `file.py`, or a module's name.

    None for a module that is not there, or is no file of Python.
    """
    if where.endswith(".py"):
        return Path(where)
    look_in(Path.cwd())
    path: Sequence[str] | None = None
    spec = None
    for depth in range(1, where.count(".") + 2):
        spec = PathFinder.find_spec(".".join(where.split(".")[:depth]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    found = Path(spec.origin) if spec is not None and spec.origin else None
    return found if found is not None and found.suffix == ".py" and found.is_file() else None


def _function(task: Task, name: str) -> Callable[..., Any]:
    where, _, attribute = name.rpartition(":")
    is_file = where.endswith(".py")
    look_in(Path(where).resolve().parent if is_file else Path.cwd())
    try:
        return getattr(_module(where) if is_file else importlib.import_module(where), attribute)
    except Exception as error:  # whatever the code does on import
        raise RequestError(
            f"task '{task.name}': '{name}' cannot be imported: {type(error).__name__}: {error}."
        ) from error


def _module(file: str) -> ModuleType:
    """Return a file as a module, under a name that no other module has."""
    name = f"_eutectic_{hashlib.sha256(file.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module in {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for a class's module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
