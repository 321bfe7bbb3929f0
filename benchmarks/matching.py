"""Matching against SciPy's conjugate gradients, in paired runs on one layer.

    python benchmarks/matching.py                 # 768×3072, 8 experts; about half an hour
    python benchmarks/matching.py --quick         # a small layer, seconds

Both sides go from the statistics in memory to the merged matrix. The other side is the published
procedure: tensors flattened through NumPy into `scipy.sparse.linalg.cg` over a `LinearOperator`,
Grams of the forward-only system summed beforehand; in float32 as published, and in float64 (NumPy's
own) where `--dtypes` says so. Runs alternate; ratios of CPU time are reported, which a busy machine
leaves alone. The Grams come from tokens whose covariance has a power-law spectrum, common up to a
random factor per direction and expert. With `--tokens` below the number of inputs our side gets the
triangular factor that the statistics hold then, the other the Gram.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from eutectic.methods import merge_matrices
from eutectic.statistics.gram import triangular_factor
from eutectic.types import LayerStatistics, Merged

TOLERANCE = 1e-5
SCALE = 0.3


class Layer:
    """The deltas, base and statistics of one layer."""

    def __init__(
        self, out: int, inputs: int, experts: int, power: float, tokens: int | None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.deltas = 0.01 * torch.randn(experts, out, inputs, generator=generator)
        self.base = 0.05 * torch.randn(out, inputs, generator=generator)
        rows = tokens or 2 * inputs
        self.factors = _tokens(inputs, experts, power, generator, rows)
        self.input_grams = [x.T @ x for x in self.factors]
        self.output_grams = [x.T @ x for x in _tokens(out, experts, power, generator, rows)]

        self.triangles = [
            triangular_factor(x.double()).float() if len(x) < inputs else None for x in self.factors
        ]

    def statistics(self) -> list[LayerStatistics]:
        """Return the Grams as statistics files hold them."""
        return [
            LayerStatistics(
                gram=a if triangle is None else None,
                gram_factor=triangle,
                output_gradient_gram=h,
                count=1,
            )
            for triangle, a, h in zip(
                self.triangles, self.input_grams, self.output_grams, strict=True
            )
        ]


def _tokens(
    size: int, experts: int, power: float, generator: torch.Generator, rows: int
) -> list[Tensor]:
    spectrum = torch.arange(1, size + 1) ** -power
    mirrors = torch.nn.functional.normalize(torch.randn(4, size, generator=generator), dim=1)
    inputs: list[Tensor] = []
    for _ in range(experts):
        own = spectrum * torch.exp(0.5 * torch.randn(size, generator=generator))
        tokens = torch.randn(rows, size, generator=generator) * (own / own.mean()).sqrt()
        for mirror in mirrors:
            tokens -= 2 * torch.outer(tokens @ mirror, mirror)
        inputs.append(tokens / rows**0.5)
    return inputs


def scipy_route(
    layer: Layer, operator: str, iterations: int, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Return the merged delta and the number of matrix-vector products of the published way."""
    grams = [gram.to(dtype) for gram in layer.input_grams]
    outputs = [gram.to(dtype) for gram in layer.output_grams]
    weights = [(layer.base + delta).T.to(dtype) for delta in layer.deltas]
    start = (layer.base + SCALE * layer.deltas.sum(0)).T.to(dtype)
    kfac = operator == "kfac"
    right = sum(
        a @ w @ h if kfac else a @ w for a, w, h in zip(grams, weights, outputs, strict=True)
    )
    assert isinstance(right, Tensor)
    shape = right.shape
    summed = None if kfac else torch.stack(grams).sum(0)
    products = 0

    def multiply(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        x = torch.from_numpy(vector).reshape(shape).to(dtype)
        if summed is not None:
            return (summed @ x).flatten().numpy()
        total = torch.zeros(shape, dtype=dtype)
        for a, h in zip(grams, outputs, strict=True):
            total += a @ x @ h
        return total.flatten().numpy()

    linear = LinearOperator((right.numel(), right.numel()), matvec=multiply)
    b, x0 = right.flatten().numpy(), start.flatten().numpy()
    solution, _ = cg(linear, b, x0=x0, rtol=TOLERANCE, maxiter=iterations)
    for vector in (x0, solution):  # it logs the first and the last error
        np.linalg.norm(multiply(vector) - b)
    return torch.from_numpy(solution).reshape(shape).T.float() - layer.base, products


def our_route(
    layer: Layer, operator: str, iterations: int, preconditioner: str, space: str
) -> Merged:
    """Return the merged delta with its record."""
    return merge_matrices(
        "mats",
        layer.deltas,
        base=layer.base,
        statistics=layer.statistics(),
        operator=operator,
        init_scale=SCALE,
        iterations=iterations,
        tolerance=TOLERANCE,
        preconditioner=preconditioner,
        damping=0.0,
        space=space,
        full_output=True,
    )


def residual(layer: Layer, operator: str, delta: Tensor) -> float:
    """Return ‖b − C(W)‖/‖b‖ in float64, the unknown being the weight."""
    error = torch.zeros_like(layer.base, dtype=torch.float64)
    right = torch.zeros_like(error)
    for a, h, own in zip(layer.input_grams, layer.output_grams, layer.deltas, strict=True):
        gap, weight = (own - delta).double() @ a.double(), (layer.base + own).double() @ a.double()
        error += h.double() @ gap if operator == "kfac" else gap
        right += h.double() @ weight if operator == "kfac" else weight
    return float(error.norm() / right.norm())


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Return the CPU seconds that a call took, and its result."""
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def compare(
    layer: Layer, operator: str, limit: int, preconditioner: str, repeats: int, dtype: torch.dtype
) -> dict[str, object]:
    """Alternate both routes; return the median ratio and what each delivered.

    To equal residual both stop by the published test, relative to the right side for weights.
    """
    space = "delta" if preconditioner == "none" else "weight"
    ours, theirs = [], []
    merged, delta, products = None, None, 0
    for _ in range(repeats):
        seconds, pair = timed(lambda: scipy_route(layer, operator, limit, dtype))
        theirs.append(seconds)
        delta, products = pair  # type: ignore[misc]
        seconds, merged = timed(lambda: our_route(layer, operator, limit, preconditioner, space))
        ours.append(seconds)
    assert isinstance(merged, Merged) and isinstance(delta, Tensor)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "system": "K-FAC" if operator == "kfac" else "forward-only",
        "preconditioner": preconditioner,
        "scipy_dtype": str(dtype).removeprefix("torch."),
        "limit": limit,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(ours),
        "scipy_seconds": statistics.median(theirs),
        "iterations": merged.record["iterations"],
        "scipy_products": products,
        "residual": residual(layer, operator, merged.delta),
        "scipy_residual": residual(layer, operator, delta),
        "difference": float((merged.delta - delta).norm() / delta.norm()),
    }


def curves(layer: Layer, limit: int) -> dict[str, list[float]]:
    """Return the residual after each iteration, per system and preconditioner."""
    return {
        f"{name}, {preconditioner}": our_route(
            layer, operator, limit, preconditioner, "weight"
        ).record["residuals"]
        for operator, name in (("gram", "forward-only"), ("kfac", "K-FAC"))
        for preconditioner in ("none", "jacobi", "kronecker")
    }


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| system | preconditioner | limit | ours: steps, residual, CPU s "
        "| SciPy: dtype, products, residual, CPU s | faster by | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            "| {system} | {preconditioner} | {limit} "
            "| {iterations}, {residual:.1e}, {seconds:.2f} "
            "| {scipy_dtype}, {scipy_products}, {scipy_residual:.1e}, {scipy_seconds:.2f} "
            "| {ratio:.2f}× | {difference:.1e} |".format(**row)
        )
    return "\n".join(lines)


def plot(data: dict[str, list[float]], path: Path) -> None:
    """Draw the curves, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, values in data.items():
        axes.semilogy(values, label=name, linestyle="-" if name.startswith("K") else "--")
    axes.axhline(TOLERANCE, color="grey", linewidth=0.5)
    axes.set_xscale("symlog")
    axes.set(xlabel="iterations", ylabel="relative residual", xlim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 3072), metavar=("OUT", "IN"))
    parser.add_argument("--curve-shape", type=int, nargs=2, default=(192, 384))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--iterations", type=int, nargs="+", default=(10, 100))
    parser.add_argument("--limit", type=int, default=3000, help="steps allowed to reach 1e-5")
    parser.add_argument("--power", type=float, default=1.0, help="exponent of the spectrum")
    parser.add_argument("--tokens", type=int, help="tokens per expert (default: 2·IN)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--dtypes", nargs="+", default=("float32",), choices=("float32", "float64"), help="SciPy's"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=("gram", "kfac"))
    parser.add_argument("--skip", nargs="*", default=(), choices=("same", "equal", "curves"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("build/matching"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.curve_shape = (96, 192), (48, 96)
    torch.set_num_threads(arguments.threads)
    layer = Layer(*arguments.shape, arguments.experts, arguments.power, arguments.tokens)

    rows: list[dict[str, object]] = []
    for operator in arguments.systems:
        if "same" not in arguments.skip:
            for limit, name in product(arguments.iterations, arguments.dtypes):
                dtype = getattr(torch, name)
                rows.append(compare(layer, operator, limit, "none", arguments.repeats, dtype))
        if "equal" not in arguments.skip:
            rows.append(compare(layer, operator, arguments.limit, "kronecker", 1, torch.float32))
    tokens = arguments.tokens or 2 * arguments.shape[1]
    print(f"{arguments.shape[0]}×{arguments.shape[1]}, T = {arguments.experts}, {tokens} tokens\n")
    print(table(rows))
    data: dict[str, list[float]] = {}
    if "curves" not in arguments.skip:
        small = Layer(*arguments.curve_shape, arguments.experts, arguments.power, None)
        data = curves(small, arguments.limit)
        print()
        for name, values in data.items():
            print(f"{name}: {values[-1]:.1e} after {len(values) - 1} iterations")
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    (arguments.output / "matching.json").write_text(
        json.dumps({"settings": settings, "rows": rows, "curves": data}, indent=1)
    )
    if data:
        plot(data, arguments.output / "matching.png")


if __name__ == "__main__":
    main()
