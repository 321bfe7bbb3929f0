"""ESM from a statistics file against the same mathematics by SVD of the activation shifts.

    python benchmarks/essential.py [--repeats 3] [--threads 2] [--shapes 2304x768 …]

One layer set of ViT-B/32 (attention in-projection and both MLP matrices), eight experts, 1600 proxy
tokens each. The reference takes thin float32 SVDs, as the published code does. Ours starts from
Grams, and from what a file holds: the Gram, or the triangular factor of fewer tokens than inputs.
The sides run in turn; printed are the median and range of the pairs' ratios of wall time, how far
the results are apart, and what of our time the two polar factors of the last step take, which any
route to the result has to pay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from eutectic.linalg.polar import polar
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

SHAPES = [(2304, 768), (3072, 768), (768, 3072)]
EXPERTS, TOKENS = 8, 1600


def problem(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Return deltas and inputs with decaying spectra and a mean, as real layers have."""
    g = torch.Generator().manual_seed(out_features + in_features)

    def decaying(rows: int, columns: int) -> Tensor:
        r = min(rows, columns)
        left = torch.randn(rows, r, generator=g) * torch.arange(1, r + 1).pow(-0.6)
        return left @ torch.randn(r, columns, generator=g) / r**0.5

    deltas = torch.stack([1e-3 * decaying(out_features, in_features) for _ in range(EXPERTS)])
    inputs = [
        decaying(TOKENS, in_features) + torch.randn(in_features, generator=g)
        for _ in range(EXPERTS)
    ]
    return deltas, torch.stack(inputs)


def fused(deltas: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return E_* and C_* of the ViT preset, by float32 SVDs of X Δᵀ."""
    experts, out_features, _ = deltas.shape
    k = out_features // experts
    norms = deltas.flatten(1).norm(dim=1)
    left, right = [], []
    for t, (delta, X) in enumerate(zip(deltas, inputs, strict=True)):
        _, S, Vh = torch.linalg.svd(X @ delta.T, full_matrices=False)
        E, values = Vh[:k].T, S[:k] ** 2
        scales = (values / values.mean()) ** 0.15
        scales = scales / scales.mean()
        left.append(E * scales)
        right.append((E.T @ delta) * (norms[t] / norms.mean()) ** 2 * scales[:, None])
    columns = torch.cat(right)
    lengths = columns.norm(dim=0)
    return torch.cat(left, 1), columns * (lengths / lengths.mean()) ** 2


def by_svd(deltas: Tensor, inputs: Tensor) -> Tensor:
    """ESM by SVDs from one end to the other."""
    left, columns = fused(deltas, inputs)
    return 2 * flattened(left) @ flattened(columns)


def flattened(matrix: Tensor) -> Tensor:
    """Return mean(σ) · U Vᵀ."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return S.mean() * (U @ Vh)


def stored(X: Tensor) -> LayerStatistics:
    """Return what a statistics file holds of these inputs."""
    tokens, in_features = X.shape
    if tokens < in_features:
        return LayerStatistics(gram_factor=torch.linalg.qr(X).R, count=tokens)
    return LayerStatistics(gram=X.T @ X, count=tokens)


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--shapes",
        nargs="*",
        type=lambda text: tuple(int(side) for side in text.split("x")),
        metavar="OUTxIN",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| shape | from | ours s | SVD s | SVD / ours | polar factors alone | difference |")
    print("|---|---|---|---|---|---|---|")
    measured = [measure(*shape, options.repeats) for shape in options.shapes or SHAPES]
    whole = {name: [sum(run) for run in zip(*(m[name] for m in measured), strict=True)]
             for name in ("Grams", "file", "SVD")}  # fmt: skip
    for name in ("Grams", "file"):
        print(f"| all | {name} | | | {ratio(whole['SVD'], whole[name])} | | |")


def measure(out_features: int, in_features: int, repeats: int) -> dict[str, list[float]]:
    """Print the rows of one shape and return all times."""
    deltas, inputs = problem(out_features, in_features)
    sources = {
        "Grams": [LayerStatistics(gram=X.T @ X, count=TOKENS) for X in inputs],
        "file": [stored(X) for X in inputs],
    }
    left, columns = fused(deltas, inputs)
    expected = by_svd(deltas, inputs)
    runs: dict[str, Callable[[], object]] = {
        "Grams": lambda: merge_matrices("esm", deltas, statistics=sources["Grams"]),
        "file": lambda: merge_matrices("esm", deltas, statistics=sources["file"]),
        "SVD": lambda: by_svd(deltas, inputs),
        "polar": lambda: (polar(left), polar(columns)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, source in sources.items():
        result = merge_matrices("esm", deltas, statistics=source)
        distance = float((result - expected).norm() / expected.norm())
        print(
            f"| {out_features}×{in_features} | {name} | {medians[name]:.2f} | {medians['SVD']:.2f} "
            f"| {ratio(times['SVD'], times[name])} "
            f"| {100 * medians['polar'] / medians[name]:.0f} % | {distance:.0e} |",
            flush=True,
        )
    return times


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Return the median and the range of the pairs' ratios."""
    ratios = sorted(t / o for t, o in zip(theirs, ours, strict=True))
    return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f})"


if __name__ == "__main__":
    main()
