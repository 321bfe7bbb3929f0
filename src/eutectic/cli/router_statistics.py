"""The statistics that `route` needs: read from files, or collected for the router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.cli.console import pairs, progress_bar
from eutectic.cli.options import StatisticsFiles
from eutectic.cli.proxy_data import RouterDataOptions
from eutectic.cli.records import option
from eutectic.errors import RequestError


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


def expert_statistics(given: StatisticsOptions) -> dict[str, Any]:
    """Return expert -> its statistics."""
    return _open(given.statistics, "--statistics")


def router_statistics(
    given: StatisticsOptions,
    reading: RouterDataOptions,
    merged: Path,
    experts: Mapping[str, str],
    layers: list[str] | None,
) -> dict[str, Any] | None:
    """Return expert -> statistics of the merged model on its task's data; None where none is named.

    Raises:
        RequestError: files and data are named, or data of other tasks than the experts'.
    """
    if given.router_statistics and given.router_data:
        raise RequestError("give --router-statistics or --router-data, not both.")
    if given.router_statistics:
        return _open(given.router_statistics, "--router-statistics")
    if not given.router_data:
        return None
    sources = pairs(given.router_data, "--router-data")
    if set(sources) != set(experts):
        raise RequestError(
            f"--router-data names {', '.join(sources)}; the experts are {', '.join(experts)}.\n"
            "Give the proxy data of every expert's task."
        )
    return _collected(sources, reading, merged, layers)


def _open(items: list[str] | None, option: str) -> dict[str, Any]:
    from eutectic.statistics import load_statistics

    return {name: load_statistics(path) for name, path in pairs(items or [], option).items()}


def _collected(
    sources: Mapping[str, str],
    reading: RouterDataOptions,
    merged: Path,
    layers: list[str] | None,
) -> dict[str, Any]:
    from eutectic.data.row_files import check_split, has_splits
    from eutectic.models.loading import load_model
    from eutectic.routed.routed_layers import choose_layers
    from eutectic.statistics import collect

    if reading.split is not None:
        check_split(list(sources.values()), reading.split)
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
    return found
