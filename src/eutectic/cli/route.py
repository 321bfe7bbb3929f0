"""`eutectic route`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from eutectic.cli.console import out, pairs, print_json, progress_bar, verb
from eutectic.cli.options import (
    Device,
    ImageColumn,
    MaxLength,
    SourceColumn,
    Split,
    TargetColumn,
    Task,
    TextColumn,
    TextPairColumn,
    TrustCode,
    given_options,
    refuse,
)
from eutectic.errors import RequestError
from eutectic.recipes.units import format_bytes

if TYPE_CHECKING:
    from eutectic.statistics.batches import Batch
    from eutectic.statistics.models import LoadedModel

_SHOWING = {"merged", "export", "json"}
_COLLECTING = {
    "batch_size", "max_length", "task", "device", "split", "trust_code",
    *(f"{kind}_column" for kind in ("text", "text_pair", "source", "target", "image")),
}  # fmt: skip


@verb
def route(
    context: typer.Context,
    merged: Annotated[
        Path, typer.Argument(help="The merged model's folder, or a routed model's to inspect it.")
    ],
    experts: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=EXPERT…", help="Experts: folders or LoRA adapters."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the routed model.")
    ] = None,
    statistics: Annotated[
        list[str] | None,
        typer.Option("--statistics", "-s", metavar="NAME=FILE", help="Statistics of an expert."),
    ] = None,
    router_statistics: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Statistics of the merged model on a task's data."),
    ] = None,
    router_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DATA", help="Proxy data of a task: collects the router's statistics now."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of every expert, ρ.")] = 32,
    router: Annotated[
        str | None,
        typer.Option(help="discriminant or prototype (default: as the statistics allow)."),
    ] = None,
    accumulate: Annotated[
        bool | None,
        typer.Option(help="Decide by the evidence of all layers so far (default: discriminant)."),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Parameters whose layers are routed.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base before merging; for adapters only.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch, collecting.")] = 16,
    max_length: MaxLength = None,
    task: Task = None,
    device: Device = "cpu",
    split: Split = None,
    trust_code: TrustCode = False,
    text_column: TextColumn = "text",
    text_pair_column: TextPairColumn = "text_pair",
    source_column: SourceColumn = "source",
    target_column: TargetColumn = "target",
    image_column: ImageColumn = "image",
    statistics_of: Annotated[
        str, typer.Option(help="expert, or any: accept statistics of another checkpoint.")
    ] = "expert",
    export: Annotated[
        Path | None, typer.Option(help="Folder for PEFT LoRA adapters on the merged model.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show sizes and costs; build nothing. Needs no statistics."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Build a routed model: the merged one, and thin experts that each sample is routed to.

    Without experts the folder is a routed model, to be shown or exported.

    Examples:

      eutectic route merged/ sst2=./sst2 mnli=./mnli -s sst2=sst2.stats.safetensors
      -s mnli=mnli.stats.safetensors --router-data sst2=sst2.jsonl --router-data mnli=mnli.jsonl
      --rank 32 -o routed/

      eutectic route merged/ sst2=./sst2 mnli=./mnli --dry-run

      eutectic route routed/ --export adapters/
    """
    from eutectic.routed import build_routed, export_lora, routed_costs
    from eutectic.routed.layers import routed_layers
    from eutectic.routed.sources import expert_statistics, open_experts
    from eutectic.routed.store import load_model
    from eutectic.statistics.data import open_batches
    from eutectic.statistics.encode import Columns
    from eutectic.statistics.models import load_model as load_on
    from eutectic.statistics.rows import check_split, has_splits

    given = given_options(context)
    if not experts:
        refuse(
            [option for name, option in given.items() if name not in _SHOWING],
            "for building, and there are no experts.",
            "Name them: eutectic route MERGED NAME=EXPERT …",
        )
        _show(merged, export, json)
        return
    if not router_data:
        refuse(
            [option for name, option in given.items() if name in _COLLECTING],
            "for --router-data, and none are named.",
            "Name the data of every task.",
        )
    named = pairs(experts, "expert")
    if statistics_of not in ("expert", "any"):
        raise RequestError(f"--statistics-of is expert or any, got '{statistics_of}'.")
    if router not in (None, "discriminant", "prototype"):
        raise RequestError(f"--router is discriminant or prototype, got '{router}'.")
    if not dry_run:
        _check_folders(output, export)
    model = load_model(merged)
    of_experts = _open_statistics(statistics, "--statistics")
    chosen, left_out = routed_layers(model, layers, of_experts)
    costs = dataclasses.asdict(routed_costs(model, len(named), rank, layers, of_experts))
    if dry_run:
        _report({"costs": costs, "left_out": left_out}, json)
        return
    if not json:
        _report({"costs": costs}, json)
    # Everything that can be refused is, before data are run through the model.
    expert_statistics(of_experts, list(named), chosen, "statistics")
    with open_experts(model, named, base):
        pass
    if router_statistics and router_data:
        raise RequestError("give --router-statistics or --router-data, not both.")
    of_router = None
    if router_statistics:
        of_router = _open_statistics(router_statistics, "--router-statistics")
    elif router_data:
        sources = pairs(router_data, "--router-data")
        _check_sources(sources, named)
        if split is not None:
            check_split(list(sources.values()), split)
        loaded = load_on(merged, None, task, device)  # pyright: ignore[reportArgumentType]
        columns = Columns(
            text=text_column,
            text_pair=text_pair_column,
            source=source_column,
            target=target_column,
            image=image_column,
        )
        # All data are opened before any are run.
        opened = {
            name: open_batches(
                source,
                loaded,
                columns=columns,
                batch_size=batch_size,
                max_length=max_length,
                split=split if has_splits(source) else None,
                trust_code=trust_code,
            )
            for name, source in sources.items()
        }
        of_router = _collect(loaded, opened, layers)
    routed = build_routed(
        model,
        named,
        of_experts,
        of_router,
        rank=rank,
        router=router,  # pyright: ignore[reportArgumentType]
        layers=layers,
        accumulate=accumulate,
        base=base,
        statistics_of=statistics_of,  # pyright: ignore[reportArgumentType]
    )
    report: dict[str, Any] = {
        **({"costs": costs} if json else {}),
        "experts": list(routed.routing.experts),  # pyright: ignore[reportAttributeAccessIssue]
        "router": routed.routing.router,  # pyright: ignore[reportAttributeAccessIssue]
        "short": routed.routing.short,  # pyright: ignore[reportAttributeAccessIssue]
        "left_out": routed.routing.left_out,  # pyright: ignore[reportAttributeAccessIssue]
    }
    if output is not None:
        _save(routed, merged, output)
        report["output"] = str(output)
    if export is not None:
        export_lora(routed, export)
        report["export"] = str(export)
    _report(report, json)


