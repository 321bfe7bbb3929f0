"""The public entries: a merge from files to files, and one in memory."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.layout import OutputFile, layout_like
from eutectic.checkpoint.memory import MemoryWriter
from eutectic.checkpoint.writer import CheckpointWriter, sync_folder, sync_tree
from eutectic.errors import OutputError, RequestError
from eutectic.execution.finish import PROVENANCE, document, stated_recipe, write_folder
from eutectic.execution.stages import (
    Limits,
    Progress,
    hashes,
    records_of,
    refuse_search,
    run_scaled,
    run_stages,
)
from eutectic.execution.unscaled import Choose, Chooser, unscaled_merge
from eutectic.planning.cost import check_memory, default_memory, default_threads, treatments
from eutectic.planning.inputs import Inputs, Statistics, in_memory_inputs, open_inputs
from eutectic.planning.journal import JOURNAL, Finished, Journal, request_identity
from eutectic.planning.plan import Plan, make_plan, with_scale
from eutectic.recipes.load import Source, check_recipe, load_recipe
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.recipes.units import parse_bytes


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
    """Merge checkpoints from files to files, streamed tensor by tensor.

    Args:
        recipe: a YAML file, or a mapping of the same form. Without it, `options` are the recipe.
        output: folder to write; it must not exist, or be empty. Work goes on in
            `<output>.partial`, which is renamed when complete; the same call resumes it.
        threads: jobs side by side (default: the cores of this process).
        memory: limit, such as "4GB" (default: 60 % of what is available).
        restart: discard an unfinished run instead of resuming it.
        progress: called with (seconds done, seconds in all, tensor), both estimates.
        choose: chooses α where the recipe asks for a search (default, in `eutectic.merge`:
            `eutectic.tuning.choose_scale`).
        **options: keys of a recipe (`base`, `experts`, `method`, `scale`, `dtype`, …), which win
            over those of `recipe`; other keys are the method's parameters.

    Returns:
        A report. The same facts, without times, are in the output's `eutectic.json`.

    Raises:
        RequestError: the request is wrong; nothing was started.
        EutecticError: the work failed; what is finished is kept for the next call.

    Example:
        >>> eutectic.merge(base="base", experts={"a": "a", "b": "b"}, method="iso_c",
        ...                scale=1.3, output="merged")  # doctest: +SKIP
    """
    started = time.perf_counter()
    output = Path(output)
    checked, source = recipe_from(recipe, options)
    threads, memory = limits_of(threads, memory)
    if output.name in ("", ".."):
        raise RequestError(f"'{output}' has no name of its own. Name a new folder.")
    work = output.with_name(output.name + ".partial")
    _check_output(output, work)
    with open_inputs(checked, source) as inputs:
        plan = make_plan(checked, inputs, source)
        check_memory(plan, inputs, memory)
        limits = Limits(threads, memory, progress)
        find = None
        if isinstance(checked.scale, ScaleSearch) and choose is not None:
            find = choose(plan, inputs)
        else:
            refuse_search(plan)
        plan, records, resumed, search = _to_folder(
            plan, inputs, output, work, limits, restart, find
        )
    return MergeReport(
        output=output,
        method=plan.method.name,
        scale=plan.scale,
        tensors=treatments(plan),
        merged_by=merged_by(plan),
        heads={n: tuple(e.name for e in own) for n, own in plan.heads.items()},
        notes=plan.notes,
        records=records,
        resumed=resumed,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        search=search,
    )


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    method: str,
    scale: float | None = None,
    weights: Mapping[str, float] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    threads: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory by the same plan and arithmetic as files.

    Args:
        base: name -> tensor of the base model.
        experts: name -> state dict.
        method: a name from `eutectic.methods()`.
        scale: α (default: the method's).
        weights: name -> w_t (default 1).
        statistics: name -> statistics, for methods that use data.
        threads: jobs side by side.
        **options: other keys of a recipe (`tensors`, `dtype`, `missing`, …) or the method's
            parameters.

    Returns:
        The merged state dict: the base's keys, order, shapes and dtypes, in new memory. Heads are
        the base's.

    Raises:
        RequestError: the request is wrong.
        NumericalError: NaN or Inf in an expert.
    """
    weights = dict(weights or {})
    unknown = [name for name in {**weights, **(statistics or {})} if name not in experts]
    if unknown:
        raise RequestError(f"weights or statistics name experts that are not given: {unknown}.")
    specs = {n: {"path": "memory", "weight": weights.get(n, 1.0)} for n in experts}
    values = {"base": "memory", "experts": specs, "method": method, "heads": "base", **options}
    if scale is not None:
        values["scale"] = scale
    recipe = check_recipe(_sorted_options(values))
    inputs = in_memory_inputs(base, experts, statistics or {})
    plan = make_plan(recipe, inputs)
    entries = [(t.name, t.dtype, t.entry.shape) for t in plan.tensors]
    sink = MemoryWriter(entries)
    count, memory = limits_of(threads, None)
    run_stages(
        plan,
        inputs,
        sink,
        _Recollection(),
        Limits(count, memory),
        lambda layout: nullcontext(MemoryWriter(layout.entries)),
    )
    return sink.tensors


class _Recollection:
    """The ledger of a merge in memory: it ends with the process."""

    durable = False

    def __init__(self) -> None:
        self.finished: dict[tuple[str, str], Finished] = {}

    def add(self, stage: str, tensor: str, finished: Finished) -> None:
        self.finished[stage, tensor] = finished


