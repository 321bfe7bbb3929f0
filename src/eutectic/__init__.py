"""eutectic: merge checkpoints fine-tuned from one base into one multi-task model.

    >>> import eutectic, torch
    >>> deltas = torch.stack([torch.eye(2), 3 * torch.eye(2)])
    >>> eutectic.merge_matrices("task_arithmetic", deltas)
    tensor([[4., 0.],
            [0., 4.]])

Names are imported on first use, so that `import eutectic` and `eutectic --help` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eutectic.errors import EutecticError
    from eutectic.evaluation import evaluate
    from eutectic.execution import MergeReport, merge_state_dicts
    from eutectic.methods import merge_matrices, methods
    from eutectic.reporting import inspect
    from eutectic.routed import build_routed, load_routed, routing
    from eutectic.statistics import collect, load_statistics
    from eutectic.tuning import merge, tune
    from eutectic.types import LayerStatistics, Merged, Treatment

__version__ = version("eutectic")

_HOMES = {
    "EutecticError": "eutectic.errors",
    "LayerStatistics": "eutectic.types",
    "MergeReport": "eutectic.execution",
    "Merged": "eutectic.types",
    "Treatment": "eutectic.types",
    "build_routed": "eutectic.routed",
    "collect": "eutectic.statistics",
    "evaluate": "eutectic.evaluation",
    "inspect": "eutectic.reporting",
    "load_routed": "eutectic.routed",
    "load_statistics": "eutectic.statistics",
    "merge": "eutectic.tuning",
    "merge_matrices": "eutectic.methods",
    "merge_state_dicts": "eutectic.execution",
    "methods": "eutectic.methods",
    "routing": "eutectic.routed",
    "tune": "eutectic.tuning",
}

__all__ = [
    "EutecticError",
    "LayerStatistics",
    "MergeReport",
    "Merged",
    "Treatment",
    "build_routed",
    "collect",
    "evaluate",
    "inspect",
    "load_routed",
    "load_statistics",
    "merge",
    "merge_matrices",
    "merge_state_dicts",
    "methods",
    "routing",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eutectic' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
