"""The public entries: a merge whose scale may be a search, and the search alone."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eutectic.cluster.where import MergeWhere
from eutectic.errors import Note, RequestError
from eutectic.execution import run
from eutectic.execution.executors import Progress, limits_of
from eutectic.execution.output_folder import unscaled_folder
from eutectic.execution.run import MergeReport, recipe_from
from eutectic.execution.schedule import Choice, Choose, Chooser
from eutectic.notebook import with_bar
from eutectic.planning.cost import check_memory
from eutectic.planning.inputs import Inputs, open_inputs
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import Source, check_recipe
from eutectic.recipes.schema import NOT_TAKEN, Recipe, ScaleSearch
from eutectic.storage import local_path, url_of
from eutectic.tables import InNotebooks, Shown, data_frame, facts, number, table

if TYPE_CHECKING:
    from eutectic.tuning.objectives import Opened

_RUN = ("threads", "memory", "restart", "progress", *MergeWhere.__annotations__)


def choose_scale(plan: Plan, inputs: Inputs, opened: "Opened | None" = None) -> Choose:
    """Return how α is chosen for a plan whose recipe asks for a search.

    What is missing is found before any work: tensors whose α is open, tasks, data, statistics.
    `opened` keeps what merges of the same experts have in common.
    """
    search = plan.search
    if search is None:
        raise RequestError(
            f"the recipe's scale is {plan.scale}: there is nothing to search.\n"
            "Choose search: validation or divergence (--search) with tasks, or gram or norm."
        )
    if not any(t.tunable for t in plan.tensors):
        raise RequestError(
            "no tensor takes the recipe's scale: rules or scale_tensors fix every one of them.\n"
            "Leave the search out, or the rules' scales."
        )
    if search.search == "gram":
        from eutectic.tuning.output_error import prepare_closed_form

        return prepare_closed_form(plan, inputs)
    if search.search == "norm":
        from eutectic.tuning.norm_scale import prepare_norm

        return prepare_norm(plan, inputs)
    from eutectic.tuning.objectives import prepare_objective

    return prepare_objective(search, plan, inputs, opened)


@with_bar("merging")
def merge(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    threads: int | None = None,
    memory: str | int | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    choose: Chooser = choose_scale,
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
        choose: chooses α where the recipe asks for a search.
        **options: keys of a recipe (`base`, `experts`, `method`, `scale`, `dtype`, …), which win
            over those of `recipe`; other keys are the method's parameters. Besides, `executor`:
            "threads" of this process (the default) or "ray", whose workers read, compute and write
            with the same bytes as result; and `ray_address`, `HOST:PORT` of a cluster that every
            input and the output is visible to (default: `RAY_ADDRESS`, or one is started here).
            With Ray, `threads` and `memory` count over all machines. `device`: where matrices are
            merged, "cpu" (the default), "cuda", "cuda:N", or "auto" for a GPU where there is one;
            element-wise methods and what is too large for it stay on the CPU. A search for α runs
            its models there too; with one, "mps" is a device for these alone.

    Returns:
        A report. The same facts, without times, are in the output's `eutectic.json`.

    Raises:
        RequestError: the request is wrong; nothing was started.
        EutecticError: the work failed; what is finished is kept for the next call.

    Example:
        >>> eutectic.merge(base="base", experts={"a": "a", "b": "b"}, method="iso_c",
        ...                scale=1.3, output="merged")  # doctest: +SKIP
    """
    return run.merge(
        recipe,
        output=output,
        threads=threads,
        memory=memory,
        restart=restart,
        progress=progress,
        choose=choose,
        **options,
    )


