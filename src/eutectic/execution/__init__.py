"""Carrying out a plan: streamed, journalled, resumable."""

from eutectic.execution.in_memory import merge_state_dicts
from eutectic.execution.run import MergeReport, merge

__all__ = ["MergeReport", "merge", "merge_state_dicts"]
