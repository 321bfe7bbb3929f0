"""Objectives that run the model: a metric with labels, a divergence without."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from eutectic.cluster.devices import ON_CPU, Device, running_on
from eutectic.conventions_patterns import fits
from eutectic.errors import Note, NumericalError
from eutectic.evaluation.metrics import LOWER_IS_BETTER
from eutectic.evaluation.model_outputs import score
from eutectic.execution.journal import Ledger
from eutectic.execution.schedule import Choice, Choose, Unscaled
from eutectic.execution.tasks import Finished
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.recipes.schema import ScaleSearch
from eutectic.tuning.divergence import feature_distance, kl_divergence
from eutectic.tuning.inplace import round_tensors, share_bodies
from eutectic.tuning.putting import common_shapes, is_of_vectors, putting
from eutectic.tuning.search import Measured, ScaleCurve, plain_parts, search_scale
from eutectic.tuning.search_tasks import TuningTask, lent_heads, open_tasks

STAGE = "scale"  # of measurements in the journal
Measure = Callable[[TuningTask, Any, Any], tuple[float, float]]


@dataclass(frozen=True)
class Opened:
    """Tasks of searches that were opened, and outputs of experts, for other merges of the same.

    For merges of one base and the same experts; see `prepare_objective`.
    """

    tasks: dict[str, list[TuningTask]] = field(default_factory=dict[str, list[TuningTask]])
    references: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def prepare_objective(
    search: ScaleSearch, plan: Plan, inputs: Inputs, opened: Opened | None = None
) -> Choose:
    """Return the search over data; tasks are opened and checked now.

    `opened` keeps tasks and the experts' outputs: searches for several methods, which have base
    and experts in common, read them once.
    """
    opened = opened or Opened()
    tasks, key = tasks_of(search, plan, inputs, opened)
    idle = [name for name in inputs.experts if name not in {t.expert for t in tasks}]
    labelled = search.search == "validation"

    def choose(unscaled: Unscaled) -> Choice:
        progress = unscaled.limits.progress
        device = unscaled.limits.models
        memory = _Memory(unscaled.journal, search, tasks, device)

        def tell(done: int, total: int, scale: float) -> None:
            if progress is not None:
                progress(done, total, f"α = {scale:.3g}")

        @functools.cache
        def load() -> Callable[[float], Measured]:
            if key not in opened.references:
                opened.references[key] = _references(tasks, inputs, labelled, device)
            references = opened.references[key]
            if labelled:
                memory.add("experts", Measured(1.0, references))
            return _objective(tasks, references, _metric if labelled else _divergence, unscaled)

        def objective(scale: float) -> Measured:
            name = repr(scale)
            if name not in memory:  # models are loaded for the first such α only
                memory.add(name, load()(scale))
            return memory.get(name)

        curve = searched(search, objective, tell)
        if labelled and "experts" not in memory:  # the line was lost
            load()
        experts = memory.get("experts").parts if labelled else None
        record = search_record(search, curve, tasks, device, experts)
        numbers = {
            "scale": curve.scale,
            "search": search.search,
            "split": tasks[0].prepared.split,
            "points": len(curve.points),
            "best": curve.value,
            "edge": curve.at_edge,
            **({"flat": True} if curve.flat else {}),
            "shared": [[t.task.name, *pair] for t in tasks for pair in t.tested_elsewhere.items()],
            "ignored": idle,
        }
        note = Note("searched_scale", tuple(t.task.name for t in tasks), numbers)
        return Choice(curve.scale, note, record)

    return choose


def searched(
    search: ScaleSearch,
    objective: Callable[[float], Measured],
    tell: Callable[[int, int, float], None],
) -> ScaleCurve:
    """Run a search over data with the settings of a recipe."""
    return search_scale(
        objective,
        low=search.range[0],
        high=search.range[1],
        points=search.points,
        tolerance=search.tolerance,
        maximise=search.search == "validation",
        tell=tell,
    )


def search_record(
    search: ScaleSearch,
    curve: ScaleCurve,
    tasks: Sequence[TuningTask],
    device: Device,
    experts: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return what files say of a search over data; `experts` are their metrics, with labels."""
    record = {
        **curve.described(search.search),
        "range": list(search.range),
        "tolerance": search.tolerance,
        "tasks": {t.task.name: t.described() for t in tasks},
        **({"device": device.model} if device.model else {}),
    }
    if experts is not None:
        record["experts"] = plain_parts(experts)
    elif search.compare == "features":
        record["compare"] = "features"
    return record


def measured_at(search: ScaleSearch, scale: float, unscaled: Unscaled, opened: Opened) -> Measured:
    """Return the objective of a search over data at one α, of a merge among others of the same.

    `opened` keeps tasks and the experts' outputs from one merge to the next.
    """
    tasks, key = tasks_of(search, unscaled.plan, unscaled.inputs, opened)
    labelled = search.search == "validation"
    if key not in opened.references:
        device = unscaled.limits.models
        opened.references[key] = _references(tasks, unscaled.inputs, labelled, device)
    measure = _metric if labelled else _divergence
    return _objective(tasks, opened.references[key], measure, unscaled)(scale)


