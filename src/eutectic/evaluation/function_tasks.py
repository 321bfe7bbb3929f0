"""Tasks that are a Python function: code that runs, so only when the caller allows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eutectic.data.columns import Row
from eutectic.data.python_functions import import_function
from eutectic.errors import RequestError
from eutectic.evaluation.metrics import Outcomes
from eutectic.evaluation.task_files import Task


def call_function(
    task: Task, folder: Path, rows: Sequence[Row], base: Path | None, *, trust_code: bool
) -> Outcomes:
    """Return what `function(folder, rows, **options)` says: one number per row, higher is better.

    Without data it is called with no rows and says how many numbers there are. Adapters also get
    `base=`.
    """
    name = str(task.function)
    further: dict[str, Any] = {} if base is None else {"base": str(base)}
    try:
        function = import_function(name, trust_code=trust_code)
    except RequestError as error:
        raise RequestError(f"task '{task.name}': {error}") from error
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
