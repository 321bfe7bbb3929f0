"""Where models come from and what they cost: provenance, tensors, solvers, routers, data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from eutectic.conventions import block_of
from eutectic.evaluation.results import Results
from eutectic.execution.run import MergeReport
from eutectic.reporting.held_statistics import in_order as forms_in_order
from eutectic.reporting.held_statistics import kept_in_words
from eutectic.reporting.page.layer_maps import in_order
from eutectic.reporting.page.page_record import (
    Cost,
    Curve,
    CurvePoint,
    DataRow,
    Depth,
    GramRow,
    Merge,
    Parent,
    Residuals,
    Routing,
    TensorRow,
)
from eutectic.reporting.page.public_texts import without_private_paths
from eutectic.reporting.page.source_views import (
    CurveView,
    MergedTensorView,
    PlannedTensorView,
    PlanView,
    ProvenanceView,
    RoutedView,
)
from eutectic.statistics import StatisticsFile
from eutectic.statistics.statistics_file import STATISTICS
from eutectic.storage import storage_of
from eutectic.types import gram_names
from eutectic.words import counted, public_path

_MOST_LAYERS = 1_000
_WEIGHTS = (".safetensors", ".bin", ".pt")


def merge_of(name: str, made: ProvenanceView) -> Merge:
    """Return what `eutectic.json` says of a merge."""
    method = made.method or str(made.recipe.get("method", "")) or made.mostly_by
    calibration = made.calibration or {}
    counts = calibration.get("calibrated")
    return Merge(
        name=name,
        method=method,
        mostly_by=made.mostly_by or method,
        scale=made.scale,
        planned=False,
        recipe=recipe_text(made.recipe),
        versions={"eutectic": made.eutectic, **({"torch": made.torch} if made.torch else {})},
        parents=[
            Parent(
                role=role,
                path=public_path(own.name),
                licence=own.licence,
                fingerprint=own.fingerprint,
                data={k: str(v) for k, v in (own.statistics or {}).items()},
            )
            for role, own in made.parents.items()
        ],
        treatments=made.treatments,
        merged_by=made.merged_by,
        growth=_number(made.norms.get("ratio")),
        bound=_number(made.norms.get("bound")),
        shares=_shares(made.shares),
        fallback=_number(made.fallback.get("share")),
        calibrated={str(k): int(v) for k, v in counts.items() if isinstance(v, int)}
        if isinstance(counts, Mapping)
        else {},
        notes=[without_private_paths(note) for note in made.notes],
    )


def planned_merge(name: str, plan: PlanView) -> Merge:
    """Return what a plan says of the merge that it is of."""
    taken = {n: count for n, count in plan.merged_by.items() if n != "copy"}
    treatments: dict[str, int] = {}
    for tensor in plan.tensors:
        treatments[tensor.treatment] = treatments.get(tensor.treatment, 0) + 1
    return Merge(
        name=name,
        method=plan.method,
        mostly_by=max(taken, key=lambda n: taken[n], default=plan.method),
        scale=plan.scale,
        planned=True,
        treatments=treatments,
        merged_by=plan.merged_by,
        shares=_shares(plan.shares),
        notes=[without_private_paths(note) for note in plan.notes],
    )


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, with the last parts of absolute paths only."""

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): public(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [public(v) for v in value]
        return public_path(value) if isinstance(value, str) and _is_path(value) else value

    if not recipe:
        return ""
    return yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True, width=100)


def _is_path(text: str) -> bool:
    return "\n" not in text and (text.startswith(("/", "~")) or text[1:3] in (":\\", ":/"))


