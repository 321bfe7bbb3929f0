"""Measuring models on tasks."""

from eutectic.evaluation.model_outputs import Score, load_head, outputs, score
from eutectic.evaluation.results import Results, results_schema
from eutectic.evaluation.run import evaluate
from eutectic.evaluation.splits import Prepared, prepare
from eutectic.evaluation.task_files import Task, load_tasks
from eutectic.models.names import file_keys, put_tensors
from eutectic.models.task_models import checkpoint_tensors, head_tensors, load_model

__all__ = [
    "Prepared",
    "Results",
    "Score",
    "Task",
    "checkpoint_tensors",
    "evaluate",
    "file_keys",
    "head_tensors",
    "load_head",
    "load_model",
    "load_tasks",
    "outputs",
    "prepare",
    "put_tensors",
    "results_schema",
    "score",
]
