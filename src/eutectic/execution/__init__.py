"""Carrying out a plan: streamed, journalled, resumable."""

from eutectic.execution.run import MergeReport, merge, merge_state_dicts

__all__ = ["MergeReport", "merge", "merge_state_dicts"]
