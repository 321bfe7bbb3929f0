"""The public entries: a merge of files, of state dicts, and of two experts in every mixture."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from eutectic.checkpoint.writer import MemoryWriter
from eutectic.cluster.where import taken_for_merge
from eutectic.errors import MergeWarning, Note, OutputError, RequestError, why_failed
from eutectic.execution.executors import Limits, Progress, limits_of, peak_bytes
from eutectic.execution.journal import Ledger, request_identity, squares_in
from eutectic.execution.model_folder import PROVENANCE, read_provenance
from eutectic.execution.norms import measured, new_norm_notes
from eutectic.execution.output_folder import check_output, write_to_folder
from eutectic.execution.schedule import Chooser, Desk, refuse_search, run_schedule
from eutectic.planning.cost import check_memory, merged_by, treatments
from eutectic.planning.inputs import in_memory_inputs, open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import Source, check_recipe, load_recipe
from eutectic.recipes.mergekit import check_mergekit
from eutectic.recipes.mergekit_document import is_mergekit
from eutectic.recipes.mergekit_stages import Stage, check_stages, read_stages
from eutectic.recipes.schema import Recipe
from eutectic.sentences import shares as in_words
from eutectic.storage import local_path, storage_of
from eutectic.tables import InNotebooks, Shown, facts
from eutectic.types import LayerStatistics


def recipe_from(
    recipe: str | Path | Mapping[str, Any] | None, options: Mapping[str, Any]
) -> tuple[Recipe, Source]:
    """Return the checked recipe of a file, a mapping, or options, which win over both."""
    source = Source()
    if isinstance(recipe, (str, Path)):
        checked, source = load_recipe(recipe, options)
        told = checked.script is not None and checked.script.stated is not None
        if not options or told:  # in mergekit's words, which took them when it was read
            return checked, source
        # Paths of the file are resolved by now; lines no longer describe the whole.
        recipe = checked.model_dump(mode="json", exclude_unset=True)
    stated = dict(recipe or {})
    if is_mergekit(stated):
        return check_mergekit(stated, source, options=options), source
    return check_recipe({**stated, **_sorted_options(options, stated)}), source


def _sorted_options(options: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Move keys that are no recipe's under `parameters`, where the method checks them."""
    known = {k: v for k, v in options.items() if k in Recipe.model_fields}
    other = {k: v for k, v in options.items() if k not in Recipe.model_fields}
    if not isinstance(known.get("parameters", {}), Mapping):
        return known  # refused with its type when the recipe is checked
    if other or "parameters" in known:
        before = stated.get("parameters", {})
        known["parameters"] = {**before, **known.get("parameters", {}), **other}
    return known


