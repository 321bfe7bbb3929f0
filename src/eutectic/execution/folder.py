"""The output folder: refused beforehand, written aside, and moved to its name when complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eutectic.checkpoint.layout import OutputFile, layout_like
from eutectic.checkpoint.writer import CheckpointWriter
from eutectic.errors import Note, OutputError, RequestError
from eutectic.execution.finish import PROVENANCE, document, stated_recipe, write_folder
from eutectic.execution.jobs import Limits, hashes, records_of
from eutectic.execution.stages import run_scaled, run_stages
from eutectic.execution.unscaled import Choose, unscaled_merge
from eutectic.planning.inputs import Inputs
from eutectic.planning.journal import JOURNAL, Finished, Journal, request_identity
from eutectic.planning.plan import Plan, with_scale
from eutectic.storage import storage_of

_CHOSEN = "chosen"  # stage of a search's note in the journal


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


def write_to_folder(
    plan: Plan,
    inputs: Inputs,
    output: Path,
    work: Path,
    limits: Limits,
    restart: bool,
    find: Choose | None,
) -> tuple[Plan, dict[str, Any], bool, dict[str, Any] | None]:
    """Write the model into the work folder and move it to its name when it is complete.

    `find` chooses α when the deltas are known. Returns the plan with α, records, whether a run was
    continued, and the search.
    """
    identity = request_identity(plan, inputs)
    search = None
    with Journal(work, identity, restart=restart) as journal:
        if journal.resumed and _complete(output, work):
            if find is not None:
                made = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
                search = made["search"]
                plan = with_scale(plan, made["scale"], _chosen(journal))
        elif find is None:

            def scratch(layout: OutputFile) -> CheckpointWriter:
                return CheckpointWriter(work, [layout], resume=(work / layout.name).exists())

            def write(writer: CheckpointWriter) -> None:
                run_stages(plan, inputs, writer, journal, limits, scratch)

            _write_model(plan, inputs, output, work, journal, write, identity, search)
        else:
            with unscaled_merge(work, plan, inputs, journal, limits) as unscaled:
                choice = find(unscaled)
                search, factors, deltas = choice.record, unscaled.factors, unscaled.deltas
                journal.add(_CHOSEN, "note", Finished("", vars(choice.note)))
                plan = chosen = with_scale(plan, choice.scale, choice.note)

                def write(writer: CheckpointWriter) -> None:
                    run_scaled(factors, chosen, inputs, deltas, writer, journal, limits)

                _write_model(plan, inputs, output, work, journal, write, identity, search)
        journal.remove_folder()
        return plan, records_of(journal), journal.resumed, search


def _write_model(
    plan: Plan,
    inputs: Inputs,
    output: Path,
    work: Path,
    journal: Journal,
    write: Callable[[CheckpointWriter], None],
    identity: str,
    search: Mapping[str, Any] | None,
) -> None:
    model = work / "model"
    files = _layout(plan, inputs)
    with CheckpointWriter(model, files, resume=model.exists()) as writer:
        write(writer)
        writer.sync()
    provenance = document(plan, inputs, hashes(journal), identity)
    if search is not None:
        provenance["search"] = search
    try:
        write_folder(plan, inputs, model, files, provenance, records_of(journal))
    except OSError as error:
        where = error.filename or model
        raise OutputError(f"{where}: cannot be written ({error.strerror}).") from error
    _move(model, output)


def _layout(plan: Plan, inputs: Inputs) -> list[OutputFile]:
    """Return the output's files: the base's, in the recipe's dtype, with the recipe inside."""
    if inputs.index is None:
        raise RequestError("a merge into files needs a base in files.")
    dtype = getattr(torch, plan.recipe.dtype) if plan.recipe.dtype else None
    recipe = json.dumps(stated_recipe(plan), sort_keys=True)
    return layout_like(
        inputs.index, dtype, {"eutectic": version("eutectic"), "recipe": recipe}, drop=plan.left_out
    )


def _chosen(journal: Journal) -> Note:
    """Return the note on the scale that an earlier run has chosen."""
    kept = journal.finished[_CHOSEN, "note"].record
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
