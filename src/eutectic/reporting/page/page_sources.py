"""What a report is made of: files and folders, told apart by what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from eutectic.errors import EutecticError, RequestError
from eutectic.evaluation.results import Results
from eutectic.execution.model_card import PROVENANCE
from eutectic.execution.planned import PlanReport
from eutectic.execution.run import MergeReport
from eutectic.reporting.page.source_views import (
    ClosedFormView,
    ComparisonView,
    CurveView,
    PlanView,
    ProvenanceView,
    RoutedView,
)
from eutectic.reporting.schema import Inspection
from eutectic.statistics import StatisticsFile, load_statistics
from eutectic.storage import meant, view
from eutectic.storage.small_files import INDEX_BYTES, read_json
from eutectic.words import public_path

_Model = TypeVar("_Model", bound=BaseModel)
_TABLE, _RESULTS, _CANDIDATES, _ROUTED = (
    "comparison.json", "results.json", "candidates", "routed.json",
)  # fmt: skip
_RECIPES = (".yaml", ".yml")
_MOST_FOLDERS = 1_000  # within one folder of several merges
KNOWN = (
    "a merged or routed folder, a comparison's folder, a recipe or plan (JSON of `eutectic plan "
    "--json`), results.json, an inspection, a tuning record (JSON of `eutectic tune --json`), or a "
    "statistics file"
)


@dataclass(frozen=True)
class Document:
    """One source, read and checked."""

    name: str
    kind: str  # how the page calls it
    path: str  # as a page may show it
    content: Any  # a view of `source_views`, Results, Inspection or StatisticsFile
    folder: Path | None = None  # where it lies, if it lies in files
    run: MergeReport | None = None  # what a merge reported of itself, times among it


def documents(sources: Sequence[Any]) -> list[Document]:
    """Return what the sources hold; names are made different where two are alike.

    A source is a path, a text `NAME=PATH`, or an object: Results, Inspection, a report of a merge
    or a plan, loaded statistics, or a mapping of the form of one of the files.

    Raises:
        RequestError: nothing is given, or a source is nothing that a report can be made of.
    """
    found: list[Document] = []
    for source in sources:
        found += _of_object(source) if not isinstance(source, (str, Path)) else _of_path(source)
    if not found:
        raise RequestError(f"nothing to report on.\nName {KNOWN}.")
    return _told_apart(found)


def _told_apart(found: Sequence[Document]) -> list[Document]:
    """Give a number to the second of two sources of one kind and name."""
    taken: dict[tuple[str, str], int] = {}
    apart: list[Document] = []
    for document in found:
        key = (document.kind, document.name)
        taken[key] = taken.get(key, 0) + 1
        name = document.name if taken[key] == 1 else f"{document.name} ({taken[key]})"
        apart.append(replace(document, name=name))
    return apart


def _of_path(source: str | Path) -> Iterator[Document]:
    name, path = _named(source)
    try:
        if path.is_dir():
            yield from _of_folder(name, path)
        elif path.is_file():
            yield from _of_file(name, path)
        else:
            raise RequestError(f"{path}: no such file or folder.{meant(path)}\nName {KNOWN}.")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _named(source: str | Path) -> tuple[str, Path]:
    """Return name and path of `NAME=PATH`, or of a path whose name is its own."""
    text, path = str(source), view(source)
    name, separator, rest = text.partition("=")
    if separator and name and rest and "/" not in name and not path.exists():
        return name, view(rest)
    own = path.absolute()
    return (own.stem if own.is_file() else own.name) or "report", path


def _of_folder(name: str, folder: Path, *, inside: bool = False) -> Iterator[Document]:
    before = 0
    if (folder / _TABLE).is_file():
        yield from _comparison(name, folder)
        return
    if (folder / PROVENANCE).is_file():
        before += 1
        yield _merged(name, folder)
    if (folder / _ROUTED).is_file():
        before += 1
        view = _checked(RoutedView, folder / _ROUTED, "a routed model")
        yield Document(name, "routed model", public_path(folder), view, folder)
    if before or inside:
        return
    for path in sorted(folder.iterdir())[:_MOST_FOLDERS]:
        if path.is_dir():
            for document in _of_folder(path.name, path, inside=True):
                before += 1
                yield document
        elif path.suffix == ".json" and (kind := _kind_of(_object(path))) is not None:
            before += 1
            yield from kind(path.stem, path)
    if not before:
        raise RequestError(f"{folder}: holds nothing to report on.\nName {KNOWN}.")


def _of_file(name: str, path: Path) -> Iterator[Document]:
    if path.name in (PROVENANCE, _ROUTED, _TABLE):
        own = path.parent.absolute().name if name == path.stem else name
        yield from _of_folder(own, path.parent)
    elif path.suffix == ".safetensors":
        yield _statistics(name, path)
    elif path.suffix in _RECIPES:
        yield _planned(name, path)
    else:
        kind = _kind_of(_object(path))
        if kind is None:
            raise RequestError(f"{path}: is nothing that a report can be made of.\nName {KNOWN}.")
        yield from kind(name, path)


def _object(path: Path) -> Mapping[str, Any]:
    return read_json(path, RequestError, limit=INDEX_BYTES)


def _kind_of(held: Mapping[str, Any]) -> Any:
    """Return what reads a JSON file with such keys, None for any other."""
    keys = held.keys()
    if {"results", "tasks", "means"} <= keys:
        return _results
    if {"layers", "summary", "experts"} <= keys:
        return _inspection
    if {"tensors", "cost", "merged_by"} <= keys or ("stages" in keys and len(keys) == 1):
        return _plans
    if {"points", "objective", "scale"} <= keys or {"search", "scale", "method"} <= keys:
        return _tuning
    return None


def _results(name: str, path: Path) -> Iterator[Document]:
    yield Document(name, "results", public_path(path), _checked(Results, path, "results"), path)


def _inspection(name: str, path: Path) -> Iterator[Document]:
    found = _checked(Inspection, path, "an inspection")
    yield Document(name, "inspection", public_path(path), found, path)


def _plans(name: str, path: Path) -> Iterator[Document]:
    held = _object(path)
    stages = held.get("stages")
    if not isinstance(stages, list):
        view = _checked(PlanView, path, "a plan", held)
        yield Document(name, "plan", public_path(path), view, path)
        return
    # Stages that read other stages are planned when those have been merged.
    for stage in stages:
        if isinstance(stage, dict) and "tensors" in stage:
            called = stage.get("stage") or name
            view = _checked(PlanView, path, "a plan of stages", stage)
            yield Document(str(called), "plan", public_path(path), view, path)


def _tuning(name: str, path: Path) -> Iterator[Document]:
    held = _object(path)
    tried = isinstance(held.get("points"), list) and held["points"]
    view = _checked(CurveView if tried else ClosedFormView, path, "a tuning record", held)
    yield Document(name, "search for α", public_path(path), view, path)


def _merged(name: str, folder: Path) -> Document:
    view = _checked(ProvenanceView, folder / PROVENANCE, "a merge's provenance")
    return Document(name, "merged model", public_path(folder), view, folder)


def _statistics(name: str, path: Path) -> Document:
    try:
        found = load_statistics(path)
    except EutecticError as error:
        raise RequestError(str(error)) from None
    name = name.removesuffix(".stats")
    return Document(name, "statistics", public_path(path), found, path)


def _planned(name: str, path: Path) -> Document:
    """Plan a recipe now, from headers."""
    from eutectic.execution.planned import plan

    return Document(name, "plan", public_path(path), _plan_view(plan(path)), path)


def _comparison(name: str, folder: Path) -> Iterator[Document]:
    view = _checked(ComparisonView, folder / _TABLE, "a comparison")
    yield Document(name, "comparison", public_path(folder), view, folder)
    if (folder / _RESULTS).is_file():
        yield from _results(name, folder / _RESULTS)
    for path in sorted((folder / _CANDIDATES).glob("*.json"))[:_MOST_FOLDERS]:
        held = _object(path)
        search = held.get("search")
        if isinstance(search, dict) and search.get("points"):
            curve = _checked(CurveView, path, "a search for α", search)
            yield Document(path.stem, "search for α", public_path(path), curve, path)


def _checked(
    kind: type[_Model], path: Path, what: str, held: Mapping[str, Any] | None = None
) -> _Model:
    return _validated(kind, _object(path) if held is None else held, str(path), what)


def _validated(kind: type[_Model], held: Mapping[str, Any], where: str, what: str) -> _Model:
    try:
        return kind.model_validate(held)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"]) or "the file"
        raise RequestError(f"{where}: looks like {what}, but {place}: {first['msg']}.") from None


def _of_object(source: Any) -> Iterator[Document]:
    """Return the documents of an object that a verb of this package returned."""
    if isinstance(source, Results):
        yield Document("results", "results", "", source)
    elif isinstance(source, Inspection):
        yield Document("inspection", "inspection", "", source)
    elif isinstance(source, StatisticsFile):
        path = "" if source.path is None else public_path(source.path)
        yield Document(Path(path or "statistics").stem, "statistics", path, source)
    elif isinstance(source, PlanReport):
        yield Document("plan", "plan", "", _plan_view(source))
    elif isinstance(source, MergeReport):
        for document in _of_path(source.output):
            yield replace(document, run=source)
    elif isinstance(source, Mapping):
        yield from _of_mapping(dict(source))
    elif isinstance(search := getattr(source, "search", None), Mapping):  # of a search for α
        yield from _of_mapping({"method": getattr(source, "method", ""), **search})
    elif isinstance(output := getattr(source, "output", None), (str, Path)):  # a comparison
        yield from _of_path(output)
    else:
        raise RequestError(
            f"no report can be made of {type(source).__name__}.\n"
            f"Pass {KNOWN}, or what evaluate, inspect, plan, merge, tune or compare returned."
        )


def _of_mapping(held: dict[str, Any]) -> Iterator[Document]:
    where = "the mapping"
    kind = _kind_of(held)
    if kind is _results:
        yield Document("results", "results", "", _validated(Results, held, where, "results"))
    elif kind is _inspection:
        found = _validated(Inspection, held, where, "an inspection")
        yield Document("inspection", "inspection", "", found)
    elif kind is _plans and "stages" not in held:
        yield Document("plan", "plan", "", _validated(PlanView, held, where, "a plan"))
    elif kind is _tuning:
        shape = CurveView if held.get("points") else ClosedFormView
        view = _validated(shape, held, where, "a tuning record")
        yield Document(str(held.get("method") or "α"), "search for α", "", view)
    else:
        raise RequestError(f"the mapping is nothing that a report can be made of.\nPass {KNOWN}.")


def _plan_view(report: PlanReport) -> PlanView:
    held = {name: getattr(report, name) for name in PlanView.model_fields}
    return PlanView.model_validate({**held, "tensors": [dict(row) for row in report.tensors]})
