"""`eutectic route`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from eutectic.cli.console import pairs, verb
from eutectic.cli.options import Json, given_options, refuse
from eutectic.cli.proxy_data import RouterDataOptions
from eutectic.cli.records import argument, option
from eutectic.cli.routed_report import report_routed
from eutectic.cli.router_statistics import (
    StatisticsOptions,
    expert_statistics,
    router_statistics,
)
from eutectic.errors import RequestError

_SHOWING = {"merged", "export", "json"}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What is built of the experts."""

    rank: int = option(32, "Rank of every expert, ρ.", min=1)
    router: str | None = option(
        None, "discriminant or prototype (default: as the statistics allow)."
    )
    accumulate: bool | None = option(
        None, "Decide by the evidence of all layers so far (default: discriminant)."
    )
    layers: list[str] | None = option(None, "Parameters whose layers are routed.", metavar="GLOB")
    base: Path | None = option(None, "The base before merging; for adapters only.")
    statistics_of: str = option(
        "expert", "expert, or any: accept statistics of another checkpoint."
    )


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What is written."""

    output: Path | None = option(None, "Folder for the routed model.", "--output", "-o")
    export: Path | None = option(None, "Folder for PEFT LoRA adapters on the merged model.")
    dry_run: bool = option(
        False, "Show sizes and costs; build nothing. Needs no statistics.", "--dry-run"
    )


@verb
def route(
    *,
    context: typer.Context,
    merged: Path = argument(..., "The merged model's folder, or a routed model's to inspect it."),
    experts: list[str] | None = argument(
        None, "Experts: folders or LoRA adapters.", metavar="NAME=EXPERT…"
    ),
    statistics: StatisticsOptions,
    build: BuildOptions,
    reading: RouterDataOptions,
    target: TargetOptions,
    json: Json = False,
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
    if not experts:
        refuse(
            [option for name, option in given_options(context).items() if name not in _SHOWING],
            "for building, and there are no experts.",
            "Name them: eutectic route MERGED NAME=EXPERT …",
        )
        _show(merged, target.export, json)
        return
    if not statistics.router_data:
        refuse(
            list(given_options(context, RouterDataOptions).values()),
            "for --router-data, and none are named.",
            "Name the data of every task.",
        )
    named = pairs(experts, "expert")
    if build.statistics_of not in ("expert", "any"):
        raise RequestError(f"--statistics-of is expert or any, got '{build.statistics_of}'.")
    if build.router not in (None, "discriminant", "prototype"):
        raise RequestError(f"--router is discriminant or prototype, got '{build.router}'.")
    if not target.dry_run:
        _check_folders(target)
    from eutectic.models.loading import load_stored
    from eutectic.routed import build_routed, export_lora, routed_costs
    from eutectic.routed.build import expert_statistics as check_statistics
    from eutectic.routed.build import open_experts
    from eutectic.routed.routed_layers import routed_layers

    model = load_stored(merged)
    of_experts = expert_statistics(statistics)
    chosen, left_out = routed_layers(model, build.layers, of_experts)
    costs = dataclasses.asdict(
        routed_costs(model, len(named), build.rank, build.layers, of_experts)
    )
    if target.dry_run:
        report_routed({"costs": costs, "left_out": left_out}, json)
        return
    if not json:
        report_routed({"costs": costs}, json)
    # Everything that can be refused is, before data are run through the model.
    check_statistics(of_experts, list(named), chosen, "statistics")
    with open_experts(model, named, build.base):
        pass
    of_router = router_statistics(statistics, reading, merged, named, build.layers)
    routed = build_routed(model, named, of_experts, of_router, **vars(build))
    report: dict[str, Any] = {
        **({"costs": costs} if json else {}),
        "experts": list(routed.routing.experts),  # pyright: ignore[reportAttributeAccessIssue]
        "router": routed.routing.router,  # pyright: ignore[reportAttributeAccessIssue]
        "short": routed.routing.short,  # pyright: ignore[reportAttributeAccessIssue]
        "left_out": routed.routing.left_out,  # pyright: ignore[reportAttributeAccessIssue]
    }
    if target.output is not None:
        _save(routed, merged, target.output)
        report["output"] = str(target.output)
    if target.export is not None:
        export_lora(routed, target.export)
        report["export"] = str(target.export)
    report_routed(report, json)


def _show(folder: Path, export: Path | None, json: bool) -> None:
    from eutectic.routed import export_lora, load_routed
    from eutectic.routed.routed_folder import experts_of

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
    report_routed(report, json)


def _check_folders(target: TargetOptions) -> None:
    if target.output is None and target.export is None:
        raise RequestError("name a folder to write with --output or --export, or use --dry-run.")
    for folder in (target.output, target.export):
        if folder is not None and folder.exists() and any(folder.iterdir()):
            raise RequestError(f"{folder}: not empty; name a new folder.")


def _save(routed: Any, merged: Path, output: Path) -> None:
    from eutectic.checkpoint.folder import copy_side_files, side_files

    routed.save_pretrained(output)
    own = {path.name for path in output.iterdir()}
    copy_side_files(merged, output, [name for name in side_files(merged) if name not in own])