@dataclass(frozen=True)
class TuneReport(InNotebooks):
    """What a search found.

    Attributes:
        method: the method's name.
        scale: the best α.
        search: the whole search as in `eutectic.json`: objective, points, data.
        notes: what a user should know.
        output: report of the merge at α, if one was asked for.
        note_records: the notes as records, for programs.
        over: the parameter of the method that was searched, at that α; None for a search of α.
        value: its best value.
    """

    method: str
    scale: float
    search: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...]
    output: MergeReport | None = None
    note_records: tuple[Note, ...] = field(default=(), repr=False)
    over: str | None = None
    value: float | None = None

    def to_pandas(self) -> Any:
        """Return the curve as a data frame: the objective and its parts by α or the parameter."""
        from eutectic.tuning.search import tried

        points, name = self.search["points"], self.over or "scale"
        rows = zip(tried(self.search), points, strict=True)
        return data_frame(
            ({name: at, "objective": p["value"], **p["parts"]} for at, p in rows), name
        )

    def __repr__(self) -> str:
        """Show the best α, the curve, and the notes."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        from eutectic.tuning.search import tried

        known = {
            "method": self.method,
            "scale": f"{self.scale:g}",
            **({} if self.over is None else {self.over: f"{self.value:g}"}),
            "objective": f"{self.search['objective']}; "
            f"{'higher' if self.search.get('maximise') else 'lower'} is better",
            "notes": "\n".join(self.notes),
            "output": None if self.output is None else self.output.output,
        }
        points = self.search["points"]
        best = self.scale if self.over is None else self.value
        parts = list(points[0]["parts"])[:8]
        rows = [
            [f"{at:.3g}{' ◀' if at == best else ''}", number(p["value"])]
            + [number(p["parts"].get(name)) for name in parts]
            for at, p in zip(tried(self.search), points, strict=True)
        ]
        return facts("TuneReport", known), table([self.over or "α", "objective", *parts], rows)


@with_bar("tuning")
def tune(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    search: Mapping[str, Any] | str | None = None,
    output: str | Path | None = None,
    work: str | Path | None = None,
    over: str | None = None,
    at: float | None = None,
    **options: Any,
) -> TuneReport:
    """Search the scale α of a merge, or a parameter of its method; write the model if asked to.

    Deltas are merged once; every α is W₀ + αΔ in one loaded model. With `over`, every value of the
    parameter is merged anew.

    Args:
        recipe: as for `eutectic.merge`.
        search: keys of `scale: {…}` (`search`, `tasks`, `range`, `points`, `tolerance`) on top of
            the recipe's, or "auto".
        output: folder for the model at the best α (default: none is written).
        work: without `output`, a folder that keeps the deltas and what was measured, so that
            another search begins at once (default: a temporary one).
        over: a parameter of the method that takes real numbers, such as `tau` of `flow`: its value
            is searched in place of α, by `validation` or `divergence` over a `range` that is given.
        at: with `over`, the α of every merge (default: the method's).
        **options: `threads`, `memory`, `restart`, `executor`, `ray_address`, `device`, `progress`
            (while searching, called with numbers of values), keys of a recipe and parameters of
            the method, as for `eutectic.merge`. On `device` matrices are merged and models run.

    Returns:
        The best α, or value, and the curve.

    Raises:
        RequestError: the request is wrong, or there is nothing to search.
        EutecticError: the work failed.

    Example:
        >>> eutectic.tune("recipe.yaml", search={"search": "divergence", "tasks": "tasks.yaml"})
        ... # doctest: +SKIP
    """
    limited = {name: options.pop(name) for name in _RUN if name in options}
    if at is not None and not math.isfinite(at):
        raise RequestError(f"at (--at) is the α of every merge, a finite number; got {at}.")
    if over is not None:
        from eutectic.tuning.over_parameter import check_search_over

        check_search_over(over, search if isinstance(search, str) else (search or {}).get("search"))
    checked, source = _with_search(*recipe_from(recipe, options), search)
    if not isinstance(checked.scale, ScaleSearch):
        raise RequestError(
            f"the recipe's scale is {'the default' if checked.scale is None else checked.scale}, "
            "not a search.\nName one: --search validation or divergence with --tasks, or --search "
            "gram, in closed form from statistics, or --search norm."
        )
    if over is not None:
        return _tune_over(checked, source, (over, at), output, work, limited)
    if at is not None:
        raise RequestError("at (--at) is the α of a search over a parameter: name it by over.")
    if output is not None:
        if work is not None:
            raise RequestError(
                "work and output exclude each other: with an output, deltas are in "
                "<output>.partial until the model is finished."
            )
        stated = checked.model_dump(mode="json", exclude_unset=True)
        report = merge(stated, output=output, **limited)
        assert report.search is not None
        found = (report.method, report.scale, report.search)
        return TuneReport(*found, report.notes, report, report.note_records)
    if work is not None and url_of(local_path(work)) is not None:
        raise RequestError(f"{work}: deltas are kept on a disk.\nName a folder of this machine.")
    restart = limited.pop("restart", False)
    limits = limits_of(**limited, models=checked.runs_models)
    with open_inputs(checked, source) as inputs, ExitStack() as stack:
        if work is None:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="eutectic-tune-"))
        plan = make_plan(checked, inputs, source)
        check_memory(plan, inputs, limits.of_one_task)
        find = choose_scale(plan, inputs)
        with unscaled_folder(Path(work), plan, inputs, limits, restart) as unscaled:
            choice: Choice = find(unscaled)
    noted = (*plan.notes, choice.note)
    found = (plan.method.name, choice.scale, choice.record)
    return TuneReport(*found, tuple(map(str, noted)), note_records=noted)


def _tune_over(
    checked: Recipe,
    source: Source,
    asked: tuple[str, float | None],
    output: str | Path | None,
    work: str | Path | None,
    limited: dict[str, Any],
) -> TuneReport:
    """Search a parameter at an α, and write the model at its best value if an output is named."""
    from eutectic.tuning.over_parameter import search_parameter

    (over, at), restart = asked, limited.pop("restart", False)
    if work is not None:
        raise RequestError(
            f"work keeps the deltas of one merge, and a search over '{over}' makes many.\n"
            "Leave work (--work) out."
        )
    if restart and output is None:
        raise RequestError("restart discards an unfinished run, and none is kept without output.")
    limits = limits_of(**limited, models=True)
    found = search_parameter(checked, source, over, at, limits)
    made = None
    notes = tuple(found.notes)
    if output is not None:
        limited["device"] = limits.device.name  # of matrices: no model runs any more
        made = merge(found.recipe, output=output, restart=restart, **limited)
        notes = (*made.note_records, *(n for n in notes if n not in made.note_records))
    return TuneReport(
        checked.method,
        found.scale,
        found.record,
        tuple(map(str, notes)),
        made,
        notes,
        over,
        found.value,
    )


def _with_search(
    recipe: Recipe, source: Source, search: Mapping[str, Any] | str | None
) -> tuple[Recipe, Source]:
    if not search:
        return recipe, source
    if recipe.script is not None and recipe.script.stated is not None:
        raise RequestError(
            "a mergekit configuration says how much of each model is added, and is not searched.\n"
            "Make a recipe of it, and search that: eutectic convert."
        )
    stated = recipe.model_dump(mode="json", exclude_unset=True)
    if isinstance(search, str):
        return check_recipe({**stated, "scale": search}), source
    before = stated["scale"] if isinstance(recipe.scale, ScaleSearch) else {}
    idle = NOT_TAKEN.get(search.get("search", ""), ())  # what another search left there
    before = {key: value for key, value in before.items() if key not in idle}
    return check_recipe({**stated, "scale": {**before, **search}}), source
