"""Matrices with a known spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.linalg.lowrank import LowRank


def with_spectrum(out: int, inner: int, values: Tensor, seed: int = 0) -> Tensor:
    """Return U diag(values) Vᵀ `[out, in]` in float64 with random orthonormal U and V."""
    generator = torch.Generator().manual_seed(seed)

    def basis(side: int) -> Tensor:
        full = torch.randn(side, len(values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(full).Q

    return (basis(out) * values) @ basis(inner).T


def power_law(n: int, exponent: float = 1.0) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def geometric(n: int, condition: float) -> Tensor:
    return condition ** -torch.linspace(0, 1, n, dtype=torch.float64)


def clustered(n: int) -> Tensor:
    """Four groups of nearly equal values, a factor of 3 apart."""
    jitter = 1 + 1e-6 * torch.arange(n, dtype=torch.float64) / n
    return 3.0 ** -(4 * torch.arange(n) // n).double() * jitter


def repeated(n: int) -> Tensor:
    """Groups of exactly equal values."""
    return 2.0 ** -(4 * torch.arange(n) // n).double()


SPECTRA = {
    "power": power_law,
    "flat": lambda n: 1 - 0.1 * torch.arange(n, dtype=torch.float64) / n,
    "equal": lambda n: torch.ones(n, dtype=torch.float64),
    "clustered": clustered,
    "repeated": repeated,
    "condition 1e6": lambda n: geometric(n, 1e6),
    "condition 1e12": lambda n: geometric(n, 1e12),
    "deficient": lambda n: power_law(n, 0.5) * (torch.arange(n) < max(1, n // 3)),
}


def lora_sum(experts: int, out: int, inner: int, *, rank: int) -> LowRank:
    """Return the sum of random LoRA updates of several experts, as factors side by side."""
    generator = torch.Generator().manual_seed(8)
    return LowRank(
        torch.randn(out, experts * rank, generator=generator) * 1e-3,
        torch.randn(experts * rank, inner, generator=generator),
    )


def distance(ours: Tensor, reference: Tensor) -> float:
    """Return the relative Frobenius distance."""
    difference = torch.linalg.norm(ours.double() - reference.double())
    return float(difference / torch.linalg.norm(reference.double()).clamp_min(1e-300))
