"""ESM from Grams against the same mathematics by SVD of the activation shifts.

    python benchmarks/essential.py [--repeats 3] [--threads 1] [--shapes 2304x768 …]

One layer set of ViT-B/32 (attention in-projection and both MLP matrices), eight experts, 1600 proxy
tokens each. The reference takes thin float32 SVDs, as the published code does; both sides run in
turn and the ratio of their CPU times is printed, with the distance between their results.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

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


def by_svd(deltas: Tensor, inputs: Tensor) -> Tensor:
    """The ViT preset of ESM by float32 SVDs of X Δᵀ and of the concatenated factors."""
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
    columns = columns * (lengths / lengths.mean()) ** 2
    return 2 * flattened(torch.cat(left, 1)) @ flattened(columns)


def flattened(matrix: Tensor) -> Tensor:
    """Return mean(σ) · U Vᵀ."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return S.mean() * (U @ Vh)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--shapes",
        nargs="*",
        type=lambda text: tuple(int(side) for side in text.split("x")),
        metavar="OUTxIN",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    total = {"grams": 0.0, "factors": 0.0, "svd": 0.0}
    for shape in options.shapes or SHAPES:
        deltas, inputs = problem(*shape)
        grams = [LayerStatistics(gram=X.T @ X, count=TOKENS) for X in inputs]
        factors = [LayerStatistics(gram_factor=X, count=TOKENS) for X in inputs]
        runs = {
            "grams": lambda d=deltas, s=grams: merge_matrices("esm", d, statistics=s),
            "factors": lambda d=deltas, s=factors: merge_matrices("esm", d, statistics=s),
            "svd": lambda d=deltas, x=inputs: by_svd(d, x),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        results = {}
        for _ in range(options.repeats):
            for name, run in runs.items():
                start = time.process_time()
                results[name] = run()
                times[name].append(time.process_time() - start)
        best = {name: min(values) for name, values in times.items()}
        for name, seconds in best.items():
            total[name] += seconds
        distance = (results["grams"] - results["svd"]).norm() / results["svd"].norm()
        print(
            f"{shape[0]}x{shape[1]}: grams {best['grams']:.2f} s, factors {best['factors']:.2f} s, "
            f"svd {best['svd']:.2f} s, ratio {best['svd'] / best['grams']:.1f}, "
            f"distance {distance:.1e}",
            flush=True,
        )
    print(
        f"layer set: ratio {total['svd'] / total['grams']:.1f} from Grams, "
        f"{total['svd'] / total['factors']:.1f} from factors"
    )


if __name__ == "__main__":
    main()