@dataclass(frozen=True)
class MergeReport(InNotebooks):
    """What a merge did.

    Attributes:
        output: the folder written.
        method: the method's name.
        scale: α.
        tensors: number of tensors per treatment.
        merged_by: number of tensors per method that merged them ("copy" for copies).
        mostly_by: the method that merged most numbers of those that `method` is for.
        fallback: what took the method's fall-back for lack of statistics: its `method`, `tensors`
            `of` how many, their `share` of the numbers; empty where nothing did.
        norms: ‖αΔ‖ of all that is `merged`, ‖W₀‖ (`base`) and ‖Δ_t‖ of the `experts`; the `ratio`
            of the first to the experts' mean, and how many of the `matrices` have one `above` the
            `bound`, the `largest` by name.
        heads: expert -> names of the tensors kept for it alone.
        shares: parts of the experts' numbers that were `merged`, `kept` as heads and `left`, all
            together and under `experts`; `base_alone` is the base's part that no expert has.
        notes: what a user should know: fall-backs, alignments, tensors that nobody changed.
        records: tensor -> what the method reported of it (residual curves, ridges, ranks).
        resumed: whether an unfinished run was continued.
        seconds: wall-clock time.
        peak_bytes: the largest resident memory of this process so far.
        search: how α was chosen, where the recipe asks for a search.
        post: what followed the method, by name; None where nothing did.
        note_records: the notes as records, for programs.
    """

    output: Path
    method: str
    scale: float
    tensors: Mapping[str, int]
    merged_by: Mapping[str, int]
    mostly_by: str
    fallback: Mapping[str, Any]
    norms: Mapping[str, Any]
    heads: Mapping[str, tuple[str, ...]]
    shares: Mapping[str, Any]
    notes: tuple[str, ...]
    records: Mapping[str, Any] = field(repr=False)
    resumed: bool
    seconds: float
    peak_bytes: int
    search: Mapping[str, Any] | None = field(default=None, repr=False)
    post: str | None = None
    note_records: tuple[Note, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        """Show what was merged how, how large the change is, and the notes."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        how = "" if self.search is None else f", chosen by {self.search['search']}"
        ratio = self.norms.get("ratio")
        by = self.method if self.mostly_by == self.method else f"{self.mostly_by} ({self.method})"
        by += "" if self.post is None else f" + {self.post}"
        known = {
            "method": f"{by}, scale {self.scale:g}{how}",
            "tensors": ", ".join(f"{n} {name}" for name, n in self.tensors.items()),
            "merged by": ", ".join(f"{name} {n}" for name, n in self.merged_by.items()),
            "shares": in_words(self.shares) if self.shares else None,
            "change": None if ratio is None else f"{ratio:.3g} times the experts' mean",
            "heads": ", ".join(self.heads),
            "notes": "\n".join(self.notes),
            "took": f"{self.seconds:.1f} s{', continued' if self.resumed else ''}",
            "output": self.output,
        }
        return (facts("MergeReport", known),)


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
    where = taken_for_merge(options)
    stages = read_stages(recipe) if isinstance(recipe, (str, Path)) else ()
    if stages:
        run = _Run(limits_of(threads, memory, progress, **where), restart, choose)
        return _merge_stages(stages, local_path(output), run, options)
    checked, source = recipe_from(recipe, options)
    models = checked.runs_models and choose is not None
    run = _Run(limits_of(threads, memory, progress, **where, models=models), restart, choose)
    return _merge_one(checked, source, local_path(output), run)


@dataclass(frozen=True)
class _Run:
    """What a merge may use, and how it begins."""

    limits: Limits
    restart: bool
    choose: Chooser | None


def _merge_one(checked: Recipe, source: Source, output: Path, run: _Run) -> MergeReport:
    started = time.perf_counter()
    limits, choose = run.limits, run.choose
    if output.name in ("", ".."):
        raise RequestError(f"'{output}' has no name of its own. Name a new folder.")
    work = work_folder(output)
    check_output(output, work)
    with open_inputs(checked, source) as inputs:
        plan = make_plan(checked, inputs, source)
        check_memory(plan, inputs, limits.of_one_task)
        find = None if plan.search is None or choose is None else choose(plan, inputs)
        if find is None:
            refuse_search(plan)
        written = write_to_folder(plan, output, work, inputs, limits, run.restart, find)
    plan = written.plan
    notes = (*plan.notes, *written.notes)
    return MergeReport(
        output=output,
        method=plan.method.name,
        scale=plan.scale,
        tensors=treatments(plan),
        merged_by=merged_by(plan),
        mostly_by=plan.mostly_by,
        fallback=dict(plan.fallback),
        norms=dict(plan.norms),
        heads={n: tuple(e.name for e in own) for n, own in plan.heads.items()},
        shares=plan.shares.record,
        notes=tuple(map(str, notes)),
        note_records=notes,
        records=written.records,
        resumed=written.resumed,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        search=written.search,
        post=None if plan.post is None else plan.post.name,
    )


def _merge_stages(
    stages: Sequence[Stage], output: Path, run: _Run, options: Mapping[str, Any]
) -> MergeReport:
    """Merge one stage after the other; each is resumed, or kept where it is finished."""
    check_output(output, work_folder(output))
    folder = stages_folder(output)
    for stage, recipe in (checked := check_stages(stages, folder, options))[:-1]:
        place = folder / stage.name
        if (place / PROVENANCE).exists() and not work_folder(place).exists():
            _check_made(place, recipe, stage.source, run.limits.device.model)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        _merge_one(recipe, stage.source, place, run)
    stage, recipe = checked[-1]
    report = _merge_one(recipe, stage.source, output, run)
    note = Note("stages_kept", (str(folder),), {"count": len(stages) - 1})
    notes = (*report.note_records, note)
    return replace(report, note_records=notes, notes=tuple(map(str, notes)))


def stages_folder(output: Path) -> Path:
    """Return where the outputs of the stages before the last one lie."""
    return output.with_name(output.name + ".stages")


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    method: str,
    weights: Mapping[str, float] | None = None,
    statistics: Mapping[str, Mapping[str, LayerStatistics]] | None = None,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory by the same plan and arithmetic as files.

    Args:
        base: name -> tensor of the base model.
        experts: name -> state dict.
        method: a name from `eutectic.methods()`.
        weights: name -> w_t (default 1).
        statistics: name -> statistics, for methods that use data.
        threads: jobs side by side.
        config: the base's `config.json` as a mapping (`model.config.to_dict()`). GPT-2 and its
            relatives keep some matrices as [in, out], which only their `model_type` tells.
        **options: other keys of a recipe (`scale`, `tensors`, `dtype`, `missing`, …) or the
            method's parameters.

    Returns:
        The merged state dict: the base's keys, order, shapes and dtypes, in new memory. Heads are
        the base's. A key that an expert unties from one of the base's (see `config`) is added.

    Raises:
        RequestError: the request is wrong; a method that needs statistics has none of any expert,
            or not of every one (`fallback="allow"` takes its fall-back).
        NumericalError: NaN or Inf in an expert.

    Warns:
        MergeWarning: what `eutectic.merge` warns of, such as a change that has exploded or experts
            unrelated to the base; and tensors that fell back for lack of statistics, by which
            method, and their share. `warning.note` is the record.
    """
    weights = dict(weights or {})
    unknown = [name for name in {**weights, **(statistics or {})} if name not in experts]
    if unknown:
        raise RequestError(f"weights or statistics name experts that are not given: {unknown}.")
    specs = {n: {"path": "memory", "weight": weights.get(n, 1.0)} for n in experts}
    values = {"base": "memory", "experts": specs, "method": method, "heads": "base", **options}
    recipe, _ = recipe_from(None, values)
    inputs = in_memory_inputs(base, experts, statistics or {}, config)
    plan = make_plan(recipe, inputs)
    sink = MemoryWriter([(t.name, t.dtype, t.shape) for t in plan.tensors])
    ledger = Ledger()
    desk = Desk(
        inputs,
        ledger,
        limits_of(threads, None),
        open_deltas=lambda layout: nullcontext(MemoryWriter(layout.entries)),
        open_output=lambda plan: nullcontext(sink),
    )
    run_schedule(plan, desk)
    notes = [*plan.notes, *new_norm_notes(plan, measured(plan, squares_in(ledger)))]
    for note in notes:
        if note.level == "warning" or note.kind in _COUNTED:
            warnings.warn(MergeWarning(note), stacklevel=2)
    return sink.tensors


_COUNTED = frozenset({"fallback", "own_fallback"})  # what else is told where there is no report


def sweep(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    mixtures: Sequence[float],
    threads: int | None = None,
    memory: str | int | None = None,
    restart: bool = False,
    choose: Chooser | None = None,
    **options: Any,
) -> dict[float, MergeReport]:
    """Merge two experts with weights λ and 1 − λ for every λ of `mixtures`.

    The setting of arXiv 2312.04339 in which one expert is wanted and the other, fine-tuned on an
    intermediate task, helps. Each merge goes to `output/<λ>`, see `mixture_name`; finished ones of
    the same request are kept, and left out of what is returned, so a killed sweep continues.
    Where the recipe asks for a search of α, `choose` finds one for every λ.
    """
    where = taken_for_merge(options)
    checked, _ = recipe_from(recipe, options)
    if len(checked.experts) != 2:
        raise RequestError(f"a sweep mixes exactly two experts, got {len(checked.experts)}.")
    outside = [value for value in mixtures if not 0 <= value <= 1]
    if outside or not mixtures:
        raise RequestError(f"a sweep takes values from 0 to 1, got {outside or 'none'}.")
    first, second = checked.experts
    stated = checked.model_dump(mode="json", exclude_unset=True)
    reports: dict[float, MergeReport] = {}
    output = local_path(output)
    model = limits_of(threads, memory, **where, models=checked.runs_models).device.model
    with _only_sweep(output):
        for value in mixtures:
            folder = output / mixture_name(value)
            experts = {name: dict(spec) for name, spec in stated["experts"].items()}
            experts[first]["weight"], experts[second]["weight"] = value, 1 - value
            mixed = {**stated, "experts": experts}
            # A run that was killed when its model was finished leaves its work folder.
            if (folder / PROVENANCE).exists() and not work_folder(folder).exists():
                check_same(folder, mixed, model)
                continue
            reports[value] = merge(
                mixed,
                output=folder,
                threads=threads,
                memory=memory,
                restart=restart,
                choose=choose,
                **where,
            )
    return reports


@contextmanager
def _only_sweep(output: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder."""
    try:
        lock = storage_of(output).lock(output)
    except BlockingIOError:
        raise RequestError(f"another process is sweeping into {output}.") from None
    except OSError as error:
        where = error.filename or output
        raise OutputError(f"{where}: cannot be written ({why_failed(error)}).") from None
    try:
        yield
    finally:
        lock.release()


def work_folder(output: Path) -> Path:
    """Return where the work on an output goes on."""
    return output.with_name(output.name + ".partial")


def mixture_name(value: float) -> str:
    """Return the name of λ's folder: the shortest text that reads as λ again, so no two share one.

    Example:
        >>> mixture_name(1.0), mixture_name(0.5), mixture_name(1 / 3)
        ('1', '0.5', '0.3333333333333333')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def check_same(folder: Path, recipe: Mapping[str, Any], device: str = "") -> None:
    """Refuse a finished merge of another request, and what is none."""
    checked, source = recipe_from(recipe, {})
    _check_made(folder, checked, source, device)


def _check_made(folder: Path, checked: Recipe, source: Source, device: str) -> None:
    made = read_provenance(folder)
    with open_inputs(checked, source) as inputs:
        asked = request_identity(make_plan(checked, inputs, source), inputs, device=device)
    if made.get("request") != asked:
        raise RequestError(
            f"{folder} holds a merge of another request: the recipe, an input or the version has "
            "changed since.\nChoose another output, or remove it."
        )