def _to_folder(
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
                plan = with_scale(plan, made["scale"], made["notes"][-1])
        elif find is None:

            def scratch(layout: OutputFile) -> CheckpointWriter:
                return CheckpointWriter(work, [layout], resume=(work / layout.name).exists())

            def write(writer: CheckpointWriter) -> None:
                run_stages(plan, inputs, writer, journal, limits, scratch)

            _write_model(plan, inputs, output, work, journal, write, search)
        else:
            with unscaled_merge(work, plan, inputs, journal, limits) as unscaled:
                choice = find(unscaled)
                search, factors, deltas = choice.record, unscaled.factors, unscaled.deltas
                plan = chosen = with_scale(plan, choice.scale, choice.note)

                def write(writer: CheckpointWriter) -> None:
                    run_scaled(factors, chosen, inputs, deltas, writer, journal, limits)

                _write_model(plan, inputs, output, work, journal, write, search)
        shutil.rmtree(work)  # while the lock is held
        return plan, records_of(journal), journal.resumed, search


def _write_model(
    plan: Plan,
    inputs: Inputs,
    output: Path,
    work: Path,
    journal: Journal,
    write: Callable[[CheckpointWriter], None],
    search: Mapping[str, Any] | None,
) -> None:
    model = work / "model"
    files = layout_for(plan, inputs)
    with CheckpointWriter(model, files, resume=model.exists()) as writer:
        write(writer)
        writer.sync()
    provenance = document(plan, inputs, hashes(journal))
    if search is not None:
        provenance["search"] = search
    try:
        write_folder(plan, inputs, model, files, provenance, records_of(journal))
        sync_tree(model)
    except OSError as error:
        where = error.filename or model
        raise OutputError(f"{where}: cannot be written ({error.strerror}).") from error
    _move(model, output)


def layout_for(plan: Plan, inputs: Inputs) -> list[OutputFile]:
    """Return the output's files: the base's, in the recipe's dtype, with the recipe inside."""
    if inputs.index is None:
        raise RequestError("a merge into files needs a base in files.")
    dtype = getattr(torch, plan.recipe.dtype) if plan.recipe.dtype else None
    recipe = json.dumps(stated_recipe(plan), sort_keys=True)
    return layout_like(
        inputs.index, dtype, {"eutectic": version("eutectic"), "recipe": recipe}, drop=plan.left_out
    )


def limits_of(threads: int | None, memory: str | int | None) -> tuple[int, int]:
    """Return the number of threads and bytes of memory to use.

    Raises:
        RequestError: either is not positive, or the memory is not a size.
    """
    count = default_threads() if threads is None else threads
    size = default_memory() if memory is None else parse_bytes(memory)
    if count < 1 or size < 1:
        raise RequestError(f"threads and memory must be positive, got {threads} and {memory}.")
    return count, size


def merged_by(plan: Plan) -> dict[str, int]:
    """Return how many tensors each method merges."""
    return dict(sorted(Counter(t.method for t in plan.tensors).items()))


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, it does not start at the parent process's peak
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def recipe_from(
    recipe: str | Path | Mapping[str, Any] | None, options: Mapping[str, Any]
) -> tuple[Recipe, Source]:
    """Return the checked recipe of a file, a mapping, or options, which win over both.

    Raises:
        RecipeError: with every fault.
    """
    if isinstance(recipe, (str, Path)):
        checked, source = load_recipe(recipe)
        if not options:
            return checked, source
        # Paths of the file are resolved by now; lines no longer describe the whole.
        stated = checked.model_dump(mode="json", exclude_unset=True)
        return check_recipe({**stated, **_sorted_options(options, stated)}), source
    stated = dict(recipe or {})
    return check_recipe({**stated, **_sorted_options(options, stated)}), Source()


def _sorted_options(
    options: Mapping[str, Any], stated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Move keys that are no recipe's under `parameters`, where the method checks them."""
    known = {k: v for k, v in options.items() if k in Recipe.model_fields}
    other = {k: v for k, v in options.items() if k not in Recipe.model_fields}
    before = (stated or {}).get("parameters", {})
    if other or "parameters" in known:
        known["parameters"] = {**before, **known.get("parameters", {}), **other}
    return known


def _check_output(output: Path, work: Path) -> None:
    """Refuse an output that exists, before any work.

    Raises:
        RequestError: it is a file, or a folder with something in it.
    """
    # os.path answers "no" where a folder above may not be searched; the last check tells.
    if os.path.islink(output) or (os.path.exists(output) and not output.is_dir()):  # noqa: PTH110, PTH114
        raise RequestError(f"{output} exists and is not a folder. Choose another output.")
    occupied = os.path.exists(output) and any(output.iterdir())  # noqa: PTH110
    if occupied and not ((work / JOURNAL).exists() and _complete(output, work)):
        raise RequestError(f"{output} is not empty.\nChoose another output, or remove it first.")
    if os.path.ismount(output):
        raise RequestError(
            f"{output} is a mount point and cannot be replaced. Name a folder in it."
        )
    for folder in (output.parent, *output.parent.parents):
        if folder.exists():
            if not os.access(folder, os.W_OK | os.X_OK):
                raise RequestError(f"{folder} cannot be written. Choose another output.")
            return


def _complete(output: Path, work: Path) -> bool:
    """Tell whether a run was killed between moving its model and removing its work folder."""
    moved = output.is_dir() and any(output.iterdir()) and not (work / "model").exists()
    return moved and (output / PROVENANCE).exists()


def _move(model: Path, output: Path) -> None:
    try:
        os.rename(model, output)  # noqa: PTH104 - replaces an empty folder in one step
        sync_folder(output.parent)
    except OSError as error:
        raise OutputError(
            f"the merge is complete in {model}, but cannot be moved to {output}: {error.strerror}."
        ) from None
