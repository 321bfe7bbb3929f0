"""What checkpoints look like: spectra, interference, subspace alignment, and pictures of them."""

from eutectic.reporting.alignment import alignment_rank, subspace_alignment_ratio
from eutectic.reporting.correlation import correlate
from eutectic.reporting.inspection import inspect
from eutectic.reporting.schema import Inspection

__all__ = [
    "Inspection",
    "alignment_rank",
    "correlate",
    "inspect",
    "subspace_alignment_ratio",
]
