"""Kinds that turn the inputs of a weight: W = W₀·Rᵀ with an orthogonal R."""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eutectic.checkpoint.peft_kinds.formulas import Formula, Layer, Parts, refuse


class Oft(BaseModel):
    """What OFT states."""

    model_config = ConfigDict(extra="ignore")

    oft_block_size: int | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = Field(default=5, ge=1, le=1_000)  # each is a product


def oft(layer: Layer) -> Formula:
    """OFT (arXiv 2306.07280): R is block-diagonal, each block the Cayley transform of Q = −Qᵀ.

    (I − Q)(I + Q)⁻¹ or, where the configuration says so, the Neumann series of it cut off. An
    embedding's rows are turned, which is W₀·R.
    """
    stated = layer.settings.stated(Oft)
    if stated.oft_block_size is None:
        raise refuse(layer, "the parts are those of OFT before PEFT 0.14, which no longer reads it")
    embedding = "oft_embedding_R" in layer.parts
    part = "oft_embedding_R" if embedding else "oft_R"
    count = layer.parts[part][-1]
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) // 2 != count:
        raise refuse(layer, f"{count} entries make no triangle of a block")

    def compute(parts: Parts, base: Tensor) -> Tensor:
        skew = _skew(parts[part], size)
        if stated.coft:
            skew = _within(skew, stated.eps)
        terms = stated.num_cayley_neumann_terms if stated.use_cayley_neumann else 0
        blocks = _neumann(skew, terms) if terms else _cayley(skew)
        rows = base.reshape(base.shape[0], -1, size)
        if not stated.block_share and rows.shape[1] != blocks.shape[0]:
            raise ValueError("another number of blocks")
        turned = "odj,dji->odi" if embedding else "odj,dij->odi"
        blocks = blocks.expand(rows.shape[1], -1, -1)
        return torch.einsum(turned, rows, blocks).reshape(base.shape).sub_(base)

    return Formula(compute, True, 3.0, False if embedding else None)


def boft(layer: Layer) -> Formula:
    """BOFT (arXiv 2311.06243): R = Π Pₙ·Bₙ·Pₙᵀ, butterflies of block-diagonal turns; rows scaled.

    W = s ⊙ (W₀·Rᵀ), the blocks Cayley transforms of the skew part of what is stored.
    """
    factors, blocks, size = layer.parts["boft_R"][:3]

    def compute(parts: Parts, base: Tensor) -> Tensor:
        stored = parts["boft_R"]
        turned = base
        for number in range(factors):
            order = _butterfly(base.shape[1], blocks >> number, size // 2, factors - 1)
            block = _cayley(0.5 * (stored[number] - stored[number].mT))
            mixed = turned[:, torch.argsort(order)].reshape(base.shape[0], blocks, size)
            mixed = torch.einsum("odj,dij->odi", mixed, block).reshape(base.shape)
            turned = mixed[:, order]
        scale = parts["boft_s"].reshape(-1, 1)
        if scale.shape[0] != base.shape[0]:
            raise ValueError("another number of outputs")
        return turned * scale - base

    return Formula(compute, True, 4.0)


class Hra(BaseModel):
    """What HRA states."""

    model_config = ConfigDict(extra="ignore")

    apply_GS: bool = False


def hra(layer: Layer) -> Formula:
    """HRA (arXiv 2405.17484): R is a product of r reflections, made orthogonal where asked."""
    orthogonal = layer.settings.stated(Hra).apply_GS

    def compute(parts: Parts, base: Tensor) -> Tensor:
        vectors = parts["hra_u"]
        if vectors.shape[0] != base.shape[1]:
            raise ValueError("another number of inputs")
        if orthogonal:  # the same span, in which Gram–Schmidt and QR agree
            q = torch.linalg.qr(vectors.double())[0].to(base.dtype)
            return (base @ q) @ q.mT * -2
        turned = base.clone()
        for vector in (vectors / vectors.norm(dim=0)).unbind(1):
            turned -= 2 * torch.outer(turned @ vector, vector)
        return turned - base

    return Formula(compute, True, 3.0)


def _skew(upper: Tensor, size: int) -> Tensor:
    """Return Q = −Qᵀ of each row of entries above the diagonal."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    matrix = upper.new_zeros(upper.shape[0], size, size)
    matrix[:, rows, columns] = upper
    return matrix - matrix.mT


def _within(skew: Tensor, eps: float) -> Tensor:
    """Shrink each Q to the norm that constrained OFT allows."""
    most = eps / math.sqrt(skew.shape[0])
    norms = torch.linalg.matrix_norm(skew, keepdim=True)
    return torch.where(norms <= most, skew, most * (skew / norms))


def _cayley(skew: Tensor) -> Tensor:
    """Return (I − Q)·(I + Q)⁻¹."""
    identity = torch.eye(skew.shape[-1], dtype=torch.float64, device=skew.device)
    wide = skew.double()
    return torch.linalg.solve(identity + wide, identity - wide, left=False).to(skew.dtype)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """Return I + 2Q + 2Q² + … + Qᵏ, cut off as PEFT does."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).repeat(len(skew), 1, 1)
    if terms == 1:
        return total
    total = total + 2 * skew
    if terms == 2:
        return total
    last = max(3, terms - 1)
    power = skew
    for exponent in range(2, last + 1):
        power = power @ skew
        total = total + (power if exponent == last else 2 * power)
    return total


def _butterfly(length: int, blocks: int, half: int, factors: int) -> Tensor:
    """Return the order in which a butterfly factor takes its inputs: evens of a block, then odds.

    A block is cut into runs of `half`; runs of even number come first.
    """
    order = torch.arange(length)
    if factors == 0:
        return order
    if blocks < 1 or half < 1 or blocks * half * 2 > length:
        raise ValueError("more blocks than inputs")
    runs = order.reshape(blocks, -1, half)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], dim=1).reshape(-1)
