"""Inputs for the tests of matching: deltas, statistics of every kind, a plain dense solution."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics, Merged

OUT, IN, EXPERTS = 5, 7, 3
MATRIX_OPERATORS = ("gram", "kfac", "diagonal_fisher", "block", "task_gram", "identity")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(rows: int, n: int, seed: int) -> Tensor:
    x = randn(rows, n, seed=seed)
    return x.T @ x


def collect(
    experts: int = EXPERTS, out: int = OUT, n: int = IN, rows: int = 60, seed: int = 0
) -> list[LayerStatistics]:
    """Return random statistics of every kind, with another count for each expert."""
    return [
        LayerStatistics(
            gram=gram(rows + 20 * t, n, seed + t),
            count=rows + 20 * t,
            output_gradient_gram=gram(rows + 20 * t, out, seed + 50 + t),
            fisher_diagonal=randn(out, n, seed=seed + 70 + t).square() + 0.1,
            block_fisher=gram(3 * out * n, out * n, seed + 90 + t),
            sample_count=10 + t,
        )
        for t in range(experts)
    ]


def mats(deltas: Tensor, statistics: object = None, **options: object) -> Merged:
    return merge_matrices("mats", deltas, statistics=statistics, full_output=True, **options)  # type: ignore[arg-type]


def converged(deltas: Tensor, statistics: object = None, **options: object) -> Tensor:
    options = {"damping": 0.0, "trust": 1e9, **options}
    merged = mats(deltas, statistics, iterations=3000, tolerance=1e-7, **options)
    assert merged.record["status"] == "converged"
    return merged.delta


def dense_solution(operator: str, deltas: Tensor, statistics: list[LayerStatistics]) -> Tensor:
    """Solve the vectorised system in float64, as plainly as it can be written."""
    out, n = deltas.shape[1:]
    total = torch.zeros(out * n, out * n, dtype=torch.float64)
    right = torch.zeros(out * n, dtype=torch.float64)
    eye = torch.eye(out, dtype=torch.float64)
    for s, delta in zip(statistics, deltas.double(), strict=True):
        task = delta.T @ delta / delta.norm() ** 2
        operators = {
            "gram": lambda s=s: torch.kron(eye, s.gram.double() / s.count),
            "kfac": lambda s=s: torch.kron(
                s.output_gradient_gram.double() / s.count, s.gram.double() / s.count
            ),
            "diagonal_fisher": lambda s=s: torch.diag(
                s.fisher_diagonal.double().flatten() / s.sample_count
            ),
            "block": lambda s=s: s.block_fisher.double() / s.sample_count,
            "task_gram": lambda task=task: torch.kron(eye, task),
            "identity": lambda: torch.eye(out * n, dtype=torch.float64),
        }
        C = operators[operator]()
        total += C
        right += C @ delta.flatten()
    return torch.linalg.solve(total, right).view(out, n)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    assert float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
