"""Methods, and ways to choose their α, compared on tasks in one table."""

from eutectic.comparison.compare import compare
from eutectic.comparison.table import Comparison, Row

__all__ = ["Comparison", "Row", "compare"]
