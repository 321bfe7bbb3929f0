"""`eutectic inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from eutectic.cli.console import out, plain_table, print_json, progress_bar, tell, tell_done, verb
from eutectic.cli.options import (
    Base,
    Json,
    StatisticsFiles,
    What,
    named_experts,
    option,
    pairs,
    split_recipe,
)
from eutectic.errors import RequestError

if TYPE_CHECKING:
    from eutectic.reporting import Inspection

MODELS_PER_TABLE = 3


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The models that are compared, and what was measured of them."""

    what: What = None
    base: Base = None
    merged: list[str] | None = option(
        None, "A merged model; repeatable.", "--merged", "-m", metavar="NAME=FOLDER"
    )
    statistics: StatisticsFiles = None
    results: Path | None = option(None, "results.json of `eutectic evaluate`, for NAI.")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured."""

    layers: str | None = option(None, "Only tensors with such names.", metavar="GLOB")
    rank: int | None = option(
        None, "Leading singular triplets to compare (default: side/experts).", min=1
    )
    error: float = option(0.05, "Relative error that defines the merged subspace.")


@verb
def inspect(
    *,
    models: ModelOptions,
    measures: MeasureOptions,
    output: Path | None = option(None, "Write everything as JSON there.", "--output", "-o"),
    plot: Path | None = option(None, "Draw PNGs into this folder.", metavar="FOLDER"),
    json: Json = False,
) -> None:
    """Show how experts and merged models relate: norms, spectra, interference, alignment.

    SAR is the share of an expert's update that lies in the merged model's subspace, from 0 to 1.

    Examples:

      eutectic inspect --base ./base --merged iso_c=./merged sst2=./sst2 mnli=./mnli

      eutectic inspect recipe.yaml -m iso_c=./merged -m ta=./ta --results results.json --plot plots

      eutectic inspect recipe.yaml --layers '*.layer.0.*' -o inspection.json
    """
    from eutectic.reporting import inspect as run

    if not models.what:
        raise RequestError(
            "nothing to inspect.\nName a recipe, or experts: eutectic inspect --base B "
            "--merged iso_c=FOLDER a=PATH b=PATH"
        )
    recipe, rest = split_recipe(models.what)
    experts = named_experts(rest, [], models.statistics or [])
    if recipe is None and models.base is None:
        raise RequestError(
            "without a recipe, --base must be given.\n"
            "Example: eutectic inspect --base B --merged iso_c=FOLDER a=PATH b=PATH"
        )
    with progress_bar("inspecting") as bar:
        found = run(
            recipe,
            base=models.base,
            experts=experts or None,
            merged=pairs(models.merged or [], "--merged"),
            results=models.results,
            output=output,
            plots=plot,
            progress=bar,
            **vars(measures),
        )
    if json:
        print_json(found.model_dump(mode="json"))
        return
    _show(found)
    tell_done("written", output)
    tell_done("drawn into", plot)


def _show(found: Inspection) -> None:
    tasks = found.summary.tasks
    by_data = any(task.by == "activation" for task in tasks.values())
    table = _table("task", "‖Δ‖", "‖Δ‖/‖W₀‖", "stable rank", "eff. rank")
    table.add_column("interferes most", no_wrap=True)
    for name, task in tasks.items():
        sizes = (task.norm, task.relative_norm, task.stable_rank, task.effective_rank)
        other = _cut("–" if task.most_interfering is None else task.most_interfering)
        mark = " σ" if by_data and task.by == "singular" else ""
        share = "" if task.interference is None else f" {task.interference:.3f}{mark}"
        table.add_row(_cut(name), *map(_number, sizes), other + share)
    out.print(table)
    names = list(found.merged)
    for start in range(0, len(names), MODELS_PER_TABLE):
        out.print()
        out.print(_alignment(found, names[start : start + MODELS_PER_TABLE]))
    if len(tasks) > 1:
        meaning = (
            "singular task interference of the two over Σσ (measured on outputs with --statistics)"
        )
        if by_data:
            meaning = (
                "how much the other moves outputs on the task's data; 1: as much as the task "
                "itself; σ: without statistics, singular task interference"
            )
        tell("interferes", meaning)
    for note in found.notes:
        tell("note", note)
    if found.summary.correlation is not None:
        overall = found.summary.correlation.overall
        out.print(
            f"[bold]SAR against NAI[/]: Pearson {_number(overall.pearson)}, Spearman "
            f"{_number(overall.spearman)} over {overall.count} points",
            highlight=False,
        )


def _alignment(found: Inspection, names: Sequence[str]) -> Table:
    models = [found.summary.merged[name] for name in names]
    width = 1 if found.summary.correlation is None else 2  # columns of a model: NAI beside SAR

    def cells(of_models: Iterable[tuple[str, str]]) -> list[str]:
        return [cell for both in of_models for cell in both[:width]]

    table = _table("task", *cells((f"SAR {_cut(name)}", "NAI") for name in names))
    for task in found.experts:
        row = cells((_number(m.task_sar[task]), _number(m.nai.get(task))) for m in models)
        table.add_row(_cut(task), *row)
    means = cells((_number(m.sar), _number(m.mean_nai)) for m in models)
    table.add_row("mean", *means, style="bold")
    sizes = cells((_number(m.growth), "") for m in models)
    table.add_row("‖Δ‖ / experts'", *sizes, style="dim")
    table.add_row("rank q", *cells((f"{m.rank:.1f}", "") for m in models), style="dim")
    return table


def _table(first: str, *others: str) -> Table:
    return plain_table(Column(first, no_wrap=True), numbers=others)


def _cut(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
