"""Routed rows: two routers and the oracle, at two ranks, on two merged bases."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from table.merging import ALL_ROWS, PROXIES, ROWS, collect_on, collect_statistics, merge_row
from table.outcomes import keep
from table.suite import Suite, correct, set_parameters
from torch import Tensor

import eutectic
from eutectic.statistics import load_statistics

RANKS = (8, 32)
BASES = ("esm_vit", "iso_a")
ROUTERS: tuple[Literal["prototype", "discriminant"], ...] = ("prototype", "discriminant")
Row = tuple[str, Callable[[], dict[str, Any]]]


def add_row_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Let the command line name rows, and what the routed models stand on."""
    parser.add_argument(
        "--rows",
        nargs="*",
        choices=[*ALL_ROWS, "routed"],
        metavar="ROW",
        help=f"default: {default}; 'routed' for the routed models",
    )
    parser.add_argument(
        "--bases",
        nargs="*",
        choices=list(ROWS),
        default=BASES,
        metavar="ROW",
        help="rows whose merge the routed models stand on",
    )


def routed_rows(
    suite: Suite,
    work: Path,
    results: Path,
    seed: int,
    counts: Sequence[int],
    bases: Sequence[str] = BASES,
) -> Iterator[Row]:
    """Yield (name, how to compute it): oracle, and each router, for each base and rank.

    `counts` asks for smaller samples too: the same base from the full sample, rank and routers
    from so many examples a task.
    """

    @cache
    def merged(base: str, count: int) -> dict[str, Any]:
        return _merged(suite, base, work, results, seed, count)

    def row(base: str, rank: int, mode: str, count: int = 0) -> Row:
        name = f"routed-{base}-{rank}-{mode}" + (f"-p{count}" if count else "")

        def compute() -> dict[str, Any]:
            models = merged(base, count or PROXIES)
            right, decisions = _test(suite, models, rank, mode, decisions=seed == 0)
            test = keep(right, results, f"{name}-{seed}")
            return {"test": test, "decisions": decisions, "scale": models["scale"], "rank": rank}

        return name, compute

    for base, rank, mode in product(bases, RANKS, ("oracle", *ROUTERS)):
        yield row(base, rank, mode)
    for count, mode in product(counts if BASES[-1] in bases else (), ("oracle", *ROUTERS)):
        yield row(BASES[-1], RANKS[-1], mode, count)


def _merged(
    suite: Suite, base: str, work: Path, results: Path, seed: int, count: int
) -> dict[str, Any]:
    """Put the merged base into the suite's model; return the statistics of experts and of it."""
    files = collect_statistics(suite, work, seed, count)
    full = collect_statistics(suite, work, seed)
    row = merge_row(suite, ROWS[base], work, seed, full)
    scale = json.loads((results / f"{base}-0.json").read_text())["scale"]
    seen: dict[str, Any] = {}
    set_parameters(suite.model, row.base, row.deltas, scale)
    for task in suite.tasks:
        file = work / "statistics" / f"merged-{suite.name}-{base}-{count}-{seed}-{task}.safetensors"
        file.unlink(missing_ok=True)
        collect_on(suite, task, suite.proxies(task, seed, count), file, gradients=False)
        seen[task] = load_statistics(file)
    return {
        "experts": {task: load_statistics(file) for task, file in files.items()},
        "merged": seen,
        "row": row,
        "scale": scale,
    }


def _test(
    suite: Suite, merged: dict[str, Any], rank: int, mode: str, decisions: bool
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Test outcomes, and for a router the share of `decisions` that are right, layer by layer."""
    set_parameters(suite.model, merged["row"].base, merged["row"].deltas, merged["scale"])
    router: Any = "discriminant" if mode == "oracle" else mode
    model = eutectic.build_routed(
        suite.model,
        experts={task: _state(folder) for task, folder in suite.experts.items()},
        statistics=merged["experts"],
        router_statistics=merged["merged"] if router == "discriminant" else None,
        rank=rank,
        router=router,
    )
    right: dict[str, Tensor] = {}
    layers: dict[str, dict[str, float]] = {}
    for index, task in enumerate(suite.tasks):
        if mode == "oracle":
            with eutectic.routing(model, mode="oracle", expert=task):
                right[task] = correct(suite, model, task, "test")
        else:
            right[task] = correct(suite, model, task, "test")
            if decisions:
                layers[task] = _decisions(suite, model, task, index)
    return right, layers


def _decisions(suite: Suite, model: Any, task: str, index: int) -> dict[str, float]:
    """Share of a task's validation examples sent to their own expert, layer by layer."""
    # Here, since every command of a suite imports this file, and it takes torch's compiler along.
    from eutectic.routed import routing_accuracy

    right: dict[str, int] = {}
    seen = 0
    for inputs in suite.splits[task]["validation"].inputs:
        size = len(next(iter(inputs.values())))
        with torch.inference_mode(), eutectic.routing(model, record=True) as decisions:
            model(**inputs)
        shares = routing_accuracy(decisions, torch.full((size,), index))
        for layer, share in shares.items():
            right[layer] = right.get(layer, 0) + share * size
        seen += size
    return {layer: value / seen for layer, value in right.items()}


def _state(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
