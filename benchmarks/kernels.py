"""Spectral methods against a textbook implementation, in interleaved pairs.

    python benchmarks/kernels.py [--quick] [--output STEM] [--threads 2] [--pairs N]
        [--only METHOD:OUTxIN]
    python benchmarks/kernels.py --crossover    # routes of the polar factor, and where they cross

The textbook is written below with plain `torch.linalg.svd` in float32, T + 1 or T + 3 times per
matrix as the official codes do. Ours and the textbook alternate, so that a busy machine troubles
both; the table gives the median of the pairs' ratios and their range. One matrix product
`[out, in]·[in, min(out, in)]` in float32 is timed beside each pair as a unit of cost. More tables
show what the building blocks cost in that unit, which says how far a target can be reached at all,
and how time grows with the side and with the number of experts. `--output` writes all of it to
STEM.md and STEM.json. A full run takes about ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.linalg.gram import gram
from eutectic.linalg.polar import HALLEY_SIDE, Route, polar
from eutectic.methods import merge_matrices
from eutectic.methods.isotropic import split_spectrum

EXPERTS = 8
SPECTRA = ("power", "flat")


@dataclass(frozen=True)
class Case:
    """One row of the table: what is merged."""

    method: str
    out: int
    inner: int
    spectrum: str
    experts: int = EXPERTS
    target: float | None = None


@dataclass(frozen=True)
class Row:
    """One measured row."""

    case: Case
    pairs: int
    ratio: float
    ratio_low: float
    ratio_high: float
    ours_seconds: float
    textbook_seconds: float
    ours_products: float
    textbook_products: float
    relative_difference: float


def textbook_iso_c(deltas: Tensor) -> Tensor:
    """Iso-C by one thin SVD."""
    U, S, Vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    return S.mean() * U @ Vh


def textbook_iso_cts(deltas: Tensor, fraction: float = 0.8) -> Tensor:
    """Iso-CTS by T + 3 thin SVDs."""
    c, k = split_spectrum(min(deltas.shape[1:]), fraction, len(deltas))
    U, S, Vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    common = U[:, :c]
    blocks = []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta - common @ (common.T @ delta), full_matrices=False)
        blocks.append((u[:, :k], s[:k], vh[:k]))
    blocks.append((common, S[:c], Vh[:c]))
    return _textbook_assemble(blocks, flat=True)


def textbook_tsv_m(deltas: Tensor) -> Tensor:
    """TSV-M by T + 2 thin SVDs."""
    k = min(deltas.shape[1:]) // len(deltas)
    blocks = []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        blocks.append((u[:, :k], s[:k], vh[:k]))
    return _textbook_assemble(blocks, flat=False)


def _textbook_assemble(blocks: list[tuple[Tensor, Tensor, Tensor]], flat: bool) -> Tensor:
    u, _, vh = torch.linalg.svd(torch.cat([b[0] for b in blocks], 1), full_matrices=False)
    left = u @ vh
    u, _, vh = torch.linalg.svd(torch.cat([b[2] for b in blocks], 0), full_matrices=False)
    S = torch.cat([b[1] for b in blocks])
    return (left * (S.mean() if flat else S)) @ (u @ vh)


TEXTBOOK = {"iso_c": textbook_iso_c, "iso_cts": textbook_iso_cts, "tsv_m": textbook_tsv_m}


@functools.lru_cache(maxsize=1)
def make_deltas(out: int, inner: int, spectrum: str, experts: int) -> Tensor:
    """Return `[T, out, in]` task matrices with the named spectrum and a shared part.

    "power": s_i = i^-0.7; "flat": s_i from 1 to 0.8. A third of the energy is common to all
    experts, as in fine-tuned models.
    """
    generator = torch.Generator().manual_seed(7)
    n = min(out, inner)
    index = torch.arange(1, n + 1, dtype=torch.float32)
    S = index**-0.7 if spectrum == "power" else 1 - 0.2 * index / n

    def draw() -> Tensor:
        left = torch.linalg.qr(torch.randn(out, n, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(inner, n, generator=generator)).Q
        return (left * S) @ right.T

    shared = draw()
    return torch.stack([0.58 * shared + 0.81 * draw() for _ in range(experts)])


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, pairs: int) -> Row:
    """Time `pairs` interleaved pairs of one case."""
    deltas = make_deltas(case.out, case.inner, case.spectrum, case.experts)
    square = torch.randn(case.inner, min(case.out, case.inner))
    ours: list[float] = []
    textbook: list[float] = []
    products: list[float] = []
    results: dict[str, Tensor] = {}

    def run_ours() -> None:
        # The textbook flattens every direction; so do we here, to compare like with like.
        full: dict[str, Any] = {} if case.method == "tsv_m" else {"support": "full"}
        results["ours"] = merge_matrices(case.method, deltas, **full)

    def run_textbook() -> None:
        results["textbook"] = TEXTBOOK[case.method](deltas)

    for _ in range(pairs):
        products.append(min(seconds(lambda: deltas[0] @ square) for _ in range(3)))
        ours.append(seconds(run_ours))
        textbook.append(seconds(run_textbook))
    ratios = [t / o for o, t in zip(ours, textbook, strict=True)]
    difference = (results["ours"] - results["textbook"]).norm() / results["textbook"].norm()
    unit = statistics.median(products)
    return Row(
        case=case,
        pairs=pairs,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        ours_seconds=statistics.median(ours),
        textbook_seconds=statistics.median(textbook),
        ours_products=statistics.median(ours) / unit,
        textbook_products=statistics.median(textbook) / unit,
        relative_difference=float(difference),
    )


def cases(quick: bool) -> list[Case]:
    """Return the rows of the table: growth with T and with size first, then the targets.

    Rows that share their task matrices follow each other.
    """
    methods = tuple(TEXTBOOK)
    if quick:
        rows = [Case(m, 96, 96, "power", experts=t) for t in (2, 4, 16) for m in methods]
        rows += [Case(m, n, n, "power") for n in (96, 192) for m in methods]
        shapes = [(s, (192, 768)) for s in SPECTRA] + [(s, (576, 192)) for s in SPECTRA]
        return rows + [Case(m, *shape, spectrum) for spectrum, shape in shapes for m in methods]
    rows = [Case(m, 768, 768, "power", experts=t) for t in (2, 4, 16) for m in methods]
    rows += [Case(m, n, n, "power") for n in (256, 512, 1024) for m in methods]
    for spectrum in SPECTRA:
        rows += [Case(m, 768, 768, spectrum, target=2 if m == "iso_c" else None) for m in methods]
        rows.append(Case("iso_c", 3072, 768, spectrum, target=2))
        rows += [Case(m, 768, 3072, spectrum, target=2 if m == "iso_c" else 4) for m in methods]
        rows += [Case(m, 2304, 768, spectrum, target=4) for m in ("iso_cts", "tsv_m")]
    for spectrum in SPECTRA:
        rows += [Case(m, 2048, 2048, spectrum, target=4 if m == "iso_c" else 8) for m in methods]
    return [*rows, Case("iso_c", 4096, 4096, "power", target=4)]


def pair_count(case: Case, asked: int | None) -> int:
    """Return how many pairs a case gets: fewer where the textbook takes long."""
    if asked is not None:
        return asked
    side = min(case.out, case.inner)
    if side < 2048:
        return 5 if case.out != case.inner or side < 1024 else 3
    return 1 if side > 2048 else 3 if case.method == "iso_c" else 2


def unit_costs(side: int) -> dict[str, float]:
    """Return what the building blocks cost at one side, in float32 products of that side."""
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(3))
    narrow = x.T @ x / side + 0.1 * torch.eye(side)
    wide = narrow.double()
    blocks: dict[str, Callable[[], object]] = {
        "float32 SVD": lambda: torch.linalg.svd(x, full_matrices=False),
        "float64 eigh": lambda: torch.linalg.eigh(wide),
        "float32 eigh": lambda: torch.linalg.eigh(narrow),
        "float64 Gram": lambda: gram(x),
        "float64 Cholesky": lambda: torch.linalg.cholesky(wide),
        "float32 Cholesky inverse": lambda: torch.cholesky_inverse(torch.linalg.cholesky(narrow)),
    }
    repeats = 5 if side < 2048 else 2

    def best(run: Callable[[], object]) -> float:
        return min(seconds(run) for _ in range(repeats))

    unit = best(lambda: x @ x)
    return {name: best(run) / unit for name, run in blocks.items()}


def unit_table(costs: dict[int, dict[str, float]]) -> str:
    """Return the costs of the building blocks as a Markdown table."""
    names = list(next(iter(costs.values())))
    lines = [f"| products at side | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for side, values in costs.items():
        lines.append(f"| {side} | {' | '.join(f'{values[name]:.1f}' for name in names)} |")
    return "\n".join(lines)


def crossover(sides: Sequence[int]) -> None:
    """Print what both routes of the polar factor cost in CPU time, and the fixed rule's loss.

    The route tried first does not depend on a timing, since its result's last bits would: from
    `HALLEY_SIDE` on it is `halley`, which declines what is not nearly flat in favour of `gram`.
    """
    print("| shape | spectrum | taken | halley ms | gram ms | rule / best |\n|" + "---|" * 6)
    for side in sides:
        for shape in ((side, side), (4 * side, side)):
            for spectrum in SPECTRA:
                generator = torch.Generator().manual_seed(side)
                matrix = torch.randn(shape, generator=generator)
                if shape[0] == side:  # a square Gaussian is far from flat
                    matrix = torch.linalg.qr(matrix).Q
                if spectrum == "power":
                    matrix = matrix * torch.arange(1, side + 1) ** -0.5
                own: dict[Route, list[float]] = {"halley": [], "gram": []}
                taken = ""
                for _ in range(5 if side <= 512 else 2 if side <= 1024 else 1):
                    for route in own:
                        start = time.thread_time()
                        found = polar(matrix, route=route)
                        own[route].append(time.thread_time() - start)
                        taken = found.route if route == "halley" else taken
                best = {route: 1000 * min(times) for route, times in own.items()}
                rule = best["halley" if side >= HALLEY_SIDE else "gram"]
                cells = [f"{best[r]:.1f}" for r in own] + [f"{rule / min(best.values()):.2f}"]
                row = f"| {shape[0]}×{shape[1]} | {spectrum} | {taken} "
                print(f"{row}| {' | '.join(cells)} |", flush=True)


def growth_table(rows: Sequence[Row]) -> str:
    """Return how seconds grow with the side (at T = 8) and with T, power-law spectra.

    The exponent p of time ~ n^p or T^p is that between the first and the last entry.
    """
    lines = ["| method | grows with | at | ours s | textbook s | exponents |", "|" + "---|" * 6]
    square = [row for row in rows if row.case.out == row.case.inner]
    square = [row for row in square if row.case.spectrum == "power"]
    for method in TEXTBOOK:
        own = [row for row in square if row.case.method == method]
        by_side = {row.case.out: row for row in own if row.case.experts == EXPERTS}
        counts = [row.case.out for row in own if row.case.experts != EXPERTS]
        by_count = {row.case.experts: row for row in own if row.case.out in counts}
        for name, series in (("side", by_side), ("T", by_count)):
            if len(series) < 2:
                continue
            at = sorted(series)
            cells = [method, name, ", ".join(map(str, at))]
            exponents: list[str] = []
            for attribute in ("ours_seconds", "textbook_seconds"):
                times = [float(getattr(series[x], attribute)) for x in at]
                cells.append(", ".join(f"{t:.3f}" for t in times))
                exponents.append(f"{math.log(times[-1] / times[0]) / math.log(at[-1] / at[0]):.1f}")
            lines.append(f"| {' | '.join(cells)} | {' and '.join(exponents)} |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "| method | shape | T | spectrum | ratio (range) | target | ours s | textbook s "
        "| ours, products | textbook, products | difference |\n|" + "---|" * 11
    )
    lines = [head]
    for row in rows:
        case = row.case
        goal = f"{case.target:g}" if case.target else ""
        lines.append(
            f"| {case.method} | {case.out}×{case.inner} | {case.experts} | {case.spectrum} "
            f"| {row.ratio:.1f} ({row.ratio_low:.1f}–{row.ratio_high:.1f}) | {goal} "
            f"| {row.ours_seconds:.3f} | {row.textbook_seconds:.3f} | {row.ours_products:.0f} "
            f"| {row.textbook_products:.0f} | {row.relative_difference:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--output", type=Path, help="stem of the .md and .json to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="pairs per case")
    parser.add_argument("--only", help="method:OUTxIN, to run a part of the table")
    parser.add_argument("--crossover", action="store_true", help="routes of the polar factor")
    parser.add_argument("--sides", default="64,128,256,512,1024,2048", help="of --crossover")
    arguments = parser.parse_args()
    if arguments.crossover:
        torch.set_num_threads(1)  # as each task of a merge has
        crossover([int(side) for side in arguments.sides.split(",")])
        return
    torch.set_num_threads(arguments.threads)
    chosen = cases(arguments.quick)
    if arguments.only:
        method, _, shape = arguments.only.partition(":")
        chosen = [
            c for c in chosen if method in ("", c.method) and shape in ("", f"{c.out}x{c.inner}")
        ]
    costs = {side: unit_costs(side) for side in ((192,) if arguments.quick else (768, 2048))}
    print(unit_table(costs), "\n", flush=True)
    rows: list[Row] = []
    print(table([]))
    for case in chosen:
        rows.append(measure(case, pair_count(case, arguments.pairs)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + growth_table(rows))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join([table(rows), unit_table(costs), growth_table(rows)]) + "\n"
        arguments.output.with_suffix(".md").write_text(text)
        record = {
            "threads": arguments.threads,
            "torch": torch.__version__,
            "unit_costs": costs,
            "rows": [asdict(row) for row in rows],
        }
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
