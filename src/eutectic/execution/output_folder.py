"""The output folder: refused beforehand, written aside, and moved to its name when complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from eutectic.checkpoint.output_format import TensorSink
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile
from eutectic.errors import Note, OutputError, RequestError
from eutectic.execution.executors import Limits
from eutectic.execution.journal import JOURNAL, Journal, hashes, records_of, request_identity
from eutectic.execution.model_folder import PROVENANCE, document, write_folder
from eutectic.execution.output_layout import output_layout
from eutectic.execution.schedule import CHOSEN, Choose, Desk, Unscaled, merged_deltas, run_schedule
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan, with_scale
from eutectic.storage import storage_of


def check_output(output: Path, work: Path) -> None:
    """Refuse an output that exists, before any work.

    Raises:
        RequestError: it is a file, or a folder with something in it.
    """
    storage = storage_of(output)
    obstacle = storage.obstacle(output)
    if obstacle is not None:
        raise RequestError(obstacle)
    if storage.list(output) and not ((work / JOURNAL).exists() and _complete(output, work)):
        raise RequestError(f"{output} is not empty.\nChoose another output, or remove it first.")


@dataclass(frozen=True)
class OutputPlace:
    """Where a model shall stand, and where it is written until it is complete."""

    output: Path
    work: Path

    @property
    def model(self) -> Path:
        """The unfinished model."""
        return self.work / "model"


@dataclass(frozen=True)
class Written:
    """A finished model.

    Attributes:
        plan: the plan with α.
        records: tensor -> what its method reported.
        resumed: an unfinished run was continued.
        search: how α was chosen, where it was searched.
    """

    plan: Plan
    records: dict[str, Any]
    resumed: bool
    search: dict[str, Any] | None


def write_to_folder(
    plan: Plan,
    place: OutputPlace,
    inputs: Inputs,
    limits: Limits,
    restart: bool,
    choose: Choose | None,
) -> Written:
    """Write the model into the work folder and move it to its name when it is complete.

    `choose` finds α when the deltas are known.
    """
    identity = request_identity(plan, inputs)
    with Journal(place.work, identity, restart=restart) as journal:
        if journal.resumed and _complete(place.output, place.work):
            plan, search = _chosen_before(plan, place.output, journal, choose)
        else:
            plan, choice = run_schedule(plan, _desk(place, inputs, journal, limits), choose)
            search = None if choice is None else choice.record
            _finish(plan, place, inputs, journal, identity, search)
        journal.remove_folder()
        return Written(plan, records_of(journal), journal.resumed, search)


def _chosen_before(
    plan: Plan, output: Path, journal: Journal, choose: Choose | None
) -> tuple[Plan, dict[str, Any] | None]:
    """Return the plan with the α of a model that was finished before its run could end."""
    if choose is None:
        return plan, None
    made = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    return with_scale(plan, made["scale"], _chosen(journal)), made["search"]


def _desk(place: OutputPlace, inputs: Inputs, journal: Journal, limits: Limits) -> Desk:
    @contextmanager
    def open_output(plan: Plan) -> Iterator[TensorSink]:
        layout = output_layout(plan, inputs)
        with layout.open(place.model, resume=place.model.exists()) as files:
            yield files
            files.sync()

    return Desk(inputs, journal, limits, partial(open_scratch, place.work), open_output)


def open_scratch(folder: Path, layout: OutputFile) -> CheckpointWriter:
    """Open a scratch file in a run's folder; what is in it already is kept."""
    return CheckpointWriter(folder, [layout], resume=(folder / layout.name).exists())


def _finish(
    plan: Plan,
    place: OutputPlace,
    inputs: Inputs,
    journal: Journal,
    identity: str,
    search: Mapping[str, Any] | None,
) -> None:
    model, layout = place.model, output_layout(plan, inputs)
    provenance = document(plan, inputs, hashes(journal), identity)
    if search is not None:
        provenance["search"] = search
    try:
        write_folder(plan, inputs, model, layout, provenance, records_of(journal))
    except OSError as error:
        where = error.filename or model
        raise OutputError(f"{where}: cannot be written ({error.strerror}).") from error
    _move(model, place.output)


def _chosen(journal: Journal) -> Note:
    """Return the note on the scale that an earlier run has chosen."""
    kept = journal.finished[CHOSEN, "note"].record
    return Note(kept["kind"], tuple(kept["subject"]), kept["numbers"], kept["level"])


def _complete(output: Path, work: Path) -> bool:
    """Tell whether a run was killed between moving its model and removing its work folder."""
    return (output / PROVENANCE).exists() and not (work / "model").exists()


def _move(model: Path, output: Path) -> None:
    try:
        storage_of(output).commit(model, output)
    except OSError as error:
        raise OutputError(
            f"{error.filename or model}: the merged model cannot be moved to {output} "
            f"({error.strerror or error})."
        ) from error


@contextmanager
def unscaled_folder(
    folder: Path, plan: Plan, inputs: Inputs, limits: Limits, restart: bool = False
) -> Iterator[Unscaled]:
    """Merge into a scratch folder of its own, before α, for any number of searches.

    The folder stays. The same recipe finds its deltas there again, whatever it says of the scale.

    Raises:
        ResumeError: the folder is not of this recipe and these inputs.
    """
    identity = request_identity(_at_one(plan), inputs)
    with Journal(folder, identity, restart=restart) as journal:
        desk = _desk(OutputPlace(folder, folder), inputs, journal, limits)
        with merged_deltas(plan, desk, plan.merged) as unscaled:
            yield unscaled


def _at_one(plan: Plan) -> Plan:
    """Return the plan with α = 1 wherever it is the recipe's."""
    tensors = tuple(replace(t, scale=1.0) if t.tunable else t for t in plan.tensors)
    request = replace(plan.request, complete={**plan.request.complete, "scale": None})
    return replace(plan, scale=1.0, tensors=tensors, request=request)
