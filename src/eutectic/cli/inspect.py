"""`eutectic inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from eutectic.cli.console import (
    folded,
    out,
    print_json,
    print_named,
    progress_bar,
    tell,
    tell_done,
    verb,
)
from eutectic.cli.named_words import named_experts, named_paths, split_recipe
from eutectic.cli.options import (
    Base,
    Json,
    StatisticsFiles,
    What,
    given_options,
    option,
    refuse,
)
from eutectic.errors import RequestError
from eutectic.words import counted

if TYPE_CHECKING:
    from eutectic.reporting import Inspection
    from eutectic.reporting.schema import TaskSummary


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The models that are compared, and what was measured of them."""

    what: What = None
    base: Base = None
    merged: list[str] | None = option(
        None, "A merged model; repeatable.", "--merged", "-m", metavar="[NAME=]FOLDER"
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
    memory: str | None = option(None, "Limit, such as 4GB (default: 60 % of what is available).")


_OF_FILES = {"what", "layers", "output", "json"}


@verb
def inspect(
    context: typer.Context,
    *,
    models: ModelOptions,
    measures: MeasureOptions,
    output: Path | None = option(None, "Write everything as JSON there.", "--output", "-o"),
    plot: Path | None = option(None, "Draw PNGs into this folder.", metavar="FOLDER"),
    json: Json = False,
) -> None:
    """Show how experts and merged models relate: norms, spectra, interference, alignment.

    SAR is the share of an expert's update that lies in the merged model's subspace, from 0 to 1.
    Of statistics files: how every input Gram is kept, and what its directions leave.

    Examples:

      eutectic inspect --base ./base --merged iso_c=./merged sst2=./sst2 mnli=./mnli

      eutectic inspect recipe.yaml -m iso_c=./merged -m ta=./ta --results results.json --plot plots

      eutectic inspect recipe.yaml --layers '*.layer.0.*' -o inspection.json

      eutectic inspect sst2.stats.safetensors mnli.stats.safetensors
    """
    from eutectic.reporting import inspect as run

    if not models.what:
        raise RequestError(
            "nothing to inspect.\nName a recipe, or experts: eutectic inspect --base B "
            "--merged iso_c=FOLDER a=PATH b=PATH"
        )
    files = _statistics(models.what)
    if files:
        refuse(
            [option for name, option in given_options(context).items() if name not in _OF_FILES],
            "about models, and statistics files are inspected.",
            "Name a base and experts to inspect them.",
        )
        _show_statistics(files, measures.layers, output, json)
        return
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
            merged=named_paths(models.merged or [], "--merged"),
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


def _statistics(words: list[str]) -> dict[str, str]:
    """Return name -> file where the words name statistics; empty where they name none."""
    from eutectic.statistics.statistics_file import holds_statistics
    from eutectic.storage import meant, view

    if not any(word.endswith(".safetensors") for word in words):
        return {}
    files = named_paths(words, "statistics")
    held = {name: path for name, path in files.items() if holds_statistics(path)}
    missing = [p for p in files.values() if p.endswith(".safetensors") and not view(p).exists()]
    if missing and not held:
        raise RequestError(f"{missing[0]}: no such file.{meant(missing[0])}")
    if held and len(held) < len(files):
        other = next(path for name, path in files.items() if name not in held)
        why = "" if view(other).exists() else f": no such file.{meant(other)}"
        raise RequestError(
            f"{next(iter(held.values()))} holds statistics, {other} does not{why or '.'}\n"
            "Inspect statistics files alone; those of an expert are named by --statistics."
        )
    return {name.removesuffix(".stats"): path for name, path in held.items()}


def _show_statistics(
    files: Mapping[str, str], layers: str | None, output: Path | None, json: bool
) -> None:
    from eutectic.recipes.units import format_bytes
    from eutectic.reporting.held_statistics import inspect_statistics

    found = inspect_statistics(files, layers=layers, output=output)
    if json:
        print_json(found)
        return
    for name, held in found["statistics"].items():
        grams = held["grams"]
        examples = "" if held["examples"] is None else f" of {held['examples']:,} examples"
        counts = f"{counted(len(grams), 'input Gram')}{examples}"
        out.print(f"[bold]{escape(name)}[/]: {counts}", highlight=False)
        columns = [
            ("inputs", [f"{g['width']:,}" for g in grams]),
            ("tokens", [f"{g['tokens']:,}" for g in grams]),
            ("kept", [_kept(g) for g in grams]),
            ("beside", [_beside(g) for g in grams]),
            ("size", [format_bytes(g["nbytes"]) for g in grams]),
        ]
        print_named([_named(g) for g in grams], [[column] for column in columns], title="layer")
        out.print()
    if any(g["beside"] is not None for held in found["statistics"].values() for g in held["grams"]):
        tell(
            "beside",
            "share of the Gram's trace that its directions leave to the diagonal: their error in "
            "nuclear norm, which bounds it in any other",
        )
    tell_done("written", output)


def _named(gram: Mapping[str, Any]) -> str:
    first, *others = gram["layers"]
    return f"{first} +{len(others)}" if others else first


def _kept(gram: Mapping[str, Any]) -> str:
    from eutectic.reporting.held_statistics import kept_in_words
    from eutectic.statistics.gram_forms import GramForm

    return kept_in_words(GramForm(**gram))


def _beside(gram: Mapping[str, Any]) -> str:
    return "" if gram["beside"] is None else f"{100 * gram['beside']:.2g} %"


def _show(found: Inspection) -> None:
    tasks = found.summary.tasks
    by_data = any(task.by == "activation" for task in tasks.values())
    own = list(tasks.values())
    columns = [
        ("‖Δ‖", [_number(task.norm) for task in own]),
        ("‖Δ‖/‖W₀‖", [_number(task.relative_norm) for task in own]),
        ("stable rank", [_number(task.stable_rank) for task in own]),
        ("eff. rank", [_number(task.effective_rank) for task in own]),
        ("interferes most", [_rival(task, by_data) for task in own]),
    ]
    print_named(list(tasks), [[column] for column in columns], title="task")
    out.print()
    names = list(found.merged)
    if names:
        rows = [*found.experts, "mean", "‖Δ‖ / experts'", "rank q"]
        styles = [*[None] * len(found.experts), "bold", "dim", "dim"]
        groups = [_alignment(found, name) for name in names]
        print_named(rows, groups, title="task", styles=styles)
        if found.summary.correlation is not None:
            out.print("NAI: 0 is the base, 1 the expert; higher is better", style="dim")
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


def _alignment(found: Inspection, name: str) -> list[tuple[str, list[str]]]:
    """Return a merged model's columns: SAR, and NAI where results are known."""
    model = found.summary.merged[name]
    sar = [_number(model.task_sar[task]) for task in found.experts]
    sar += [_number(model.sar), _number(model.growth), f"{model.rank:.1f}"]
    columns = [(f"SAR {name}" if len(name) < 20 else f"SAR\n{folded(name, 24)}", sar)]
    if found.summary.correlation is not None:
        nai = [_number(model.nai.get(task)) for task in found.experts]
        columns.append(("NAI", [*nai, _number(model.mean_nai), "", ""]))
    return columns


def _rival(task: TaskSummary, by_data: bool) -> str:
    """Return the expert that interferes most, and how much."""
    other = folded("–" if task.most_interfering is None else task.most_interfering, 24)
    mark = " σ" if by_data and task.by == "singular" else ""
    return other if task.interference is None else f"{other} {task.interference:.3f}{mark}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
