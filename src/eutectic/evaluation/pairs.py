"""Outcomes of (checkpoint, task) pairs: by a model, a function or the harness, each kept once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from eutectic.checkpoint.experts import is_adapter
from eutectic.cluster.devices import ON_CPU, Device, running_on
from eutectic.data.columns import Row
from eutectic.data.python_functions import imported
from eutectic.errors import (
    NumericalError,
    RequestError,
    TaskError,
    suggest,
)
from eutectic.evaluation.checkpoints import Checkpoint, Checkpoints, RoutingMode
from eutectic.evaluation.embeddings import rows_hash, settings_for
from eutectic.evaluation.identities import processor_hash
from eutectic.evaluation.lm_eval_harness import HarnessRows, read_harness, run_harness
from eutectic.evaluation.measured_pairs import Journal
from eutectic.evaluation.metrics import METRICS_OF_KIND, Outcomes
from eutectic.evaluation.model_outputs import Precision, load_head, outcomes_of, outputs
from eutectic.evaluation.splits import (
    BATCH_SIZE,
    Prepared,
    open_processor,
    prepare,
    split_rows,
)
from eutectic.evaluation.task_files import Split, Task
from eutectic.models.task_kinds import EMBEDDING
from eutectic.options import dtype_name

Progress = Callable[[float, float, str], None]
MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How checkpoints are measured; see `evaluate`."""

    split: Split = "test"
    batch_size: int = BATCH_SIZE
    limit: int | None = None
    dtype: Precision = "float32"
    routing: RoutingMode = "route"
    seed: int = 0
    resamples: int = 1000
    trust_code: bool = False

    def __post_init__(self) -> None:
        """Take other spellings of a dtype, such as bf16."""
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    def check(self) -> None:
        """Raise RequestError for a value that is out of range."""
        for name, kind in {"split": Split, "dtype": Precision, "routing": RoutingMode}.items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                near = suggest(str(value), allowed)
                raise RequestError(f"{name} is one of {', '.join(allowed)}; got '{value}'.{near}")
        for name, least in {"batch_size": 1, "limit": 1, "seed": 0, "resamples": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name} must be at least {least}, got {value}.")
        if self.resamples > MOST_RESAMPLES:
            raise RequestError(
                f"resamples must be at most {MOST_RESAMPLES:,}, got {self.resamples:,}."
            )


