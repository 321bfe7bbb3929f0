"""Tasks of lm-evaluation-harness: its rows, prompts, metrics; intervals and journal from here."""

import contextlib
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from eutectic.errors import MissingExtraError, RequestError, first_line
from eutectic.evaluation.metrics import Outcomes
from eutectic.evaluation.model_outputs import Precision
from eutectic.evaluation.task_files import Task
from eutectic.versions import version


@dataclass(frozen=True, eq=False)
class HarnessRows:
    """A task's rows as the harness has them, before any model is asked, groups taken apart."""

    tasks: tuple[Any, ...]
    data_hash: str  # of the harness's version, the tasks' configurations and the rows
    limit: int | None


def read_harness(task: Task, limit: int | None, *, trust_code: bool) -> HarnessRows:
    """Let the harness find its tasks and load their rows, from its cache or the hub."""
    asked = task.harness
    assert asked is not None
    if asked.include_path is not None and not trust_code:
        raise RequestError(
            f"task '{task.name}' reads harness tasks from {asked.include_path}, which may run "
            "Python code.\nAdd --trust-code (trust_code=True) if you trust them."
        )
    limits = [n for n in (asked.limit, limit) if n is not None]
    first = min(limits) if limits else None
    with _quietly():
        try:
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("lm-eval", "lm-eval", f"The task '{task.name}'") from None
        manager = TaskManager(include_path=asked.include_path)
        unknown = [name for name in asked.tasks if name not in manager.all_tasks]
        if unknown:
            raise RequestError(
                f"task '{task.name}': lm-eval knows no task '{unknown[0]}'.\n"
                "`lm-eval ls tasks` lists what it knows; harness: {include_path: …} adds more."
            )
        try:
            tasks = tuple(manager.load(list(asked.tasks))["tasks"].values())
            digest = _hash(tasks, first)
        except Exception as error:  # whatever the hub, a file or a task's own code raises
            raise RequestError(
                f"task '{task.name}': lm-eval cannot load {', '.join(asked.tasks)}: "
                f"{first_line(error)}"
            ) from error
    return HarnessRows(tasks, digest, first)


def run_harness(
    task: Task,
    rows: HarnessRows,
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    dtype: Precision,
    trust_code: bool,
) -> Outcomes:
    """Return the task's metric row by row, over all of its harness tasks, as its command does."""
    asked = task.harness
    assert asked is not None
    with _quietly(), _seeded():
        from lm_eval import evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        wrapped = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if dtype == "bfloat16" else None,
        )
        for one in rows.tasks:
            _set_fewshot(one, asked.num_fewshot)
        try:
            found = evaluate(
                wrapped,
                {"tasks": {one.task_name: one for one in rows.tasks}},
                limit=rows.limit,
                bootstrap_iters=0,
                confirm_run_unsafe_code=trust_code,
            )
        except ValueError as error:
            raise RequestError(f"task '{task.name}': lm-eval: {first_line(error)}") from error
    assert found is not None
    values = np.concatenate([_of_task(task, name, found) for name in found["samples"]])
    return Outcomes(values, np.ones(len(values)))


def _set_fewshot(harness_task: Any, count: int | None) -> None:
    """Set the number of examples as the harness's command does: tasks that say 0 keep it."""
    own = harness_task.get_config("num_fewshot")
    if own != 0 and (count is not None or own is None):
        harness_task.set_config(key="num_fewshot", value=count or 0)
    harness_task.set_fewshot_seed(seed=1234)


def _of_task(task: Task, name: str, found: Any) -> np.ndarray[Any, Any]:
    """Return one harness task's metric row by row, held to the harness's own figure."""
    assert task.harness is not None
    metric, chosen = task.metric_name, task.harness.filter
    samples = [s for s in found["samples"][name] if metric in s["metrics"]]
    filters = list(dict.fromkeys(s["filter"] for s in samples))
    if not samples:
        known = dict.fromkeys(m for s in found["samples"][name] for m in s["metrics"])
        raise RequestError(
            f"task '{task.name}': '{name}' has no metric '{metric}'; it has {', '.join(known)}.\n"
            "Name one in the task: metric: NAME."
        )
    if chosen is None and len(filters) > 1 or chosen is not None and chosen not in filters:
        raise RequestError(
            f"task '{task.name}': '{name}' has the filters {', '.join(filters)}.\n"
            "Name one in the task: harness: {filter: NAME}."
        )
    samples = [s for s in samples if s["filter"] == (chosen or filters[0])]
    samples.sort(key=lambda s: s["doc_id"])
    whole = found["results"][name].get(f"{metric},{chosen or filters[0]}")
    values = [s[metric] for s in samples]
    numbers = all(isinstance(v, int | float | np.number) for v in values)
    if not numbers or abs(float(np.mean(values)) - float(whole)) > 1e-9:
        raise RequestError(
            f"task '{task.name}': '{metric}' of '{name}' is no mean over rows.\nTake another "
            "metric, or the kind 'language-model' for loss and perplexity."
        )
    if not found["higher_is_better"][name].get(metric, True):
        raise RequestError(
            f"task '{task.name}': of '{metric}' of '{name}' less is better, and shares of the "
            "expert are of metrics where more is better.\nTake another metric."
        )
    return np.array(values, dtype=np.float64)


def _hash(tasks: tuple[Any, ...], limit: int | None) -> str:
    digest = hashlib.sha256(version("lm-eval").encode())
    for task in tasks:
        described = [task.task_name, task.dump_config()]
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        for row in islice(task.eval_docs, limit):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the harness's log and its progress bars off the terminal."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed as the harness's command does, and put the process's random states back."""
    plain, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(0)
            np.random.seed(1234)
            torch.manual_seed(1234)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)