def _shares(record: Mapping[str, Any]) -> dict[str, float]:
    found = {part: _number(record.get(part)) for part in ("merged", "kept", "left")}
    return {part: value for part, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _followed(row: MergedTensorView | PlannedTensorView) -> str:
    """Return the method that merges a tensor, and what follows it."""
    return row.method if row.post is None else f"{row.method} + {row.post}"


def tensor_rows(name: str, made: ProvenanceView | PlanView) -> Iterator[TensorRow]:
    """Yield what became of every tensor, or would, in the model's order."""
    if isinstance(made, PlanView):
        planned = {tensor.name: tensor for tensor in made.tensors}
        for tensor in in_order(planned):
            own = planned[tensor]
            yield TensorRow(
                model=name,
                name=tensor,
                shape=own.shape,
                treatment=own.treatment,
                method=_followed(own),
                scale=None if own.method == "copy" else own.scale,
                reason=without_private_paths(own.why),
            )
        return
    for tensor in in_order(made.tensors):
        row = made.tensors[tensor]
        yield TensorRow(
            model=name,
            name=tensor,
            treatment=row.treatment,
            method=_followed(row),
            scale=None if row.method == "copy" else row.scale,
            reason=without_private_paths(row.reason),
            sha256=row.sha256,
        )


def residuals_of(name: str, made: ProvenanceView) -> Iterator[Residuals]:
    """Yield how every linear system of a merge was solved."""
    for tensor in in_order(made.records):
        parts = made.records[tensor]
        for part, own in parts.items() if isinstance(parts, Mapping) else ():
            held = own.get("residuals") if isinstance(own, Mapping) else None
            if not isinstance(held, list) or not held:
                continue
            yield Residuals(
                model=name,
                tensor=tensor if part == "matrix" else f"{tensor}{part}",
                status=str(own.get("status", "")).replace("_", " "),
                residuals=[_number(value) for value in held],
            )


def curve_of(name: str, own: CurveView) -> Curve:
    """Return a search for α, or over a parameter."""
    points = sorted(own.points, key=lambda point: point.at)
    tried = [point.at for point in points]
    return Curve(
        name=name,
        symbol=own.over or "α",
        search=own.search,
        objective=own.objective,
        maximise=own.maximise,
        chosen=own.chosen,
        at_edge=len(tried) > 1 and own.chosen in (tried[0], tried[-1]),
        points=[CurvePoint(scale=p.at, value=p.value, parts=p.parts) for p in points],
    )


def routing_of(name: str, own: RoutedView) -> Routing:
    """Return how a routed model decides."""
    quality = own.quality
    if quality is None:
        return Routing(name=name, experts=own.experts, router=own.router, layers=len(own.layers))
    blocks: dict[str, list[Mapping[str, float]]] = {}
    for layer in in_order(quality.layers)[:_MOST_LAYERS]:
        blocks.setdefault(block_of(layer), []).append(quality.layers[layer])
    return Routing(
        name=name,
        experts=own.experts,
        router=own.router,
        layers=len(own.layers),
        measured=quality.measured,
        chance=quality.chance,
        samples=quality.samples,
        decisions=quality.decisions,
        confusion=quality.confusion,
        depth=[Depth(block=block, shares=_means(rows)) for block, rows in blocks.items()],
    )


def _means(rows: list[Mapping[str, float]]) -> dict[str, float]:
    tasks = dict.fromkeys(task for row in rows for task in row)
    held = {task: [row[task] for row in rows if task in row] for task in tasks}
    return {task: sum(own) / len(own) for task, own in held.items()}


def data_of_results(results: Results) -> Iterator[DataRow]:
    """Yield the data that models were scored on."""
    for task in results.tasks:
        yield DataRow(
            name=task.name,
            use=f"scored ({results.split})",
            examples=task.n,
            fingerprint=task.data_hash,
        )


def data_of_statistics(name: str, held: StatisticsFile) -> DataRow:
    """Return the data that statistics were collected on."""
    data = held.provenance.get("data", {})
    stored = {key.rpartition("/")[2] for key in held.tensors}
    kinds = [kind for kind in STATISTICS if stored & set(gram_names(kind))]
    told = f": {', '.join(kinds)} of {counted(len(held), 'parameter')}" if kinds else ""
    return DataRow(
        name=name,
        use=f"statistics{told}",
        examples=data.get("examples"),
        fingerprint=str(data.get("fingerprint", "")),
    )


def grams_of_statistics(name: str, held: StatisticsFile) -> Iterator[GramRow]:
    """Yield how every input Gram is kept, and what its directions leave."""
    for form in forms_in_order(held):
        yield GramRow(
            of=name,
            layers=list(form.layers),
            width=form.width,
            tokens=form.tokens,
            kept=kept_in_words(form),
            beside=form.beside,
            nbytes=form.nbytes,
        )


def data_of_merge(made: ProvenanceView) -> Iterator[DataRow]:
    """Yield the data behind the statistics and the calibration of a merge."""
    for role, parent in made.parents.items():
        if parent.statistics:
            count = parent.statistics.get("examples")
            yield DataRow(
                name=role,
                use="statistics",
                examples=count if isinstance(count, int) else None,
                fingerprint=str(parent.statistics.get("fingerprint", "")),
            )
    data = (made.calibration or {}).get("data")
    for task, own in data.items() if isinstance(data, Mapping) else ():
        count = own.get("examples") if isinstance(own, Mapping) else None
        yield DataRow(
            name=str(task),
            use="calibration",
            examples=count if isinstance(count, int) else None,
            fingerprint="",
        )


def plan_costs(name: str, plan: PlanView) -> Iterator[Cost]:
    """Yield the estimates of a plan."""
    known: tuple[tuple[str, str, Literal["bytes", "s"]], ...] = (
        ("read_bytes", "read from disk (estimate)", "bytes"),
        ("write_bytes", "written to disk (estimate)", "bytes"),
        ("peak_bytes", "peak memory (estimate)", "bytes"),
        ("seconds", f"time on {plan.threads} threads (estimate)", "s"),
    )
    for key, what, unit in known:
        if key in plan.cost:
            yield Cost(name=name, what=what, value=plan.cost[key], unit=unit)


def run_costs(name: str, run: MergeReport) -> Iterator[Cost]:
    """Yield what a merge took, which its folder does not say."""
    how = " (continued)" if run.resumed else ""
    yield Cost(name=name, what=f"time of the merge{how}", value=run.seconds, unit="s")
    yield Cost(name=name, what="peak memory", value=float(run.peak_bytes), unit="bytes")


def folder_costs(name: str, folder: Path, what: str) -> Iterator[Cost]:
    """Yield how large a folder of a model, or a file, is on disk."""
    paths = folder.rglob("*") if folder.is_dir() else [folder]
    storage = storage_of(folder)  # in a store the files here only stand for others
    known = {path: storage.identity(path) for path in paths if path.is_file()}
    sizes = {path: held[0] for path, held in known.items() if held is not None}
    if any(path.suffix in _WEIGHTS for path in sizes):
        yield Cost(name=name, what=what, value=float(sum(sizes.values())), unit="bytes")