@dataclass
class Pairs:
    """All pairs of an evaluation, and what stays in memory between them.

    `rows` counts those of every task and split; `hashes` is filled task by task.
    """

    checkpoints: Checkpoints
    tasks: Mapping[str, Task]
    rows: Mapping[str, dict[str, int]]
    settings: EvaluationSettings
    progress: Progress | None = None
    device: Device = ON_CPU  # where models run
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    _done: int = 0
    _total: int = 0
    _prepared: dict[tuple[str, str, str], Prepared] = field(default_factory=dict[Any, Any])
    _harness: dict[str, HarnessRows] = field(default_factory=dict[str, HarnessRows])
    _loaded: tuple[Any, Any] = (None, None)

    def __post_init__(self) -> None:
        """Count all rows; refuses tasks without the split."""
        self._total = sum(self.count(task) for _, task in self)

    def __iter__(self) -> Iterator[tuple[Checkpoint, Task]]:
        """Yield (checkpoint, task): experts are asked about their own tasks only."""
        for checkpoint in self.checkpoints.all:
            for task in self.tasks.values():
                if checkpoint.role != "expert" or task.expert_name == checkpoint.name:
                    yield checkpoint, task

    def outcomes(
        self, journal: Journal, keys: Mapping[str, str] | None = None
    ) -> dict[tuple[str, str], Outcomes]:
        """Return (checkpoint, task) names -> outcomes, from the journal where they are finished.

        `keys`: task -> identity of its pair, for a single checkpoint that is known otherwise.
        """
        found = {(c.name, t.name): self._pair(c, t, journal, keys) for c, t in self}
        self._loaded = (None, None)
        return found

    def of(self, *checkpoints: Checkpoint, progress: Progress | None = None) -> Pairs:
        """Return the pairs of other checkpoints; rows that were read are not read again."""
        others = replace(self.checkpoints, all=checkpoints)
        return replace(self, checkpoints=others, progress=progress, _done=0, _loaded=(None, None))

    def identity(self, checkpoint: Checkpoint, task: Task) -> str:
        """Return a hash of all that decides a pair's outcomes, for a task that was run."""
        asked = [self.settings.split, self.settings.limit, self.settings.dtype]
        if self.device.model and task.kind != "function":  # which runs where it likes
            asked.append(self.device.model)
        return self.checkpoints.pair_identity(checkpoint, task, self.hashes[task.name], asked)

    def count(self, task: Task) -> int:
        """Return how many rows of a task are scored; refuses one without the split."""
        split, limit = self.settings.split, self.settings.limit
        own = ("test",) if task.kind == "lm-eval" else tuple(task.data)
        if split not in own and task.kind != "function":
            raise RequestError(
                f"task '{task.name}' has no split '{split}'; it has {', '.join(own)}."
            )
        rows = self.rows[task.name].get(split, 0)
        return rows if limit is None else min(limit, rows)

    def _pair(
        self,
        checkpoint: Checkpoint,
        task: Task,
        journal: Journal,
        keys: Mapping[str, str] | None = None,
    ) -> Outcomes:
        self._tell(0, checkpoint, task)
        self._see_rows(task)
        pair = self.identity(checkpoint, task) if keys is None else keys[task.name]
        if (found := journal.found.get(pair)) is None:
            found = self.computed(checkpoint, task)
            journal.add(pair, checkpoint.name, task.name, found)
        else:
            self._tell(len(found.predictions), checkpoint, task)
        return found

    def identified(self, checkpoint: Checkpoint, task: Task) -> str:
        """Return the same of any task, whose rows are read if they were not yet."""
        self._see_rows(task)
        return self.identity(checkpoint, task)

    def _see_rows(self, task: Task) -> None:
        if task.name not in self.hashes and task.kind == "lm-eval":
            self.hashes[task.name] = self._rows_of_harness(task).data_hash
        elif task.name not in self.hashes:
            self.hashes[task.name] = rows_hash(task, self._split_rows(task))

    def computed(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        """Return a pair's outcomes, computed now."""
        compute = {"function": self._by_function, "lm-eval": self._by_harness}
        with running_on(self.device.name):
            return compute.get(task.kind, self._by_model)(checkpoint, task)

    def elsewhere(self) -> Pairs:
        """Return the same for another process: without what is open here."""
        return replace(
            self, progress=None, _done=0, _prepared={}, _harness={}, _loaded=(None, None)
        )

    @contextmanager
    def running_on(self, name: str) -> Iterator[None]:
        """Run models on a device of this process meanwhile; a loaded one waits on the CPU."""
        before = self.device
        self.device = replace(before, name=name)
        if self._loaded[1] is not None:
            self._loaded[1].to(name)
        try:
            yield
        finally:
            self.device = before
            if self._loaded[1] is not None:
                self._loaded[1].to("cpu")

    def _rows_of_harness(self, task: Task) -> HarnessRows:
        if task.name not in self._harness:
            limit, trust_code = self.settings.limit, self.settings.trust_code
            self._harness[task.name] = read_harness(task, limit, trust_code=trust_code)
        return self._harness[task.name]

    def _split_rows(self, task: Task) -> list[Any]:
        return split_rows(task, self.settings.split, self.settings.limit) if task.data else []

    def _by_harness(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        model = self._model(checkpoint, task)
        folder = self.checkpoints.processor(checkpoint, task)
        tokenizer, _ = open_processor(task, folder, self.checkpoints.base)
        with self.checkpoints.routed_as_asked(model, checkpoint, task):
            found = run_harness(
                task,
                self._rows_of_harness(task),
                model,
                tokenizer,
                batch_size=self.settings.batch_size,
                dtype=self.settings.dtype,
                trust_code=self.settings.trust_code,
            )
        self._tell(len(found.predictions), checkpoint, task)
        return found

    def _by_function(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        rows, trust_code = self._split_rows(task), self.settings.trust_code
        base = self.checkpoints.base if is_adapter(checkpoint.folder) else None
        found = call_function(task, checkpoint.folder, rows, base, trust_code=trust_code)
        self._tell(len(rows), checkpoint, task)
        return found

    def _by_model(self, checkpoint: Checkpoint, task: Task) -> Outcomes:
        model = self._model(checkpoint, task)  # first: without a head there are no classes
        ready = self._encoded(checkpoint, task)
        head = load_head(task, base=checkpoint.role == "base")
        with self.checkpoints.routed_as_asked(model, checkpoint, task):
            try:
                found = outputs(
                    model,
                    ready,
                    head,
                    dtype=self.settings.dtype,
                    progress=lambda rows: self._tell(rows, checkpoint, task),
                )
            except NumericalError as error:
                raise NumericalError(f"{checkpoint.name}: {error}") from None
        return outcomes_of(found, ready)

    def _model(self, checkpoint: Checkpoint, task: Task) -> Any:
        # Tasks with linear heads share one encoder, whose pooler is there only where one uses it,
        # and those of vectors one with its pooling; others have a head each.
        own = task.name if task.head is None else None
        if task.kind in EMBEDDING:
            own = f"vectors by {task.pooling}"
        key = (checkpoint.name, own, task.pooling == "pooler")
        if self._loaded[0] != key:
            self._loaded = (None, None)  # the old model's memory first
            self._loaded = (key, self.checkpoints.load(checkpoint, task, self.device.name))
        return self._loaded[1]

    def _encoded(self, checkpoint: Checkpoint, task: Task) -> Prepared:
        folder = self.checkpoints.processor(checkpoint, task)
        labels = self.checkpoints.label_ids(checkpoint, task)
        sentences = settings_for(task, folder, self.checkpoints.base)
        key = (task.name, processor_hash(folder), str([sorted(labels.items()), sentences]))
        if key not in self._prepared:
            try:
                self._prepared[key] = prepare(
                    self.checkpoints.with_template(checkpoint, task),
                    self.settings.split,
                    folder,
                    batch_size=self.settings.batch_size,
                    limit=self.settings.limit,
                    label_ids=labels,
                    base=self.checkpoints.base,
                )
            except TaskError as error:
                classes = "accuracy" in METRICS_OF_KIND[task.kind]
                if not classes or task.labels is not None or checkpoint.role == "expert":
                    raise
                *first, last = error.faults
                hint = (
                    f"These are the classes of the head that '{checkpoint.name}' predicts with. "
                    "Name those of all models\nin the task (labels: […]), or let bodies take the "
                    "expert's head (head_tensors: ['classifier.*'])."
                )
                last = replace(last, next=f"{last.next}\n{hint}")
                raise TaskError([*first, last], f"task '{task.name}'") from None
        return self._prepared[key]

    def _tell(self, rows: int, checkpoint: Checkpoint, task: Task) -> None:
        self._done += rows
        if self.progress is not None:
            total = max(self._total, self._done)
            self.progress(self._done, total, f"{checkpoint.name}, {task.name}")


def call_function(
    task: Task, folder: Path, rows: Sequence[Row], base: Path | None, *, trust_code: bool
) -> Outcomes:
    """Return what `function(folder, rows, **options)` says: one number per row, higher is better.

    Without data it is called with no rows and says how many numbers there are.
    """
    name = str(task.function)
    of_adapter: dict[str, Any] = {} if base is None else {"base": str(base)}
    with imported(name, trust_code=trust_code) as function:
        try:
            values = function(str(folder), list(rows), **of_adapter, **task.options)
        except Exception as error:
            raise RequestError(
                f"task '{task.name}': '{name}' failed: {type(error).__name__}: {error}."
            ) from error
        try:
            numbers = np.array([float(value) for value in values], dtype=np.float64)
        except (TypeError, ValueError):
            raise RequestError(
                f"task '{task.name}': '{name}' gave a {type(values).__name__}; it must give a list "
                "of numbers, one per row."
            ) from None
    if not len(numbers) or (rows and len(numbers) != len(rows)) or not np.isfinite(numbers).all():
        raise RequestError(
            f"task '{task.name}': '{name}' gave {len(numbers)} values for {len(rows)} rows; it "
            "must give one finite number per row."
        )
    return Outcomes(numbers, np.ones(len(numbers)))
