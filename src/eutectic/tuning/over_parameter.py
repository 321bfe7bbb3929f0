"""A search over a parameter of the method, such as the time τ of `flow`, at a fixed α.

A parameter changes what is merged, not only how much of it is added: every value is merged anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from eutectic.errors import MethodError, Note, RequestError, suggest
from eutectic.execution.executors import Limits
from eutectic.execution.output_folder import unscaled_folder
from eutectic.methods import Method, get_method
from eutectic.planning.cost import check_memory
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import Source, check_recipe
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.tuning.objectives import Opened, measured_at, search_record, searched, tasks_of
from eutectic.tuning.search import Measured
from eutectic.tuning.search_tasks import TuningTask


@dataclass(frozen=True)
class Found:
    """The best value of a parameter.

    Attributes:
        recipe: the recipe with it, and with α, as a mapping.
        value: the value.
        scale: α, at which every value was measured.
        record: the whole curve, JSON-serialisable: `scale` is α, `value` the best value of the
            parameter `over`, and each point has its value of it as `parameter`.
        notes: what a user should know.
    """

    recipe: Mapping[str, Any]
    value: float
    scale: float
    record: Mapping[str, Any]
    notes: Sequence[Note]


def check_over(recipe: Recipe, over: str) -> None:
    """Refuse what is no real parameter of the recipe's method, or a search that needs no model."""
    method, search = get_method(recipe.method), recipe.scale
    known = real_parameters(method)
    if over not in known:
        allowed = f"It has: {', '.join(known)}." if known else "It has none."
        raise RequestError(
            f"'{over}' is no parameter of '{method.name}' that takes real numbers."
            f"{suggest(over, known)}\n{allowed}"
        )
    if recipe.script is not None:
        raise RequestError(
            f"a search over '{over}' is for recipes that say the same of all tensors.\n"
            "Leave out tensors, layers and parameters of single experts, or search α."
        )
    if not isinstance(search, ScaleSearch):
        raise _without_data(over)
    check_search_over(over, search.search)
    if "range" not in search.model_fields_set:
        raise RequestError(f"a search over '{over}' needs a range (--range LOW:HIGH).")
    for value in search.range:
        try:
            method.parse({**recipe.parameters, over: value})
        except MethodError as error:
            low, high = search.range
            raise RequestError(
                f"the range {low:g} to {high:g} (--range) holds what '{over}' cannot be.\n{error}"
            ) from None


def check_search_over(over: str, search: str | None) -> None:
    """Refuse a search by name that runs no model: it cannot tell values of a parameter apart."""
    if search in ("auto", "gram", "norm"):
        raise _without_data(over)


def _without_data(over: str) -> RequestError:
    return RequestError(
        f"a search over '{over}' runs the merged model on data.\n"
        "Choose search: validation or divergence (--search), with tasks."
    )


def real_parameters(method: Method) -> list[str]:
    """Return the parameters of a method that take real numbers."""
    hints = get_type_hints(method.parameters, include_extras=True)
    return [f.name for f in fields(method.parameters) if _is_real(hints[f.name])]


def _is_real(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_real(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return any(map(_is_real, get_args(hint)))
    return hint is float


def search_parameter(
    recipe: Recipe, source: Source, over: str, scale: float | None, limits: Limits
) -> Found:
    """Search the best value of a parameter by the recipe's search, at α = `scale`.

    None is the method's default α. Tasks and experts' outputs are read once; the merged deltas of
    one value are on the disk at a time.
    """
    check_over(recipe, over)
    search = recipe.scale
    assert isinstance(search, ScaleSearch)
    stated = recipe.model_dump(mode="json", exclude_unset=True)
    opened = Opened()
    notes: dict[Note, None] = {}
    tasks: list[TuningTask] = []
    alpha = scale

    def with_value(value: float) -> dict[str, Any]:
        return {**stated, "parameters": {**recipe.parameters, over: value}}

    def objective(value: float) -> Measured:
        nonlocal alpha, tasks
        checked = check_recipe(with_value(value), source)
        with (
            open_inputs(checked, source) as inputs,
            tempfile.TemporaryDirectory(prefix="eutectic-tune-") as folder,
        ):
            plan = make_plan(checked, inputs, source)
            check_memory(plan, inputs, limits.of_one_task)
            notes.update(dict.fromkeys(plan.notes))
            alpha = plan.scale if alpha is None else alpha
            tasks, _ = tasks_of(search, plan, inputs, opened)
            with unscaled_folder(Path(folder), plan, inputs, limits) as unscaled:
                return measured_at(search, alpha, unscaled, opened)

    def tell(done: int, total: int, value: float) -> None:
        if limits.progress is not None:
            limits.progress(done, total, f"{over} = {value:.3g}")

    curve = searched(search, objective, tell)
    assert alpha is not None
    (references,) = opened.references.values()
    experts = references if search.search == "validation" else None
    record = search_record(search, curve, tasks, limits.models, experts)
    record |= {
        "over": over,
        "value": curve.scale,
        "scale": alpha,
        "points": [
            {"parameter": value, **{k: v for k, v in point.items() if k != "scale"}}
            for value, point in zip(curve.points, record["points"], strict=True)
        ],
    }
    numbers = {
        "value": curve.scale,
        "scale": alpha,
        "search": search.search,
        "split": tasks[0].prepared.split,
        "points": len(curve.points),
    }
    told = [*notes, Note("searched_parameter", (over,), numbers)]
    if curve.at_edge:
        edge = {"value": curve.scale}
        told.append(Note("parameter_at_edge", (over,), edge, "warning"))
    merged = {**with_value(curve.scale), "scale": alpha}
    return Found(merged, curve.scale, alpha, record, told)