def _show(folder: Path, export: Path | None, json: bool) -> None:
    from eutectic.routed import export_lora, load_routed
    from eutectic.routed.store import experts_of

    routed = load_routed(folder)
    layers = experts_of(routed)
    report: dict[str, Any] = {
        "experts": list(routed.routing.experts),
        "router": routed.routing.router,
        "accumulate": routed.routing.accumulate,
        "layers": {path: experts.up.shape[2] for path, experts in layers.items()},
        "short": routed.routing.short,
        "left_out": routed.routing.left_out,
    }
    if export is not None:
        export_lora(routed, export)
        report["export"] = str(export)
    _report(report, json)


def _check_folders(output: Path | None, export: Path | None) -> None:
    if output is None and export is None:
        raise RequestError("name a folder to write with --output or --export, or use --dry-run.")
    for folder in (output, export):
        if folder is not None and folder.exists() and any(folder.iterdir()):
            raise RequestError(f"{folder}: not empty; name a new folder.")


def _open_statistics(items: list[str] | None, option: str) -> dict[str, Any]:
    from eutectic.statistics import load_statistics

    return {name: load_statistics(path) for name, path in pairs(items or [], option).items()}


def _check_sources(sources: Mapping[str, str], experts: Mapping[str, str]) -> None:
    if set(sources) != set(experts):
        raise RequestError(
            f"--router-data names {', '.join(sources)}; the experts are {', '.join(experts)}.\n"
            "Give the proxy data of every expert's task."
        )


def _collect(
    loaded: LoadedModel, data: Mapping[str, Iterable[Batch]], layers: list[str] | None
) -> dict[str, Any]:
    """Return the merged model's statistics on every task's data."""
    from eutectic.routed.layers import choose_layers
    from eutectic.statistics import collect

    routed = [layer.name for layer in choose_layers(loaded.model, layers)]
    found: dict[str, Any] = {}
    for name, batches in data.items():
        with progress_bar(f"collecting {name}") as tell:
            found[name] = collect(
                loaded.model,
                batches,
                layers=routed,
                fingerprint=loaded.fingerprint,
                progress=lambda done, total: tell(done, total or done + 1, f"batch {done}"),
            )
    return found


def _save(routed: Any, merged: Path, output: Path) -> None:
    from eutectic.checkpoint.folder import copy_side_files, side_files

    routed.save_pretrained(output)
    own = {path.name for path in output.iterdir()}
    copy_side_files(merged, output, [name for name in side_files(merged) if name not in own])


def _report(report: dict[str, Any], json: bool) -> None:
    if json:
        print_json(report)
        return
    table = Table.grid(padding=(0, 2))
    costs = report.get("costs")
    if costs:
        share = costs["parameters"] / costs["model_parameters"]
        work = costs["multiply_adds_per_token"] / costs["model_multiply_adds_per_token"]
        table.add_row("routed layers", str(costs["layers"]))
        table.add_row(
            "adds",
            f"{costs['parameters']:,} parameters (+{share:.1%}), {format_bytes(costs['nbytes'])}",
        )
        table.add_row(
            "per token", f"{costs['multiply_adds_per_token']:,} multiply-adds (+{work:.1%})"
        )
    if "experts" in report:
        table.add_row("experts", escape(", ".join(report["experts"])))
        table.add_row("router", report["router"])
    for path, rank in report.get("layers", {}).items():
        table.add_row(path, f"rank {rank}")
    for name in report.get("left_out", []):
        table.add_row("left out", f"{name}: its queries and keys differ")
    if report.get("short"):
        table.add_row(
            "note",
            f"{len(report['short'])} layers have experts with fewer directions than the "
            "rank: too few tokens, or nothing left to add",
        )
    out.print(table)
    for key in ("output", "export"):
        if key in report:
            path = escape(report[key])
            out.print(f"[bold green]written[/] {path}", highlight=False, soft_wrap=True)
