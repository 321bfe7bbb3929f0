"""Evaluation of checkpoints over tasks: every pair once, kept as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

from eutectic.checkpoint.experts import is_adapter
from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.errors import NumericalError, RequestError, TaskError, suggest
from eutectic.evaluation.bootstrap import (
    Draws,
    compare,
    difference,
    draw,
    gain,
    mean,
    over_tasks,
    result,
)
from eutectic.evaluation.functions import call_function
from eutectic.evaluation.harness import (
    HarnessRows,
    harness_version,
    read_harness,
    run_harness,
)
from eutectic.evaluation.journal import Journal
from eutectic.evaluation.metrics import LOWER_IS_BETTER, Outcomes
from eutectic.evaluation.outputs import Precision, load_head, outcomes_of, outputs
from eutectic.evaluation.prepare import BATCH_SIZE, Prepared, open_tokenizer, prepare
from eutectic.evaluation.results import CheckpointRecord, Results, TaskRecord
from eutectic.evaluation.rows import check_disjoint, data_hash, split_rows
from eutectic.evaluation.schema import Split, Task
from eutectic.evaluation.sources import (
    Checkpoint,
    RoutingMode,
    Sources,
    fingerprint,
    head_hashes,
    pair_identity,
    processor_hash,
    versions,
)
from eutectic.evaluation.tasks import load_tasks

Progress = Callable[[float, float, str], None]
Folder = str | Path
EXPERTS_MEAN = "experts"
NO_GAIN = "the expert is not better than the base, so that a larger NAI says nothing good: {}"


def evaluate(
    tasks: Folder | Mapping[str, Task],
    *,
    base: Folder | None = None,
    experts: Mapping[str, Folder] | None = None,
    models: Sequence[Folder] | Mapping[str, Folder] = (),
    output: Folder | None = None,
    split: Split = "test",
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    dtype: Precision = "float32",
    routing: RoutingMode = "route",
    proxy: Mapping[str, Folder | Sequence[Folder]] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    trust_code: bool = False,
    progress: Progress | None = None,
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
        models: merged or routed models, as folders or name -> folder.
        output: results.json; None writes nothing.
        split: `proxy`, `validation` or `test`.
        batch_size: rows per batch.
        limit: score the first rows only.
        dtype: `bfloat16` runs models under autocast.
        routing: of routed models: `route`, `oracle` (the task's expert) or `base` (experts off).
        proxy: task -> files that count as its proxy data, such as those given to `collect`.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        trust_code: allow tasks of the kind `function`, and harness tasks of one's own, which run
            Python code.
        progress: told finished rows, all rows, and what is being done.

    Raises:
        TaskError: faults of the tasks; splits that share rows.
        RequestError: nothing to evaluate, unknown names, missing columns.
        CheckpointError: a checkpoint that cannot be loaded, or lacks the task's head.
        NumericalError: NaN or Inf in a model's outputs.
        MissingExtraError: transformers, or lm-eval where a task needs it, is not installed.
    """
    _check_settings(split, dtype, routing, batch_size, limit, seed, resamples)
    if output is not None:
        check_replaced(Path(output), {"schema_version", "results"}, "results")
    known = dict(tasks) if isinstance(tasks, Mapping) else load_tasks(tasks)
    sources = _sources(known, base, experts or {}, models, routing)
    further = {
        name: [given] if isinstance(given, str | Path) else list(given)
        for name, given in (proxy or {}).items()
    }
    for name in further:
        if name not in known:
            raise RequestError(f"no task '{name}' for the proxy data.{suggest(name, list(known))}")
    counted = {
        name: check_disjoint(
            task, [str(path) for path in further.get(name, ())], trust_code=trust_code
        )
        for name, task in known.items()
    }
    run = _Run(sources, split, limit, batch_size, dtype, trust_code, progress)
    pairs = _pairs(sources, known)
    run.total = sum(_rows(task, split, limit, counted) for _, task in pairs)
    with Journal(None if output is None else Path(output)) as journal:
        outcomes = {(c.name, t.name): run.pair(c, t, journal) for c, t in pairs}
    results = _summary(sources, known, pairs, outcomes, run, counted, seed, resamples)
    if output is not None:
        write_atomically(Path(output), (results.model_dump_json(indent=1) + "\n").encode())
    return results


