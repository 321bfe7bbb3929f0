"""`eutectic plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eutectic.cli.console import (
    doing,
    notes_as_json,
    out,
    print_json,
    print_named,
    tell,
    tell_notes,
    verb,
)
from eutectic.cli.options import Json, LimitOptions, RecipeOptions, option, request
from eutectic.conventions import layer_group
from eutectic.recipes.units import format_bytes
from eutectic.words import shares

if TYPE_CHECKING:
    from eutectic.recipes.document import Source
    from eutectic.recipes.schema import Recipe


@verb
def plan(
    *,
    asked: RecipeOptions,
    limits: LimitOptions,
    every: bool = option(False, "One line per tensor.", "--all"),
    explain: bool = option(False, "Say which linear algebra each matrix would take, and why."),
    json: Json = False,
) -> None:
    """Show what a merge would do, from the files' headers: quick, and nothing is written.

    Every fault of the recipe is reported at once, with its line.

    Examples:

      eutectic plan recipe.yaml

      eutectic plan --base ./base -m iso_c --explain sst2=./sst2 mnli=./mnli
    """
    from eutectic.execution.run import recipe_from
    from eutectic.recipes.mergekit_stages import check_stages, read_stages

    recipe, options = request(asked)
    shown = _Shown(limits, every, explain, json)
    stages = read_stages(recipe) if recipe is not None else ()
    if not stages:
        record = _plan(*recipe_from(recipe, options), shown)
        if json:
            print_json(record)
        return
    # Outputs of stages are not there yet; a name that cannot be one stands for their folder.
    records: list[dict[str, Any]] = []
    for stage, checked in check_stages(stages, Path("STAGES"), options):
        if not json:
            reads = f", which reads {', '.join(stage.reads)}" if stage.reads else ""
            tell("stage", f"{stage.name or 'the output'}{reads}")
        told = {"stage": stage.name, "reads": list(stage.reads)}
        if stage.reads:
            tell("note", "planned when what it reads has been merged")
            records.append(told)
        else:
            records.append({**told, **_plan(checked, stage.source, shown)})
    if json:
        print_json({"stages": records})


@dataclass(frozen=True)
class _Shown:
    """What is shown of a plan."""

    limits: LimitOptions
    every: bool
    explain: bool
    json: bool


def _plan(checked: "Recipe", source: "Source", shown: _Shown) -> dict[str, Any]:
    """Make a plan, show it, and return it as JSON has it."""
    from eutectic.execution.executors import limits_of
    from eutectic.planning.cost import check_memory, merged_by, plan_cost, tensor_cost
    from eutectic.planning.inputs import open_inputs
    from eutectic.planning.plan import make_plan, output_layout

    limits, every, explain = shown.limits, shown.every, shown.explain
    doing("reading headers")
    allowed = limits_of(limits.threads, limits.memory)
    count, limit = allowed.threads, allowed.memory
    with open_inputs(checked, source) as inputs:
        made = make_plan(checked, inputs, source)
        check_memory(made, inputs, limit)
        total = plan_cost(made, inputs, count)
        costs = {t.name: tensor_cost(t, inputs) for t in made.tensors}
        files = len(output_layout(made, inputs).files)
    searched = made.search
    scale_text = f"{made.scale:g}" if searched is None else f"by {searched.search}"
    rows = [_row(t, costs[t.name], explain, searched is not None) for t in made.tensors]
    if shown.json:
        tell_notes(made.notes, warnings_only=True)
        record: dict[str, Any] = {
            "method": made.method.name,
            "scale": made.scale if searched is None else None,
            "search": None if searched is None else searched.model_dump(mode="json"),
            "threads": count,
            "memory_limit_bytes": limit,
            "cost": vars(total),
            "files": files,
            "merged_by": merged_by(made),
            "shares": made.shares.record,
            **notes_as_json(made.notes),
            "heads": {n: [e.name for e in own] for n, own in made.heads.items()},
            "tensors": rows,
        }
        return record
    listed = rows if every else _grouped(rows)
    columns = [
        ("shape", ["×".join(map(str, row["shape"])) or "small" for row in listed]),
        ("treatment", [row["treatment"] for row in listed]),
        ("method", [row["method"] for row in listed]),
        ("α", [_alpha(row) for row in listed]),
    ]
    why = [[("why", [row["why"] for row in listed])]] if every else []
    print_named([row["name"] for row in listed], [columns, *why], title="tensor", left=True)
    if explain:
        for text in dict.fromkeys(row["route"] for row in rows if row["route"]):
            tell("route", text)
    tell_notes(made.notes)
    tell("shares", shares(made.shares.record))
    written = format_bytes(total.write_bytes) + (f" in {files} files" if files > 1 else "")
    out.print(
        f"{made.method.name}, scale {scale_text}: reads {format_bytes(total.read_bytes)}, writes "
        f"{written}, peak about {format_bytes(total.peak_bytes)} of {format_bytes(limit)} allowed, "
        f"about {_duration(total.seconds)} on {count} threads.",
        highlight=False,
    )
    return {}


def _row(planned: Any, cost: Any, explain: bool, searched: bool) -> dict[str, Any]:
    return {
        "name": planned.name,
        "shape": list(planned.shape),
        "dtype": str(planned.dtype).removeprefix("torch."),
        "treatment": planned.treatment.value,
        "method": planned.method,
        "scale": planned.scale if not (searched and planned.tunable) else None,
        "why": planned.why,
        "kinds": [note.kind for note in planned.reason],
        "peak_bytes": cost.peak_bytes,
        "read_bytes": cost.read_bytes,
        "write_bytes": cost.write_bytes,
        "seconds": cost.seconds,
        "route": _route(planned) if explain else "",
    }


def _route(planned: Any) -> str:
    from eutectic.methods import get_method

    if not planned.merged or planned.treatment.value != "matrix":
        return ""
    explain, stack = get_method(planned.method).explain, len(planned.experts)
    if explain is None:
        return ""
    return "; ".join(
        explain((stack, *shape), planned.parameters, planned.precision)
        for shape in dict.fromkeys(planned.matrix_shapes)
    )


def _grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fold like layers (`layer.*.weight ×12`), and small tensors into one row per treatment."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        pattern = layer_group(row["name"])
        small = row["treatment"] == "vector" and row["kinds"] == ["small"]
        what = ("biases and norms", ()) if small else (pattern, tuple(row["shape"]))
        key = (*what, row["treatment"], row["method"], row["scale"])
        groups.setdefault(key, []).append(row)
    folded: list[dict[str, Any]] = []
    for (pattern, shape, *_), members in groups.items():
        name = f"{pattern} ×{len(members)}" if len(members) > 1 else members[0]["name"]
        folded.append({**members[0], "name": name, "shape": shape})
    return folded


def _alpha(row: dict[str, Any]) -> str:
    if row["method"] == "copy":
        return ""
    return "searched" if row["scale"] is None else f"{row['scale']:g}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
