"""eutectic: merge checkpoints fine-tuned from one base into one multi-task model.

    >>> import eutectic, torch
    >>> deltas = torch.stack([torch.eye(2), 3 * torch.eye(2)])
    >>> eutectic.merge_matrices("task_arithmetic", deltas)
    tensor([[4., 0.],
            [0., 4.]])

Names are imported on first use, so that `import eutectic` and `eutectic --help` stay quick.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eutectic.on_first_use import names_on_first_use
from eutectic.versions import version

if TYPE_CHECKING:
    from eutectic.calibration import CalibrationReport, calibrate
    from eutectic.checking import CheckReport, check
    from eutectic.comparison import Comparison, compare
    from eutectic.errors import EutecticError
    from eutectic.evaluation import evaluate
    from eutectic.execution import MergeReport, PlanReport, extract, merge_state_dicts, plan
    from eutectic.methods import merge_matrices, methods
    from eutectic.reporting import inspect, report
    from eutectic.routed import build_routed, load_routed, routing
    from eutectic.statistics import collect, load_statistics
    from eutectic.tuning import merge, tune
    from eutectic.types import LayerStatistics, Merged, Treatment

__version__ = version("eutectic")

_ROOMS = {
    "calibration": ("CalibrationReport", "calibrate"),
    "checking": ("CheckReport", "check"),
    "comparison": ("Comparison", "compare"),
    "errors": ("EutecticError",),
    "evaluation": ("evaluate",),
    "execution": ("PlanReport", "plan", "MergeReport", "extract", "merge_state_dicts"),
    "methods": ("merge_matrices", "methods"),
    "reporting": ("inspect", "report"),
    "routed": ("build_routed", "load_routed", "routing"),
    "statistics": ("collect", "load_statistics"),
    "tuning": ("merge", "tune"),
    "types": ("LayerStatistics", "Merged", "Treatment"),
}

__all__ = [
    "CalibrationReport",
    "CheckReport",
    "Comparison",
    "EutecticError",
    "LayerStatistics",
    "MergeReport",
    "Merged",
    "PlanReport",
    "Treatment",
    "build_routed",
    "calibrate",
    "check",
    "collect",
    "compare",
    "evaluate",
    "extract",
    "inspect",
    "load_routed",
    "load_statistics",
    "merge",
    "merge_matrices",
    "merge_state_dicts",
    "methods",
    "plan",
    "report",
    "routing",
    "tune",
]


__getattr__, _ = names_on_first_use(__name__, _ROOMS)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This package, whose public names no room takes: `eutectic.methods` is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; importing a room called as a public name leaves that as it is."""
        if name in __all__ and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
