"""One method of a comparison: merged once, α by every way, each different α measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eutectic.comparison.candidates import Candidate, Way
from eutectic.comparison.folder import RECIPES, WORK, Found, read_found, remove, write_found
from eutectic.comparison.table import Made, file_name
from eutectic.errors import MethodError, NumericalError, RequestError
from eutectic.evaluation.checkpoints import Checkpoint
from eutectic.evaluation.identities import digest_of, fingerprint
from eutectic.evaluation.measured_pairs import Journal
from eutectic.evaluation.metrics import Outcomes
from eutectic.evaluation.pairs import Pairs
from eutectic.evaluation.results import CheckpointRecord
from eutectic.execution.executors import Limits
from eutectic.execution.output_folder import unscaled_folder, unscaled_identity, write_model
from eutectic.execution.schedule import Unscaled
from eutectic.methods import get_method
from eutectic.planning.cost import check_memory
from eutectic.planning.inputs import InputPaths, Inputs, open_inputs
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import check_recipe
from eutectic.tuning.entry import choose_scale
from eutectic.tuning.objectives import Opened, search_identity

Tell = Callable[[float, float, str], None]
Within = Callable[[float, str], Tell]  # a part of the work, named -> what it tells of itself


@dataclass(frozen=True)
class Request:
    """A method with the ways to choose its α."""

    candidate: Candidate
    recipe: Mapping[str, Any]  # checked, as it would be written, without a scale
    ways: tuple[Way, ...]
    paths: InputPaths

    def name(self, way: Way) -> str:
        """Return the name of a row."""
        return f"{self.candidate.name}@{way.name}"


@dataclass(frozen=True)
class Measured:
    """A row that was measured, or failed."""

    made: Made
    outcomes: Mapping[tuple[str, str], Outcomes] = field(default_factory=dict[Any, Any])
    record: CheckpointRecord | None = None


def planned(
    candidates: Sequence[Candidate],
    ways: Sequence[Way],
    recipe: Mapping[str, Any],
    limits: Limits,
    opened: Opened,
    *,
    stated: bool,
) -> tuple[list[Request], dict[str, str]]:
    """Plan every method, and find out what its searches lack, before any work.

    Args:
        candidates: the methods.
        ways: to choose α; `stated`: by the user, so that what one lacks is an error.
        recipe: what they have in common.
        limits: of memory.
        opened: keeps tasks of searches.
        stated: see `ways`.

    Returns:
        What can be merged, and rows or methods that are left out -> why.

    Raises:
        RequestError: with everything that keeps what the user named from being merged.
    """
    requests: list[Request] = []
    left_out: dict[str, str] = {}
    faults: dict[str, list[str]] = {}
    for candidate in candidates:
        values = {key: value for key, value in recipe.items() if key != "scale"}
        values |= {"method": candidate.method, "parameters": dict(candidate.parameters)}
        if candidate.post is not None:
            values["post"] = candidate.post
        try:
            if "convolutions" in values and values.get("post") is None:
                own = get_method(candidate.method)
                if own.in_entries(own.parse(candidate.parameters)):
                    del values["convolutions"]  # it merges them alike, as matrices or not
            checked = check_recipe(values)
            with open_inputs(checked) as inputs:
                plan = make_plan(checked, inputs)
                check_memory(plan, inputs, limits.of_one_task)
                usable: list[Way] = []
                for way in ways:
                    name = f"{candidate.name}@{way.name}"
                    try:
                        _prepare(way, plan, inputs, opened)
                        usable.append(way)
                    except RequestError as error:
                        if stated:
                            faults.setdefault(str(error), []).append(name)
                        else:
                            left_out[name] = str(error)
                assert inputs.paths is not None
                written = checked.model_dump(mode="json", exclude_unset=True)
                requests.append(Request(candidate, written, tuple(usable), inputs.paths))
        except RequestError as error:
            if candidate.stated:
                faults.setdefault(str(error), []).append(candidate.name)
            else:
                left_out[candidate.name] = str(error)
    if faults:
        raise refusal(faults)
    if not requests:
        grouped: dict[str, list[str]] = {}
        for name, text in left_out.items():
            grouped.setdefault(text, []).append(name)
        raise refusal(grouped)
    return requests, left_out


def refusal(faults: Mapping[str, Sequence[str]]) -> RequestError:
    """Return an error of faults, each told once with the names that it concerns."""
    if len(faults) == 1:
        (text, names), *_ = faults.items()
        return RequestError(text if len(names) > 1 else f"{names[0]}: {text}")
    lines = [
        f"  - {', '.join(names)}: " + text.replace("\n", "\n    ") for text, names in faults.items()
    ]
    return RequestError("not everything can be compared:\n" + "\n".join(lines))


def _prepare(way: Way, plan: Plan, inputs: Inputs, opened: Opened) -> Any:
    if way.search is None:
        return None
    return choose_scale(replace(plan, search=way.search), inputs, opened)


def measure(
    request: Request,
    pairs: Pairs,
    journal: Journal,
    folder: Path,
    limits: Limits,
    opened: Opened,
    within: Within,
) -> list[Measured]:
    """Merge a method, choose its α by every way, and measure each; known rows are taken as known.

    A merge, a search or a model with NaN or Inf costs its rows their figures, and nothing else.
    """
    checked = check_recipe(request.recipe)
    with open_inputs(checked) as inputs, ExitStack() as stack:
        plan = make_plan(checked, inputs)
        deltas = unscaled_identity(plan, inputs, limits.device.model)
        work = folder / WORK / deltas[:16]
        merged: list[Unscaled | NumericalError] = []

        def unscaled() -> Unscaled:
            """Merge when the first row asks for it."""
            if not merged:
                told = replace(limits, progress=within(1, f"{request.candidate.name}: merging"))
                try:
                    merged.append(stack.enter_context(unscaled_folder(work, plan, inputs, told)))
                except NumericalError as error:
                    merged.append(error)
            if isinstance(merged[0], NumericalError):
                raise merged[0]
            return merged[0]

        place = _Place(request, plan, inputs, pairs, journal, folder, deltas)
        rows: list[Measured] = []
        for way in request.ways:
            name = request.name(way)
            try:
                rows.append(_row(place, way, unscaled, opened, within))
            except (NumericalError, MethodError) as error:
                made = Made(name, plan.method.name, request.candidate.parameters, way.name)
                rows.append(Measured(replace(made, error=str(error))))
    if merged:
        remove(work)
    return rows


@dataclass(frozen=True)
class _Place:
    """Where one method is merged and measured."""

    request: Request
    plan: Plan
    inputs: Inputs
    pairs: Pairs  # of base, experts and other models
    journal: Journal
    folder: Path
    deltas: str  # identity of the merged deltas
    models: dict[float, Found] = field(default_factory=dict[float, Found])  # by their α

    def keys(self, scale: float) -> dict[str, str]:
        """Return task -> identity of the outcomes of the model at α.

        What reads and scores the model's outputs is known by the pairs of base and expert.
        """
        checkpoints = {c.name: c for c in self.pairs.checkpoints.all if c.role != "model"}
        found: dict[str, str] = {}
        for task in self.pairs.tasks.values():
            about = [checkpoints["base"], checkpoints.get(task.expert_name)]
            known = [self.pairs.identity(c, task) for c in about if c is not None]
            found[task.name] = digest_of([self.deltas, repr(scale), *known])
        return found

    def outcomes(self, scale: float) -> dict[str, Outcomes] | None:
        """Return task -> outcomes of the model at α, if all are known."""
        found = {task: self.journal.found.get(key) for task, key in self.keys(scale).items()}
        known = {task: own for task, own in found.items() if own is not None}
        return known if len(known) == len(found) else None


def _row(
    place: _Place, way: Way, unscaled: Callable[[], Unscaled], opened: Opened, within: Within
) -> Measured:
    request, plan, name = place.request, place.plan, place.request.name(way)
    search = way.search
    chosen = [way.name, plan.scale if way.scale is None else way.scale]
    if search is not None:
        chosen = [search_identity(search, plan, place.inputs, opened, place.pairs.device)]
    identity = digest_of([place.deltas, *chosen])
    found = read_found(place.folder, name, identity)
    outcomes = None if found is None else place.outcomes(found.scale)
    if found is None or outcomes is None:
        scale, record = (plan.scale if way.scale is None else way.scale), None
        if search is not None:
            find = _prepare(way, plan, place.inputs, opened)
            ready = unscaled()
            progress = within(1, f"{name}: searching")
            choice = find(replace(ready, limits=replace(ready.limits, progress=progress)))
            scale, record = choice.scale, choice.record
        assert isinstance(scale, float)
        found, outcomes = _measured(place, name, scale, unscaled, within)
        found = found.model_copy(update={"identity": identity, "search": record})
        write_found(place.folder, name, found)
    place.models[found.scale] = found
    made = Made(
        name, plan.method.name, request.candidate.parameters, way.name, found.scale,
        norms=found.norms, warnings=tuple(found.warnings),
    )  # fmt: skip
    file = f"{RECIPES}/{file_name(name)}.yaml"
    record = CheckpointRecord(
        name=name, role="model", path=file, fingerprint=found.fingerprint, routing=None
    )
    return Measured(made, {(name, task): own for task, own in outcomes.items()}, record)


def _measured(
    place: _Place, name: str, scale: float, unscaled: Callable[[], Unscaled], within: Within
) -> tuple[Found, dict[str, Outcomes]]:
    """Return what is known of the model at α, and its outcomes; other ways may have led to it."""
    outcomes = place.outcomes(scale)
    if outcomes is not None and scale in place.models:
        return place.models[scale], outcomes
    with _model(place, name, scale, unscaled, within) as (folder, plan):
        of_model = place.pairs.of(
            Checkpoint(name, "model", folder), progress=within(1, f"{name}: measuring")
        )
        found = of_model.outcomes(place.journal, place.keys(scale))
        known = Found(
            identity="",
            scale=scale,
            fingerprint=fingerprint(folder, place.pairs.checkpoints.base),
            norms=dict(plan.norms),
            warnings=[note.text for note in plan.notes if note.level == "warning"],
            search=None,
        )
    return known, {task: own for (_, task), own in found.items()}


@contextmanager
def _model(
    place: _Place, name: str, scale: float, unscaled: Callable[[], Unscaled], within: Within
) -> Iterator[tuple[Path, Plan]]:
    """Write the model at α aside; it is removed afterwards."""
    folder = place.folder / WORK / "model"
    remove(folder)  # what a killed run has left
    ready = unscaled()
    ready = replace(ready, limits=replace(ready.limits, progress=within(0, f"{name}: writing")))
    fixed = check_recipe({**place.request.recipe, "scale": scale})
    plan = write_model(make_plan(fixed, place.inputs), ready, folder)
    try:
        yield folder, plan
    finally:
        remove(folder)
