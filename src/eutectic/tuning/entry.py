"""The public entries: a merge whose scale may be a search, and the search alone."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from eutectic.errors import Note, RequestError
from eutectic.execution import run
from eutectic.execution.jobs import Limits, Progress
from eutectic.execution.request import limits_of, recipe_from
from eutectic.execution.run import MergeReport
from eutectic.execution.unscaled import Choice, unscaled_folder
from eutectic.planning.cost import check_memory
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import Source, check_recipe
from eutectic.recipes.schema import NOT_TAKEN, Recipe, ScaleSearch
from eutectic.tuning.choose import choose_scale

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _searching(merge: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a merge carry out searches for α: execution itself knows of no tasks."""

    @functools.wraps(merge)
    def searching(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        kwargs.setdefault("choose", choose_scale)
        return merge(*args, **kwargs)

    return searching


merge = _searching(run.merge)


@dataclass(frozen=True)
class TuneReport:
    """What a search found.

    Attributes:
        method: the method's name.
        scale: the best α.
        search: the whole search as in `eutectic.json`: objective, points, data.
        notes: what a user should know.
        output: report of the merge at α, if one was asked for.
    """

    method: str
    scale: float
    search: Mapping[str, Any] = field(repr=False)
    notes: tuple[Note, ...]
    output: MergeReport | None = None


def tune(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    search: Mapping[str, Any] | str | None = None,
    output: str | Path | None = None,
    work: str | Path | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TuneReport:
    """Search the scale α of a merge, without or with writing the model.

    Deltas are merged once; every α is W₀ + αΔ in one loaded model.

    Args:
        recipe: as for `eutectic.merge`.
        search: keys of `scale: {…}` (`search`, `tasks`, `range`, `points`, `tolerance`) on top of
            the recipe's, or "auto".
        output: folder for the model at the best α (default: none is written).
        work: without `output`, a folder that keeps the deltas and what was measured, so that
            another search begins at once (default: a temporary one).
        threads: as for `eutectic.merge`.
        memory: as for `eutectic.merge`.
        restart: as for `eutectic.merge`.
        progress: as for `eutectic.merge`; while searching, called with numbers of values.
        **options: as for `eutectic.merge`.

    Returns:
        The best α and the curve.

    Raises:
        RequestError: the request is wrong, or there is nothing to search.
        EutecticError: the work failed.

    Example:
        >>> eutectic.tune("recipe.yaml", search={"search": "divergence", "tasks": "tasks.yaml"})
        ... # doctest: +SKIP
    """
    checked, source = _with_search(*recipe_from(recipe, options), search)
    if not isinstance(checked.scale, ScaleSearch):
        raise RequestError(
            f"the recipe's scale is {'the default' if checked.scale is None else checked.scale}, "
            "not a search.\nName one: --search validation or divergence with --tasks, or --search "
            "gram, in closed form from statistics."
        )
    if output is not None:
        if work is not None:
            raise RequestError(
                "work and output exclude each other: with an output, deltas are in "
                "<output>.partial until the model is finished."
            )
        report = merge(
            checked.model_dump(mode="json", exclude_unset=True),
            output=output,
            threads=threads,
            memory=memory,
            restart=restart,
            progress=progress,
        )
        assert report.search is not None
        return TuneReport(report.method, report.scale, report.search, report.notes, report)
    limits = Limits(*limits_of(threads, memory), progress)
    with open_inputs(checked, source) as inputs, _folder(work) as folder:
        plan = make_plan(checked, inputs, source)
        check_memory(plan, inputs, limits.memory)
        find = choose_scale(plan, inputs)
        with unscaled_folder(folder, plan, inputs, limits, restart) as unscaled:
            choice: Choice = find(unscaled)
    return TuneReport(plan.method.name, choice.scale, choice.record, (*plan.notes, choice.note))


def _with_search(
    recipe: Recipe, source: Source, search: Mapping[str, Any] | str | None
) -> tuple[Recipe, Source]:
    if not search:
        return recipe, source
    stated = recipe.model_dump(mode="json", exclude_unset=True)
    if isinstance(search, str):
        return check_recipe({**stated, "scale": search}), source
    before = stated["scale"] if isinstance(recipe.scale, ScaleSearch) else {}
    idle = NOT_TAKEN.get(search.get("search", ""), ())  # what another search left there
    before = {key: value for key, value in before.items() if key not in idle}
    return check_recipe({**stated, "scale": {**before, **search}}), source


@contextmanager
def _folder(work: str | Path | None) -> Iterator[Path]:
    if work is not None:
        yield Path(work)
        return
    with tempfile.TemporaryDirectory(prefix="eutectic-tune-") as folder:
        yield Path(folder)
