"""Evaluation of checkpoints over tasks: every pair once, kept as it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.cluster.devices import CPU, ON_CPU, models_here
from eutectic.cluster.gpus import device_of_workers
from eutectic.cluster.where import ExecutorName, check_where, joined, taken_for_merge
from eutectic.data.python_functions import untrusted
from eutectic.errors import RequestError, suggest
from eutectic.evaluation.checkpoints import RoutingMode, check_heads, named_checkpoints
from eutectic.evaluation.figures import results_of
from eutectic.evaluation.measured_pairs import open_journal
from eutectic.evaluation.pairs import EvaluationSettings, Pairs, Progress
from eutectic.evaluation.results import Results
from eutectic.evaluation.splits import check_disjoint
from eutectic.evaluation.spread_pairs import spread_pairs
from eutectic.evaluation.task_files import Split, Task, load_tasks
from eutectic.notebook import with_bar
from eutectic.options import options_from
from eutectic.storage import local_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

Folder = str | Path


class EvaluationOptions(TypedDict, total=False):
    """Further keywords of `evaluate`."""

    split: Split
    batch_size: int
    limit: int | None
    dtype: Literal["float32", "bfloat16"]
    routing: RoutingMode
    seed: int
    resamples: int
    trust_code: bool
    executor: ExecutorName
    ray_address: str | None
    device: str


@with_bar("evaluating")
def evaluate(
    tasks: Folder | Mapping[str, Task],
    *,
    base: Folder | None = None,
    experts: Mapping[str, Folder] | None = None,
    models: Folder | Sequence[Folder] | Mapping[str, Folder] = (),
    output: Folder | None = None,
    proxy: Mapping[str, Folder | Sequence[Folder]] | None = None,
    progress: Progress | None = None,
    **options: Unpack[EvaluationOptions],
) -> Results:
    """Measure checkpoints on tasks, with bootstrap intervals and figures relative to the experts.

    NAI(t) = (m − m_base) / (m_expert − m_base) with m the task's metric; normalised is
    m / m_expert (m_expert / m where lower is better). Intervals are 95 % percentiles over resamples
    of rows, the same resamples for all checkpoints, so that differences between them are paired;
    tasks are taken as given. One model is in memory at a time. A finished (checkpoint, task) pair
    is kept in `<output>.outcomes.jsonl`: a killed run loses at most one, and pairs whose inputs
    changed are computed again.

    Args:
        tasks: a YAML file, or what `load_tasks` returned.
        base: the base: evaluated, and the base of adapters.
        experts: name -> folder, each evaluated on the tasks that are its own.
        models: merged or routed models, as a folder, folders, or name -> folder.
        output: results.json; None writes nothing.
        proxy: task -> files that count as its proxy data, such as those given to `collect`.
        progress: told finished rows, all rows, and what is being done.
        **options: `split` (`proxy`, `validation` or `test`, the default); `batch_size` (rows per
            batch, 64); `limit` (score the first rows only); `dtype` (`float32`, or `bfloat16`,
            which runs models under autocast); `routing` of routed models (`route`, `oracle`: the
            task's expert, or `base`: experts off); `seed` (0) and `resamples` (1000) of the
            bootstrap; `trust_code` (allow tasks of the kind `function`, and harness tasks of the
            user's own, which run Python code); `executor` (`threads`, or `ray`: pairs of checkpoint
            and task go to the workers of a cluster, each with a core and a model of its own) and
            `ray_address`, as for `eutectic.merge`; `device`, where models run: "cpu" (the default),
            "cuda", "cuda:N", "mps", or "auto" for an accelerator where there is one. Tasks of the
            kind `function` run where their code says. With Ray, "cuda" is whichever GPU a worker is
            given.

    Raises:
        TaskError: faults of the tasks; splits that share rows.
        RequestError: nothing to evaluate, unknown names, missing columns.
        CheckpointError: a checkpoint that cannot be loaded, or lacks the task's head.
        NumericalError: NaN or Inf in a model's outputs.
        MissingExtraError: transformers, or lm-eval where a task needs it, is not installed.
    """
    where = taken_for_merge(rest := dict(options))
    settings = options_from(EvaluationSettings, rest, "evaluate")
    settings.check()
    check_where(where.get("executor", "threads"), where.get("ray_address"))
    target = None if output is None else local_path(output)
    if target is not None:
        check_replaced(target, {"schema_version", "results"}, "results")
    on_ray = where.get("executor") == "ray"
    device = ON_CPU if on_ray else models_here(where.get("device", CPU))
    known = dict(tasks) if isinstance(tasks, Mapping) else load_tasks(tasks)
    check_trust(known, settings.trust_code)
    checkpoints = named_checkpoints(known, base, experts or {}, models, settings.routing)
    check_heads(checkpoints, known)
    counted = checked_splits(known, proxy or {}, settings.trust_code)
    cluster = joined(where.get("ray_address")) if on_ray else None
    if cluster is not None:
        device = device_of_workers(where.get("device", CPU))
    pairs = Pairs(checkpoints, known, counted, settings, progress, device)
    with open_journal(target) as journal:
        if cluster is not None:
            spread_pairs(pairs, journal, cluster)
            pairs.progress = None  # all of them have been told
        outcomes = pairs.outcomes(journal)
    results = results_of(pairs, outcomes)
    if target is not None:
        write_atomically(target, (results.model_dump_json(indent=1) + "\n").encode())
    return results


def check_trust(tasks: Mapping[str, Task], trust_code: bool) -> None:
    """Refuse tasks that run code of the user's, unless it is allowed, before anything is read."""
    for name, task in tasks.items():
        if task.function is not None and not trust_code:
            raise untrusted(task.function, f"task '{name}': ")


def checked_splits(
    tasks: Mapping[str, Task], proxy: Mapping[str, Folder | Sequence[Folder]], trust_code: bool
) -> dict[str, dict[str, int]]:
    """Return task -> split -> number of rows; no two splits share a row."""
    further: dict[str, list[str]] = {}
    for name, given in proxy.items():
        if name not in tasks:
            raise RequestError(f"no task '{name}' for the proxy data.{suggest(name, list(tasks))}")
        further[name] = [str(p) for p in ([given] if isinstance(given, str | Path) else given)]
    counts: dict[str, dict[str, int]] = {}
    for name, task in tasks.items():
        splits = check_disjoint(task, further.get(name, ()), trust_code=trust_code)
        counts[name] = {split: len(keys) for split, keys in splits.items()}
    return counts