@dataclass
class _Run:
    """What stays in memory between pairs: encoded splits, and the last model."""

    sources: Sources
    split: Split
    limit: int | None
    batch_size: int
    dtype: Precision
    trust_code: bool
    progress: Progress | None
    total: int = 0
    done: int = 0
    prepared: dict[tuple[str, str, str], Prepared] = field(default_factory=dict[Any, Any])
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    harness: dict[str, HarnessRows] = field(default_factory=dict[str, HarnessRows])
    loaded: tuple[Any, Any] = (None, None)

    def pair(self, checkpoint: Checkpoint, task: Task, journal: Journal) -> Outcomes:
        """Return the outcomes of one pair, from the journal if it is finished."""
        self._tell(0, checkpoint, task)
        if task.name not in self.hashes:
            self.hashes[task.name] = self._data_hash(task)
        settings = [self.split, self.limit, self.dtype]
        pair = pair_identity(self.sources, checkpoint, task, self.hashes[task.name], settings)
        found = journal.get(pair)
        if found is None:
            compute = {"function": self._function, "lm-eval": self._harness}
            found = compute.get(task.kind, self._model)(checkpoint, task)
            journal.add(pair, checkpoint.name, task.name, found)
        elif self.progress is not None:
            self._tell(len(found.predictions), checkpoint, task)
        return found

    def _data_hash(self, task: Task) -> str:
        if task.kind == "lm-eval":
            rows = read_harness(task, self.limit, trust_code=self.trust_code)
            self.harness[task.name] = rows
            return rows.data_hash
        return data_hash(task, split_rows(task, self.split, self.limit) if task.data else [])

    def _harness(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        model = self._loaded(checkpoint, task)
        tokenizer = open_tokenizer(
            self.sources.processor(checkpoint, task), task, self.sources.base
        )
        with self.sources.routed_as_asked(model, checkpoint, task):
            found = run_harness(
                task,
                self.harness[task.name],
                model,
                tokenizer,
                batch_size=self.batch_size,
                dtype=self.dtype,
                trust_code=self.trust_code,
            )
        self._tell(len(found.predictions), checkpoint, task)
        return found

    def _function(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        rows = split_rows(task, self.split, self.limit) if task.data else []
        base = self.sources.base if is_adapter(checkpoint.folder) else None
        found = call_function(task, checkpoint.folder, rows, base, trust_code=self.trust_code)
        self._tell(len(rows), checkpoint, task)
        return found

    def _model(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        model = self._loaded(checkpoint, task)  # first: without a head there are no classes
        ready = self._prepared(checkpoint, task)
        head = load_head(task, base=checkpoint.role == "base")
        with self.sources.routed_as_asked(model, checkpoint, task):
            try:
                found = outputs(
                    model,
                    ready,
                    head,
                    dtype=self.dtype,
                    progress=lambda rows: self._tell(rows, checkpoint, task),
                )
            except NumericalError as error:
                raise NumericalError(f"{checkpoint.name}: {error}") from None
        return outcomes_of(found, ready)

    def _loaded(self, checkpoint: Checkpoint, task: Task) -> Any:
        # Tasks with linear heads share one encoder, whose pooler is there only where one uses it;
        # others have a head each.
        own = task.name if task.head is None else None
        key = (checkpoint.name, own, task.pooling == "pooler")
        if self.loaded[0] != key:
            self.loaded = (None, None)  # the old model's memory first
            self.loaded = (key, self.sources.load(checkpoint, task))
        return self.loaded[1]

    def _prepared(self, checkpoint: Checkpoint, task: Task) -> Prepared:
        folder = self.sources.processor(checkpoint, task)
        labels = self.sources.label_ids(checkpoint, task)
        key = (task.name, processor_hash(folder), str(sorted(labels.items())))
        if key not in self.prepared:
            try:
                self.prepared[key] = prepare(
                    task,
                    self.split,
                    folder,
                    batch_size=self.batch_size,
                    limit=self.limit,
                    label_ids=labels,
                    base=self.sources.base,
                )
            except TaskError as error:
                if task.labels is not None or checkpoint.role == "expert":
                    raise
                *first, last = error.faults
                hint = (
                    f"These are the classes of the head that '{checkpoint.name}' predicts with. "
                    "Name those of all models\nin the task (labels: […]), or let bodies take the "
                    "expert's head (head_tensors: ['classifier.*'])."
                )
                last = replace(last, next=f"{last.next}\n{hint}")
                raise TaskError([*first, last], f"task '{task.name}'") from None
        return self.prepared[key]

    def _tell(self, rows: int, checkpoint: Checkpoint, task: Task) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done), f"{checkpoint.name}, {task.name}")


def _check_settings(
    split: str,
    dtype: str,
    routing: str,
    batch_size: int,
    limit: int | None,
    seed: int,
    resamples: int,
) -> None:
    chosen = {
        "split": (split, Split),
        "dtype": (dtype, Precision),
        "routing": (routing, RoutingMode),
    }
    for name, (value, choices) in chosen.items():
        allowed = get_args(choices)
        if value not in allowed:
            raise RequestError(
                f"{name} is one of {', '.join(allowed)}; got '{value}'.{suggest(value, allowed)}"
            )
    least = {
        "batch_size": (batch_size, 1), "limit": (1 if limit is None else limit, 1),
        "seed": (seed, 0), "resamples": (resamples, 0),
    }  # fmt: skip
    for name, (value, low) in least.items():
        if value < low:
            raise RequestError(f"{name} must be at least {low}, got {value}.")


def _sources(
    tasks: Mapping[str, Task],
    base: Folder | None,
    experts: Mapping[str, Folder],
    models: Sequence[Folder] | Mapping[str, Folder],
    routing: RoutingMode,
) -> Sources:
    named = dict(models) if isinstance(models, Mapping) else {str(m).rstrip("/"): m for m in models}
    wanted = [task.expert_name for task in tasks.values()]
    for name in experts:
        if name not in wanted:
            raise RequestError(
                f"the expert '{name}' has no task.{suggest(name, wanted)}\n"
                f"Tasks are of the experts: {', '.join(dict.fromkeys(wanted))}."
            )
    reserved = [name for name in named if name in ("base", EXPERTS_MEAN) or name in experts]
    if reserved:
        raise RequestError(f"the name '{reserved[0]}' is taken; write another as NAME=FOLDER.")
    taken = [name for name in experts if name in ("base", EXPERTS_MEAN)]
    if taken:
        raise RequestError(f"an expert cannot be called '{taken[0]}'; tables use that name.")
    found = [Checkpoint("base", "base", Path(base))] if base is not None else []
    found += [Checkpoint(name, "expert", Path(path)) for name, path in experts.items()]
    found += [Checkpoint(name, "model", Path(path)) for name, path in named.items()]
    if not found:
        raise RequestError("nothing to evaluate: name a base, experts or models.")
    for checkpoint in found:
        if not checkpoint.folder.is_dir():
            raise RequestError(f"{checkpoint.folder}: no such folder ({checkpoint.name}).")
    if routing != "route" and not any(checkpoint.routed for checkpoint in found):
        raise RequestError(f"routing '{routing}' is for routed models, and none of these is one.")
    folders = {name: Path(path) for name, path in experts.items()}
    return Sources(None if base is None else Path(base), folders, tuple(found), routing)


def _pairs(sources: Sources, tasks: Mapping[str, Task]) -> list[tuple[Checkpoint, Task]]:
    return [
        (checkpoint, task)
        for checkpoint in sources.checkpoints
        for task in tasks.values()
        if checkpoint.role != "expert" or task.expert_name == checkpoint.name
    ]


def _rows(
    task: Task, split: Split, limit: int | None, counted: Mapping[str, Mapping[str, int]]
) -> int:
    own = ("test",) if task.kind == "lm-eval" else tuple(task.data)
    if split not in own and task.kind != "function":
        raise RequestError(f"task '{task.name}' has no split '{split}'; it has {', '.join(own)}.")
    rows = counted[task.name].get(split, 0)
    return rows if limit is None else min(limit, rows)


def _summary(
    sources: Sources,
    tasks: Mapping[str, Task],
    pairs: Sequence[tuple[Checkpoint, Task]],
    outcomes: Mapping[tuple[str, str], Outcomes],
    run: _Run,
    counted: Mapping[str, dict[str, int]],
    seed: int,
    resamples: int,
) -> Results:
    draws = {(c.name, t.name): draw(t, outcomes[c.name, t.name], seed, resamples) for c, t in pairs}
    figures: dict[str, dict[str, tuple[Draws, Draws, Draws]]] = {}
    without_gain: list[str] = []
    for checkpoint, task in pairs:
        own = draws[checkpoint.name, task.name]
        named = task.expert_name in sources.experts
        expert = draws.get((task.expert_name, task.name)) if named else None
        below = draws.get(("base", task.name))
        relative = compare(task, own, expert, below)
        if expert is own and below is not None and gain(task, own, below) <= 0:
            without_gain.append(f"{task.name} ({own.value:.4g}, base {below.value:.4g})")
        row = EXPERTS_MEAN if checkpoint.role == "expert" else checkpoint.name
        figures.setdefault(row, {})[task.name] = (own, *relative)
    records = [
        result(
            c.name,
            t,
            len(outcomes[c.name, t.name].predictions),
            figures[EXPERTS_MEAN if c.role == "expert" else c.name][t.name],
        )
        for c, t in pairs
    ]
    own_tasks = {row: [tasks[name] for name in found] for row, found in figures.items()}
    together = {row: over_tasks(own_tasks[row], found) for row, found in figures.items()}
    compared = [row for row in together if row != EXPERTS_MEAN]
    scored = {r.task: r.n for r in records}
    return Results(
        split=run.split,
        limit=run.limit,
        dtype=run.dtype,
        seed=seed,
        resamples=resamples,
        versions=versions() | harness_version(tasks.values()),
        checkpoints=tuple(
            CheckpointRecord(
                name=c.name,
                role=c.role,
                path=str(c.folder),
                fingerprint=fingerprint(c.folder, sources.base),
                routing=sources.routing if c.routed else None,
            )
            for c in sources.checkpoints
        ),
        tasks=tuple(
            TaskRecord(
                name=t.name,
                kind=t.kind,
                expert=t.expert_name,
                metric=t.metric_name,
                higher_is_better=t.formula not in LOWER_IS_BETTER,
                split=run.split,
                n=scored.get(t.name, 0),
                data_hash=run.hashes.get(t.name, ""),
                splits=counted[t.name],
                head_hashes=head_hashes(t),
            )
            for t in tasks.values()
        ),
        results=tuple(records),
        means=tuple(mean(row, own_tasks[row], found) for row, found in together.items()),
        differences=tuple(
            difference(row, other, together[row], together[other])
            for row, other in permutations(compared, 2)
        ),
        notes=(NO_GAIN.format(", ".join(without_gain)),) if without_gain else (),
    )
