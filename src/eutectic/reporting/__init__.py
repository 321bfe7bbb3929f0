"""What checkpoints look like: spectra, interference, subspace alignment, and pictures of them."""

from eutectic.reporting.inspection import inspect
from eutectic.reporting.matrix_measures import alignment_rank, subspace_alignment_ratio
from eutectic.reporting.schema import Inspection
from eutectic.reporting.summary import correlate

__all__ = ["Inspection", "alignment_rank", "correlate", "inspect", "subspace_alignment_ratio"]
