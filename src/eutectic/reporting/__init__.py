"""What checkpoints look like and what merges did: measurements, pictures, and the report."""

from typing import TYPE_CHECKING

from eutectic.on_first_use import names_on_first_use

if TYPE_CHECKING:
    from eutectic.reporting.inspection import inspect
    from eutectic.reporting.matrix_measures import alignment_rank, subspace_alignment_ratio
    from eutectic.reporting.page import Report, report
    from eutectic.reporting.schema import Inspection
    from eutectic.reporting.summary import correlate

__all__ = [
    "Inspection",
    "Report",
    "alignment_rank",
    "correlate",
    "inspect",
    "report",
    "subspace_alignment_ratio",
]

# A report reads results and statistics, which an inspection does not need.
_FILES = {
    "inspection": ("inspect",),
    "matrix_measures": ("alignment_rank", "subspace_alignment_ratio"),
    "page": ("Report", "report"),
    "schema": ("Inspection",),
    "summary": ("correlate",),
}
__getattr__, __dir__ = names_on_first_use(__name__, _FILES)
