"""Merging adapters through their core against their expanded deltas, in pairs.

    python benchmarks/core_space.py [--layers q,gate] [--pairs 3] [--output STEM]

Eighteen adapters of unequal rank (4 to 32) on the layers of a Llama of one billion parameters, with
random weights. Each form runs in a process of its own, so that its peak memory is its own: in the
first the method gets thin factors, in the second their products, which are formed there too, as an
engine without factors would. The table has the ratio of times (median of the pairs) and of peaks
above the bare interpreter, and how far the results are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from eutectic.execution.executors import peak_bytes
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

LAYERS = {"k": (512, 2048), "q": (2048, 2048), "gate": (8192, 2048), "down": (2048, 8192)}
RANKS = (4, 8, 16, 32, 8, 16) * 3
METHODS: dict[str, dict[str, Any]] = {
    "iso_c": {},
    "iso_cts": {},
    "tsv_m": {},
    "knots_ties": {},
    "core_ties": {},
    "iso_a": {},
    "esm": {"preset": "none"},
    "mats": {"iterations": 10},
}
TOKENS = 4096
SLACK = 8_000_000  # bytes that the allocator holds already: what is below cannot be told


def adapters(shape: tuple[int, int]) -> LowRankStack:
    """Return adapters whose singular values fall off, as trained ones' do."""
    generator = torch.Generator().manual_seed(0)
    left, right = [], []
    for rank in RANKS:
        sizes = 0.9 ** torch.arange(rank)
        left.append(torch.randn(shape[0], rank, generator=generator) * sizes / shape[0] ** 0.5)
        right.append(torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5)
    return LowRankStack(tuple(left), tuple(right))


def grams(stack: LowRankStack) -> list[LayerStatistics]:
    """Return, per adapter, a Gram between the rows of all: what `collect --for` keeps."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat(stack.right).double()
    basis = torch.linalg.qr(rows.mT).Q
    found: list[LayerStatistics] = []
    for _ in stack.right:
        sizes = torch.linspace(2, 0.2, basis.shape[1], dtype=torch.float64)
        mixed = torch.randn(len(sizes), len(sizes), generator=generator, dtype=torch.float64)
        factor = (mixed * sizes) @ basis.mT
        found.append(LayerStatistics(gram_factor=factor, count=TOKENS))
    return found


def run(form: str, method: str, layer: str, result: Path) -> None:
    """Merge once, and write seconds, peak bytes and the result."""
    torch.set_num_threads(1)
    stack = adapters(LAYERS[layer])
    more = dict(METHODS[method])
    if method in ("iso_a", "esm", "mats"):
        more["statistics"] = grams(stack)
    before = peak_bytes()
    started = time.perf_counter()
    deltas = stack if form == "thin" else stack.dense()
    merged = merge_matrices(method, deltas, **more)
    seconds = time.perf_counter() - started
    peak = peak_bytes() - before
    torch.save({"seconds": seconds, "peak": peak, "merged": merged}, result)


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="q")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        form, method, layer, result = options.one
        run(form, method, layer, Path(result))
        return
    rows: list[dict[str, Any]] = []
    for layer in options.layers.split(","):
        for method in options.methods.split(","):
            rows.append(pair(method, layer, options.pairs))
            print(line(rows[-1]), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def pair(method: str, layer: str, pairs: int) -> dict[str, Any]:
    """Run both forms in turn."""
    import tempfile

    found: dict[str, list[dict[str, Any]]] = {"thin": [], "expanded": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(pairs):
            for form, own in found.items():
                path = Path(folder) / f"{form}.pt"
                words = [sys.executable, __file__, "--one", form, method, layer, str(path)]
                subprocess.run(words, check=True)
                own.append(torch.load(path, weights_only=True))
    thin, whole = found["thin"], found["expanded"]
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(thin, whole, strict=True)]
    apart = (thin[0]["merged"].double() - whole[0]["merged"].double()).norm()
    return {
        "method": method,
        "layer": layer,
        "shape": LAYERS[layer],
        "faster": statistics.median(ratios),
        "faster_range": [min(ratios), max(ratios)],
        "thin_seconds": statistics.median(r["seconds"] for r in thin),
        "peak_ratio": whole[0]["peak"] / max(thin[0]["peak"], SLACK),
        "thin_peak": thin[0]["peak"],
        "error": float(apart / whole[0]["merged"].double().norm()),
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as Markdown."""
    out, inner = row["shape"]
    return (
        f"| {row['method']} | {out}×{inner} | {row['faster']:.1f} | {row['thin_seconds']:.2f} s | "
        f"{row['peak_ratio']:.1f} | {row['thin_peak'] / 1e6:.0f} MB | {row['error']:.1e} |"
    )


if __name__ == "__main__":
    main()
