"""Spectral methods against a textbook implementation, in interleaved pairs.

    python benchmarks/kernels.py [--quick] [--json FILE] [--threads 2] [--pairs N]
        [--only METHOD:OUTxIN]

The textbook is written below with plain `torch.linalg.svd` in float32, T + 1 or T + 3 times per
matrix as the official codes do. Ours and the textbook alternate, so that a busy machine troubles
both; the table gives the median of the pairs' ratios and their range. One matrix product
`[out, in]·[in, min(out, in)]` in float32 is timed beside each pair as a unit of cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

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


def make_deltas(case: Case) -> Tensor:
    """Return `[T, out, in]` task matrices with the case's spectrum and a shared part.

    "power": s_i = i^-0.7; "flat": s_i from 1 to 0.8. A third of the energy is common to all
    experts, as in fine-tuned models.
    """
    generator = torch.Generator().manual_seed(7)
    n = min(case.out, case.inner)
    index = torch.arange(1, n + 1, dtype=torch.float32)
    S = index**-0.7 if case.spectrum == "power" else 1 - 0.2 * index / n

    def draw() -> Tensor:
        left = torch.linalg.qr(torch.randn(case.out, n, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(case.inner, n, generator=generator)).Q
        return (left * S) @ right.T

    shared = draw()
    return torch.stack([0.58 * shared + 0.81 * draw() for _ in range(case.experts)])


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, pairs: int) -> Row:
    """Time `pairs` interleaved pairs of one case."""
    deltas = make_deltas(case)
    square = torch.randn(case.inner, min(case.out, case.inner))
    ours: list[float] = []
    textbook: list[float] = []
    products: list[float] = []
    results: dict[str, Tensor] = {}

    def run_ours() -> None:
        # The textbook flattens every direction; so do we here, to compare like with like.
        full = {} if case.method == "tsv_m" else {"support": "full"}
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
    """Return the rows of the table: targets, growth with size, growth with T."""
    if quick:
        shapes = [(192, 192), (192, 768), (576, 192)]
        rows = [Case(m, *s, spectrum) for m in TEXTBOOK for s in shapes for spectrum in SPECTRA]
        return rows + [Case("tsv_m", 192, 192, "power", experts=t) for t in (2, 4, 16)]
    rows: list[Case] = []
    for spectrum in SPECTRA:
        for shape in ((768, 768), (3072, 768), (768, 3072)):
            rows.append(Case("iso_c", *shape, spectrum, target=2))
        for method in ("iso_cts", "tsv_m"):
            for shape in ((768, 3072), (2304, 768)):
                rows.append(Case(method, *shape, spectrum, target=4))
        rows.append(Case("iso_c", 2048, 2048, spectrum, target=4))
        for method in ("iso_cts", "tsv_m"):
            rows.append(Case(method, 2048, 2048, spectrum, target=8))
    rows.append(Case("iso_c", 4096, 4096, "power", target=4))
    rows += [Case(m, n, n, "power") for m in TEXTBOOK for n in (256, 512, 1024)]
    rows += [Case(m, 768, 768, "power", experts=t) for m in TEXTBOOK for t in (2, 4, 8, 16)]
    return rows


def pair_count(case: Case, asked: int | None) -> int:
    """Return how many pairs a case gets: fewer where one SVD takes a minute."""
    if asked is not None:
        return asked
    side = min(case.out, case.inner)
    return 1 if side >= 4096 else 3 if side >= 2048 else 5


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="pairs per case")
    parser.add_argument("--only", help="method:OUTxIN, to run a part of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = cases(arguments.quick)
    if arguments.only:
        method, _, shape = arguments.only.partition(":")
        chosen = [
            c for c in chosen if method in ("", c.method) and shape in ("", f"{c.out}x{c.inner}")
        ]
    rows: list[Row] = []
    print(table([]))
    for case in chosen:
        rows.append(measure(case, pair_count(case, arguments.pairs)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
