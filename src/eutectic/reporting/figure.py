"""Figures without a window. matplotlib is loaded here, when it is needed, and nowhere else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from eutectic.checkpoint.writer import write_atomically
from eutectic.errors import MissingExtraError


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of that many inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "Drawing a plot") from None
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure in the format that the file's ending names.

    Raises:
        OutputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=dpi)
    write_atomically(path, buffer.getvalue())
