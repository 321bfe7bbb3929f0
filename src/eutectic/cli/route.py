"""`eutectic route`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eutectic.cli.console import doing, progress_bar, verb
from eutectic.cli.named_words import named_paths, pairs
from eutectic.cli.options import (
    Json,
    RouterDataOptions,
    StatisticsFiles,
    argument,
    given_options,
    option,
    refuse,
)
from eutectic.cli.routed_report import tell_routed
from eutectic.errors import RequestError
from eutectic.storage import FolderAside, folder_aside

if TYPE_CHECKING:
    from eutectic.routed.router_quality import RouterQuality

_SHOWING = {"merged", "export", "json"}


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """Statistics of the experts, and where those of the router come from."""

    statistics: StatisticsFiles = None
    router_statistics: list[str] | None = option(
        None, "Statistics of the merged model on a task's data.", metavar="NAME=FILE"
    )
    router_data: list[str] | None = option(
        None, "Proxy data of a task: collects the router's statistics now.", metavar="NAME=DATA"
    )


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What is built of the experts."""

    rank: int = option(32, "Rank of every expert, ρ.", min=1)
    router: str | None = option(
        None,
        "Which expert: by discriminants or prototypes at every layer (default: as the statistics "
        "allow), or once by one layer's features (mad, sim).",
        metavar="discriminant | prototype | mad | sim",
    )
    accumulate: bool | None = option(
        None, "Decide by the evidence of all layers so far (default: discriminant)."
    )
    decider: str | None = option(
        None, "The layer by which mad and sim decide (default: the last).", metavar="LAYER"
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
        None, "Experts: folders or LoRA adapters.", metavar="[NAME=]EXPERT…"
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
    named = named_paths(experts, "expert")
    if build.statistics_of not in ("expert", "any"):
        raise RequestError(f"--statistics-of is expert or any, got '{build.statistics_of}'.")
    if build.router not in (None, "discriminant", "prototype", "mad", "sim"):
        raise RequestError(
            f"--router is discriminant, prototype, mad or sim, got '{build.router}'."
        )
    with ExitStack() as stack:
        asides: Mapping[str, FolderAside] = {}
        if not target.dry_run:
            words = [vars(part) for part in (statistics, build, reading)]
            asked = {"merged": merged, "experts": experts, "options": words}
            asides = _open_folders(target, asked, stack)
        _build(merged, named, statistics, build, reading, asides, json)


def _build(
    merged: Path,
    named: Mapping[str, str],
    statistics: StatisticsOptions,
    build: BuildOptions,
    reading: RouterDataOptions,
    asides: Mapping[str, FolderAside],
    json: bool,
) -> None:
    """Build a routed model and write it; without folders to write, show what it costs."""
    if asides and all(aside.finished for aside in asides.values()):
        _put_in_place(asides)
        tell_routed({name: str(aside.output) for name, aside in asides.items()}, json)
        return
    from eutectic.checkpoint.folder import copy_side_files, module_files, side_files
    from eutectic.checkpoint.writer import write_atomically
    from eutectic.execution.model_card import UNKNOWN, licence_of
    from eutectic.models.loading import load_stored
    from eutectic.routed import build_routed, routed_costs
    from eutectic.routed.build import deciding_layer
    from eutectic.routed.expert_weights import expert_statistics as check_statistics
    from eutectic.routed.expert_weights import open_experts
    from eutectic.routed.head_files import find_heads
    from eutectic.routed.routed_card import CARD, routed_card
    from eutectic.routed.routed_folder import write_adapters, write_routed
    from eutectic.routed.routed_layers import routed_layers, unrouted_layers

    doing("loading the merged model")
    beside = dict.fromkeys((*side_files(merged), *module_files(merged)))
    model = load_stored(merged)
    of_experts = _open(statistics.statistics, "--statistics")
    chosen, left_out = routed_layers(model, build.layers, of_experts)
    deciding_layer(build.router, build.accumulate, build.decider, chosen)  # pyright: ignore[reportArgumentType]
    costs = asdict(routed_costs(model, len(named), build.rank, build.layers, of_experts))
    places = {"routed": [s.name for s in chosen], "not_routed": unrouted_layers(model, chosen)}
    if not asides:
        tell_routed({"costs": costs, **places, "left_out": left_out}, json)
        return
    if not json:
        tell_routed({"costs": costs}, json)
    # Everything that can be refused is, before data are run through the model.
    check_statistics(of_experts, list(named), [layer.name for layer in chosen], "statistics")
    with open_experts(model, named, build.base):
        pass
    heads = find_heads(merged, named)
    of_router, data = _router_statistics(statistics, reading, merged, named, build.layers)
    doing("building thin experts")
    routed: Any = build_routed(model, named, of_experts, of_router, **vars(build), heads=heads)
    quality = _quality(routed, of_router or of_experts, data, reading)
    routed.routing.quality = None if quality is None else quality.record()
    report: dict[str, Any] = {
        **({"costs": costs} if json else {}),
        **places,
        **_described(routed),
        "router_quality": routed.routing.quality,
    }
    doing("writing")
    for name, aside in asides.items():
        report[name] = str(aside.output)
        if aside.finished:
            continue
        with aside.writing() as folder:
            if name == "export":
                write_adapters(routed, folder, aside.output, merged)
            else:
                write_routed(routed, folder)
                licence = licence_of(merged)
                card = routed_card(routed, None if licence == UNKNOWN else licence)
                write_atomically(folder / CARD, card.encode())
                own = {path.name for path in folder.iterdir()}
                copy_side_files(merged, folder, [name for name in beside if name not in own])
    _put_in_place(asides)
    tell_routed(report, json, quality)


def _quality(
    routed: Any,
    statistics: Mapping[str, Any],
    data: Mapping[str, Iterable[Any]] | None,
    reading: RouterDataOptions,
) -> RouterQuality | None:
    """Return how well the router tells the tasks apart: on its data, else by its statistics."""
    from eutectic.models.task_kinds import ZERO_SHOT, spelled
    from eutectic.models.zero_shot import embed_pictures
    from eutectic.routed.router_quality import estimated_quality, router_quality

    if data is None:
        return estimated_quality(routed, statistics)
    if spelled(reading.task or "") == ZERO_SHOT:
        embed_pictures(routed)
    with progress_bar("measuring the router") as tell:

        def told(name: str, batches: Iterable[Any], done: int) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                tell(done, len(data), f"{name}, batch {number + 1}")
                yield batch

        from eutectic.cluster.devices import device_of_models

        routed.to(device_of_models(reading.device))
        try:
            named = {n: told(n, own, done) for done, (n, own) in enumerate(data.items())}
            return router_quality(routed, named)
        finally:
            routed.to("cpu")
            vars(routed).pop("forward", None)


def _put_in_place(asides: Mapping[str, FolderAside]) -> None:
    """Give all folders their names before anything tells of the run is removed."""
    for aside in asides.values():
        if not aside.finished:
            aside.commit()
    for aside in asides.values():
        aside.clear()


def _described(routed: Any) -> dict[str, Any]:
    """Return what a report says of any routed model."""
    heads = routed.expert_heads.stored
    return {
        "experts": list(routed.routing.experts),
        "heads": {name: head.config.architectures[0] for name, head in heads.items()},
        "router": routed.routing.router,
        "short": routed.routing.short,
        "left_out": routed.routing.left_out,
    }


def _show(folder: Path, export: Path | None, json: bool) -> None:
    from eutectic.routed import RouterQuality, export_lora, load_routed
    from eutectic.routed.routed_folder import experts_of
    from eutectic.routed.routed_layers import unrouted_layers

    doing("loading the routed model")
    routed = load_routed(folder)
    held, kept = experts_of(routed), routed.routing.quality
    report: dict[str, Any] = {
        "routed": [experts.name for experts in held.values()],
        "not_routed": unrouted_layers(routed),
        **_described(routed),
        "accumulate": routed.routing.accumulate,
        "layers": {path: experts.up.shape[2] for path, experts in held.items()},
        "router_quality": kept,
    }
    if export is not None:
        export_lora(routed, export, folder)
        report["export"] = str(export)
    tell_routed(report, json, None if kept is None else RouterQuality.from_record(kept))


def _open_folders(
    target: TargetOptions, asked: Mapping[str, Any], stack: ExitStack
) -> dict[str, FolderAside]:
    """Return what is to be written by the name of its option, locked until the stack is closed."""
    from eutectic.routed.routed_folder import DESCRIPTION, ROUTERS_FILE

    if target.output is None and target.export is None:
        raise RequestError("name a folder to write with --output or --export, or use --dry-run.")
    if target.output is not None and target.output == target.export:
        raise RequestError(f"--output and --export are both {target.output}; name two folders.")
    output, export = target.output, target.export
    named = (("output", output, DESCRIPTION, export), ("export", export, ROUTERS_FILE, output))
    return {
        name: stack.enter_context(folder_aside(folder, asked, last, together))
        for name, folder, last, together in named
        if folder is not None
    }


def _router_statistics(
    given: StatisticsOptions,
    reading: RouterDataOptions,
    merged: Path,
    experts: Mapping[str, str],
    layers: list[str] | None,
) -> tuple[dict[str, Any] | None, dict[str, Iterable[Any]] | None]:
    """Return expert -> statistics of the merged model on its task's data, and these, if named."""
    if given.router_statistics and given.router_data:
        raise RequestError("give --router-statistics or --router-data, not both.")
    if given.router_statistics:
        return _open(given.router_statistics, "--router-statistics"), None
    if not given.router_data:
        return None, None
    from eutectic.data.row_files import check_split, has_splits
    from eutectic.models.loading import load_model
    from eutectic.routed.routed_layers import choose_layers
    from eutectic.statistics import collect

    sources = pairs(given.router_data, "--router-data")
    if set(sources) != set(experts):
        raise RequestError(
            f"--router-data names {', '.join(sources)}; the experts are {', '.join(experts)}.\n"
            "Give the proxy data of every expert's task."
        )
    if reading.split is not None:
        check_split(list(sources.values()), reading.split)
    doing("loading the model for the router's data")
    loaded = load_model(merged, None, reading.task, reading.device)  # pyright: ignore[reportArgumentType]
    # All data are opened before any are run.
    opened = {
        name: reading.batches(source, loaded, split=reading.split if has_splits(source) else None)
        for name, source in sources.items()
    }
    routed = [layer.name for layer in choose_layers(loaded.model, layers)]
    found: dict[str, Any] = {}
    for name, batches in opened.items():
        with progress_bar(f"collecting {name}") as tell:
            found[name] = collect(
                loaded.model,
                batches,
                layers=routed,
                fingerprint=loaded.fingerprint,
                progress=lambda done, total: tell(done, total or done + 1, f"batch {done}"),
            )
    return found, opened


def _open(items: list[str] | None, option: str) -> dict[str, Any]:
    from eutectic.statistics import load_statistics

    return {name: load_statistics(path) for name, path in pairs(items or [], option).items()}
