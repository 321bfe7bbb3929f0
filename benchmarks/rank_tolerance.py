"""Where the rounding of a sum of task matrices ends, and where its directions begin.

    python benchmarks/rank_tolerance.py [--sides 384,768,2048] [--output FILE.json]

Sums of full rank (Gaussian deltas: the smallest singular values that occur), and sums of eight LoRA
adapters of rank 16 in three forms: products of factors in float32, as an engine expands them, and
full float32 checkpoints W₀ + Δ from which W₀ is taken off again, with Δ 10, 1 and 0.1 % of
W₀. The singular values, in float64, are told relative to the first, in units of eps of float32: the
smallest that is a direction, the largest that is rounding, and how many of each lie on the wrong
side of a tolerance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
EXPERTS, RANK = 8, 16
TOLERANCES = {
    "max(out, in)": lambda out, width: max(out, width),
    "128": lambda out, width: min(128, max(out, width)),
}


def sums(side: int, seed: int) -> dict[str, tuple[Tensor, int]]:
    """Return kind -> sum `[side, side]` in float32 and its true rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = normal(side, side) / side**0.5
    full = sum((normal(side, side) for _ in range(EXPERTS)), torch.zeros(side, side))
    decay = 0.9 ** torch.arange(RANK)
    factors = [(normal(side, RANK) * decay, normal(RANK, side) / side) for _ in range(EXPERTS)]
    deltas = torch.stack([left @ right for left, right in factors])
    found = {"full rank": (full, side), "adapters": (deltas.sum(0), EXPERTS * RANK)}
    for share in (0.1, 0.01, 0.001):
        scale = share * base.norm() / deltas[0].norm()
        moved = torch.stack([(base + scale * d) - base for d in deltas])
        found[f"checkpoints, {share:g} of W₀"] = (moved.sum(0), EXPERTS * RANK)
    return found


def measure(side: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each kind of sum."""
    rows: list[dict[str, Any]] = []
    for kind, (total, rank) in sums(side, seed).items():
        values = torch.linalg.svdvals(total.double())
        relative = values / values[0] / EPS
        row: dict[str, Any] = {"side": side, "seed": seed, "kind": kind, "rank": rank}
        row["smallest direction"] = float(relative[rank - 1])
        row["largest rounding"] = float(relative[rank]) if rank < side else None
        for name, units in TOLERANCES.items():
            kept = int((relative > units(side, side)).sum())
            row[name] = {"units": units(side, side), "kept": kept, "wrong": kept - rank}
        rows.append(row)
    return rows


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", default="384,768,2048")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for side in map(int, options.sides.split(",")):
        for seed in range(options.seeds if side < 1024 else 1):
            for row in measure(side, seed):
                rows.append(row)
                print(json.dumps(row, ensure_ascii=False), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
