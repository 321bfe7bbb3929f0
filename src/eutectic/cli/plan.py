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
from eutectic.cli.corrections import options_in_faults
from eutectic.cli.options import Json, LimitOptions, RecipeOptions, option
from eutectic.cli.recipe_request import request
from eutectic.recipes.units import format_bytes
from eutectic.sentences import shares
from eutectic.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        with options_in_faults(options):
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
        if not stage.reads:
            told |= _plan(checked, stage.source, shown)
        elif not json:
            tell("note", "planned when what it reads has been merged")
        records.append(told)
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
    from eutectic.execution.planned import alpha_of, planned, shape_of
    from eutectic.planning.adapter_outlook import outlook_in_words

    doing("reading headers")
    allowed = limits_of(**vars(shown.limits), models=checked.runs_models)
    made = planned(checked, source, allowed, explain=shown.explain)
    rows = made.tensors
    if shown.json:
        tell_notes(made.note_records, warnings_only=True)
        said = (
            "method",
            "post",
            "scale",
            "search",
            "threads",
            "memory_limit_bytes",
            "device",
            "cost",
            "files",
        )
        return {
            **{name: getattr(made, name) for name in (*said, "merged_by", "shares")},
            **notes_as_json(made.note_records),
            "heads": made.heads,
            **({} if made.adapter is None else {"adapter": made.adapter}),
            "tensors": rows,
        }
    listed = rows if shown.every else made.grouped()
    columns = [
        ("shape", [shape_of(row) for row in listed]),
        ("treatment", [row["treatment"] for row in listed]),
        ("method", [row["merged_by"] for row in listed]),
        ("α", [alpha_of(row) for row in listed]),
    ]
    why = [[("why", [row["why"] for row in listed])]] if shown.every else []
    print_named([row["name"] for row in listed], [columns, *why], title="tensor", left=True)
    if shown.explain:
        for text in dict.fromkeys(row["route"] for row in rows if row["route"]):
            tell("route", text)
    tell_notes(made.note_records)
    for text in outlook_in_words(made.adapter) if made.adapter else ():
        tell("adapter", text)
    tell("shares", shares(made.shares))
    cost, files = made.cost, made.files
    scale = f"{made.scale:g}" if made.search is None else f"by {made.search['search']}"
    bound = made.adapter is not None and not _is_known(made.adapter)
    written = ("at most " if bound else "") + format_bytes(cost["write_bytes"])
    written += f" in {files} files" if files > 1 else ""
    out.print(
        f"{made.named}, scale {scale}: reads {format_bytes(cost['read_bytes'])}, writes "
        f"{written}, peak about {format_bytes(cost['peak_bytes'])} of "
        f"{format_bytes(made.memory_limit_bytes)} allowed, about {_duration(cost['seconds'])} on "
        f"{counted(made.threads, 'Ray worker' if allowed.executor == 'ray' else 'thread')}"
        f"{_on_device(made.device, made.device_memory_bytes)}.",
        highlight=False,
    )
    return {}


def _is_known(adapter: "Mapping[str, Any]") -> bool:
    """Tell whether headers say how much an adapter will hold."""
    return adapter["energy"] is None and bool(adapter["certain"])


def _on_device(device: str, room: int | None) -> str:
    """Return where matrices are merged, if that is not the CPU."""
    return "" if room is None else f", matrices on {device} ({format_bytes(room)} free)"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
