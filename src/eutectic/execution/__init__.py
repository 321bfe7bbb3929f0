"""Carrying out a plan: streamed, journalled, resumable."""

from eutectic.execution.extraction import extract
from eutectic.execution.planned import PlanReport, plan
from eutectic.execution.run import MergeReport, merge, merge_state_dicts

__all__ = ["MergeReport", "PlanReport", "extract", "merge", "merge_state_dicts", "plan"]
