"""Carrying out a plan: streamed, journalled, resumable."""

from eutectic.execution.extraction import extract
from eutectic.execution.run import MergeReport, merge, merge_state_dicts

__all__ = ["MergeReport", "extract", "merge", "merge_state_dicts"]
