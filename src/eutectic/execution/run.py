"""A merge from files to files, and its report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eutectic.errors import Note, RequestError
from eutectic.execution.folder import OutputPlace, check_output, write_to_folder
from eutectic.execution.limits import Progress, limits_of
from eutectic.execution.recipe_options import recipe_from
from eutectic.execution.scale_choice import Chooser, refuse_search
from eutectic.planning.cost import check_memory, treatments
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.storage.machine import peak_bytes


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the folder written.
        method: the method's name.
        scale: α.
        tensors: number of tensors per treatment.
        merged_by: number of tensors per method that merged them ("copy" for copies).
        heads: expert -> names of the tensors kept for it alone.
        notes: what a user should know: fall-backs, alignments, tensors that nobody changed.
        records: tensor -> what the method reported of it (residual curves, ridges, ranks).
        resumed: whether an unfinished run was continued.
        seconds: wall-clock time.
        peak_bytes: the largest resident memory of this process so far.
        search: how α was chosen, where the recipe asks for a search.
        note_records: the notes as records, for programs.
    """

    output: Path
    method: str
    scale: float
    tensors: Mapping[str, int]
    merged_by: Mapping[str, int]
    heads: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    records: Mapping[str, Any] = field(repr=False)
    resumed: bool
    seconds: float
    peak_bytes: int
    search: Mapping[str, Any] | None = field(default=None, repr=False)
    note_records: tuple[Note, ...] = field(default=(), repr=False)


def merge(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    threads: int | None = None,
    memory: str | int | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    choose: Chooser | None = None,
    **options: Any,
) -> MergeReport:
    """Merge checkpoints from files to files; see `eutectic.merge`, which chooses α where asked to.

    Without `choose`, a recipe that asks for a search is refused.
    """  # noqa: D417 - described there
    started = time.perf_counter()
    output = Path(output)
    checked, source = recipe_from(recipe, options)
    limits = limits_of(threads, memory, progress)
    if output.name in ("", ".."):
        raise RequestError(f"'{output}' has no name of its own. Name a new folder.")
    work = output.with_name(output.name + ".partial")
    check_output(output, work)
    with open_inputs(checked, source) as inputs:
        plan = make_plan(checked, inputs, source)
        check_memory(plan, inputs, limits.memory)
        find = None
        if plan.search is not None and choose is not None:
            find = choose(plan, inputs)
        else:
            refuse_search(plan)
        written = write_to_folder(plan, OutputPlace(output, work), inputs, limits, restart, find)
    plan = written.plan
    return MergeReport(
        output=output,
        method=plan.method.name,
        scale=plan.scale,
        tensors=treatments(plan),
        merged_by=dict(sorted(Counter(t.method for t in plan.tensors).items())),
        heads={n: tuple(e.name for e in own) for n, own in plan.heads.items()},
        notes=tuple(map(str, plan.notes)),
        note_records=plan.notes,
        records=written.records,
        resumed=written.resumed,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        search=written.search,
    )