def tasks_of(
    search: ScaleSearch, plan: Plan, inputs: Inputs, opened: Opened
) -> tuple[list[TuningTask], str]:
    """Return the tasks of a search, and a key of them within `opened`."""
    key = json.dumps([search.search, search.compare, search.tasks, lent_heads(plan)])
    if key not in opened.tasks:
        opened.tasks[key] = open_tasks(search, plan, inputs)
    return opened.tasks[key], key


def search_identity(
    search: ScaleSearch, plan: Plan, inputs: Inputs, opened: Opened, device: Device = ON_CPU
) -> str:
    """Return a hash of all that decides the α of a search, besides the deltas.

    `device` is that of the models that a search runs.
    """
    described: list[Any] = [search.model_dump(mode="json", exclude={"tasks"})]
    if search.tasks is not None:
        described += [task.identity() for task in tasks_of(search, plan, inputs, opened)[0]]
        described += [device.model] if device.model else []
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _references(
    tasks: list[TuningTask], inputs: Inputs, labelled: bool, device: Device
) -> dict[str, Any]:
    """Run every expert once; return what the merged model is held against, task by task."""

    def of(task: TuningTask) -> Any:
        model = task.expert_model(inputs, device.name)
        if labelled:
            return score(task.outputs(model), task.prepared).value
        return task.comparable(model)

    with running_on(device.name):
        return {task.task.name: of(task) for task in tasks}


def _metric(task: TuningTask, expert: float, model: Any) -> tuple[float, float]:
    """Return the metric, and its share of the expert's, larger being better."""
    found = score(task.outputs(model), task.prepared)
    value = found.value
    if found.metric in LOWER_IS_BETTER:
        return value, expert / value if value > 0 else math.nan
    if math.isnan(value):  # a correlation with constant predictions
        value = 0.0
    return value, value / expert if expert > 0 else value


def _divergence(task: TuningTask, expert: Tensor, model: Any) -> tuple[float, float]:
    as_numbers = task.as_features or task.task.kind == "regression"
    compare = feature_distance if as_numbers else kl_divergence
    value = compare(expert, task.comparable(model))
    return value, value


def _objective(
    tasks: list[TuningTask], references: Mapping[str, Any], measure: Measure, unscaled: Unscaled
) -> Callable[[float], Measured]:
    """Return α -> mean over tasks, in models that are loaded now."""
    device = unscaled.limits.models.name
    with running_on(device):
        models = _load_bodies(tasks, unscaled, device)
        put = putting(unscaled, share_bodies(models, _body_shapes(tasks, unscaled)))

    def objective(scale: float) -> Measured:
        put(scale)
        found: dict[str, float] = {}
        values: list[float] = []
        for task, model in zip(tasks, models, strict=True):
            name = task.task.name
            try:
                with running_on(device):
                    found[name], value = measure(task, references[name], model)
            except NumericalError:  # the model overflows at this α: the worst value
                found[name], value = math.nan, math.nan
            values.append(value)
        return Measured(sum(values) / len(values), found)

    return objective


def _load_bodies(tasks: list[TuningTask], unscaled: Unscaled, device: str) -> list[nn.Module]:
    """Load the base once per head, onto a device."""
    bare: dict[bool, nn.Module] = {}  # a pooler may be missing where no task uses it
    models: list[nn.Module] = []
    for task in tasks:
        pooler = task.task.pooling == "pooler"
        if task.task.head is None:
            models.append(task.body_model(unscaled.inputs, device))
        else:
            bare[pooler] = bare.get(pooler) or task.body_model(unscaled.inputs, device)
            models.append(bare[pooler])
    dtype = unscaled.plan.output.dtype
    if dtype is not None and not is_of_vectors(unscaled.inputs):
        for model in {id(m): m for m in models}.values():
            round_tensors(model, dtype)
    return models


def _body_shapes(tasks: list[TuningTask], unscaled: Unscaled) -> list[dict[str, tuple[int, ...]]]:
    """Return what is common to all models; what the plan keeps per expert is not."""
    common = common_shapes(unscaled)
    return [
        {k: s for k, s in common.items() if not any(fits(k, p) for p in t.task.head_tensors)}
        for t in tasks
    ]


class _Memory:
    """What a search measured, in the journal beside the deltas, under the identity of its data."""

    def __init__(
        self, journal: Ledger, search: ScaleSearch, tasks: list[TuningTask], device: Device
    ) -> None:
        described: list[Any] = [search.search, search.compare, [t.identity() for t in tasks]]
        if device.model:
            described.append(device.model)
        self._identity = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        self._journal = journal

    def __contains__(self, name: str) -> bool:
        found = self._journal.finished.get((STAGE, self._key(name)))
        record = {} if found is None else found.record
        return isinstance(record.get("value"), (int, float)) and isinstance(
            record.get("parts"), dict
        )

    def get(self, name: str) -> Measured:
        found = self._journal.finished[STAGE, self._key(name)]
        return Measured(found.record["value"], found.record["parts"])

    def add(self, name: str, measured: Measured) -> None:
        finished = Finished("", {"value": measured.value, "parts": dict(measured.parts)})
        self._journal.add(STAGE, self._key(name), finished)

    def _key(self, name: str) -> str:
        return f"{self._identity}:{name}"
