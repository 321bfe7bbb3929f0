"""Kinds whose change is, or begins with, a product of two thin factors."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eutectic.checkpoint.adapter_config import LoraFields
from eutectic.checkpoint.peft_kinds.formulas import (
    Formula,
    Layer,
    Parts,
    Places,
    Seed,
    Shape,
    refuse,
)


def lora_scaling(fields: LoraFields, layer: Layer) -> float:
    """Return alpha / r of a module, or alpha / √r under rank-stabilised LoRA."""
    rank = layer.settings.rank(layer.module, fields.r)
    alpha = layer.settings.alpha(layer.module, fields.lora_alpha)
    return alpha / math.sqrt(rank) if fields.use_rslora else alpha / rank


def variant_of_lora(layer: Layer, fields: LoraFields, init: Any) -> Formula:
    """DoRA (arXiv 2402.09353), and factors that hold a part of the base weight.

    W = m ⊙ (V + s·B·A) / ‖V + s·B·A‖, the norm that of each output's row; V is W₀, or what the
    initialisation left of it: W₀ less its r leading singular triplets (PiSSA, arXiv 2404.02948), or
    less s·Q_r·R_r of its QR decomposition (OLoRA, arXiv 2406.01775). Both are computed from the
    recipe's base, in float64. They belong to linear layers; embeddings and kernels start as usual.
    """
    scaling = lora_scaling(fields, layer)
    residual = _residual(layer, init)
    embedding = "lora_embedding_A" in layer.parts
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    magnitude = "lora_magnitude_vector" in layer.parts
    rank = layer.parts[a][0]

    def compute(parts: Parts, base: Tensor) -> Tensor:
        product = (parts[b].reshape(-1, rank) * scaling) @ parts[a].reshape(rank, -1)
        removed = residual(base, rank, scaling) if residual is not None else None
        if removed is not None:
            product -= removed
        if not magnitude:
            return product
        moved = base + product
        norms = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        factor = parts["lora_magnitude_vector"].reshape(-1, 1) / norms
        return moved.mul_(factor).sub_(base)

    return Formula(compute, True, 6.0 if residual else 3.0, True if embedding else None)


def has_residual(layer: Layer, init: Any) -> bool:
    """Tell whether an initialisation moved a part of this layer's base weight into the factors."""
    return _residual(layer, init) is not None


def _residual(layer: Layer, init: Any) -> Callable[[Tensor, int, float], Tensor] | None:
    """Return what takes the part of W₀ that an initialisation moves into the factors."""
    kernel = len(layer.shape) != 2 or "lora_A" not in layer.parts
    if kernel or not isinstance(init, str):
        return None
    return {"pissa": _leading_part, "olora": _leading_columns}.get(init.lower())


def _leading_part(base: Tensor, rank: int, scaling: float) -> Tensor:
    left, values, right = torch.linalg.svd(base.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).to(base.dtype)


def _leading_columns(base: Tensor, rank: int, scaling: float) -> Tensor:
    q, r = torch.linalg.qr(base.double())
    return (scaling * (q[:, :rank] @ r[:rank])).to(base.dtype)


class AdaLora(BaseModel):
    """What AdaLoRA states."""

    model_config = ConfigDict(extra="ignore")

    init_r: int = Field(default=12, ge=1)
    lora_alpha: float = Field(default=8.0, allow_inf_nan=False)


def adalora(layer: Layer) -> Formula:
    """AdaLoRA (arXiv 2303.10512): Δ = s·B·(A ⊙ E), s = alpha / (initial rank + 1e-5)."""
    stated = layer.settings.stated(AdaLora)
    alpha = stated.lora_alpha if stated.lora_alpha > 0 else float(layer.parts["lora_A"][0])
    scaling = alpha / (stated.init_r + 1e-5)

    def compute(parts: Parts, base: Tensor) -> Tensor:
        return (parts["lora_B"] @ (parts["lora_A"] * parts["lora_E"])) * scaling

    return Formula(compute)


def hira(layer: Layer) -> Formula:
    """HiRA: Δ = W₀ ⊙ (B·A), a Hadamard product of high rank."""
    embedding = "hira_embedding_A" in layer.parts
    a, b = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")

    def compute(parts: Parts, base: Tensor) -> Tensor:
        rank = parts[a].shape[0]
        return (parts[b].reshape(-1, rank) @ parts[a].reshape(rank, -1)).mul_(base)

    return Formula(compute, True, 2.0, True if embedding else None)


class Lycoris(BaseModel):
    """What LoHa and LoKr state."""

    model_config = ConfigDict(extra="ignore")

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=8, allow_inf_nan=False)


def _lycoris_scaling(layer: Layer) -> float:
    stated, module = layer.settings.stated(Lycoris), layer.module
    return layer.settings.alpha(module, stated.alpha) / layer.settings.rank(module, stated.r)


def loha(layer: Layer) -> Formula:
    """LoHa (arXiv 2108.06098): Δ = s·(A₁B₁) ⊙ (A₂B₂); kernels through small cores T₁, T₂."""
    scaling = _lycoris_scaling(layer)
    cores = "hada_t1" in layer.parts

    def factor(parts: Parts, number: int) -> Tensor:
        a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        return _through_core(parts[f"hada_t{number}"], a, b) if cores else a @ b

    def compute(parts: Parts, base: Tensor) -> Tensor:
        return (factor(parts, 1) * factor(parts, 2) * scaling).reshape(base.shape)

    return Formula(compute, matrices=3.0)


def lokr(layer: Layer) -> Formula:
    """LoKr (arXiv 2212.10650): Δ = s·W₁ ⊗ W₂, each whole or a product of thin factors."""
    scaling = _lycoris_scaling(layer)

    def factor(parts: Parts, number: int) -> Tensor:
        if (whole := parts.get(f"lokr_w{number}")) is not None:
            return whole
        a, b = parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"]
        core = parts.get("lokr_t2") if number == 2 else None
        return a @ b if core is None else _through_core(core, a, b)

    def compute(parts: Parts, base: Tensor) -> Tensor:
        first, second = factor(parts, 1), factor(parts, 2)
        if second.ndim == 4:  # a kernel of two dimensions; PEFT treats no other as one
            first = first[:, :, None, None]
        return (torch.kron(first, second.contiguous()) * scaling).reshape(base.shape)

    return Formula(compute)


def _through_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return Σ core[i, j]·a[i, out]·b[j, in], a kernel [out, in, k, k]."""
    return torch.einsum("ijkl,io,jn->onkl", core, a, b)


class VbLora(BaseModel):
    """What VB-LoRA states."""

    model_config = ConfigDict(extra="ignore")

    topk: int = Field(default=2, ge=1)


def vblora(layer: Layer) -> Formula:
    """VB-LoRA (arXiv 2405.15179): the factors' tiles are mixtures of k vectors of one bank.

    Stored are the logits of all vectors, or (`save_only_topk_weights`) which k it takes and the
    shares of all of them but the last.
    """
    top = layer.settings.stated(VbLora).topk

    def tiles(parts: Parts, side: str) -> Tensor:
        name, bank = f"vblora_logits_{side}", parts["vblora_vector_bank"]
        if (logits := parts.get(name)) is not None:
            values, indices = logits.topk(top, dim=-1)
            shares = values.softmax(-1)
        else:
            indices, stored = parts[f"{name}_topk_indices"].long(), parts[f"{name}_topk_weights"]
            shares = torch.cat([stored, 1 - stored.sum(-1, keepdim=True)], -1)
            if indices.shape != shares.shape:
                raise ValueError("as many shares as vectors")
        return (shares[..., None] * bank[indices]).sum(-2)

    def compute(parts: Parts, base: Tensor) -> Tensor:
        a, b = tiles(parts, "A"), tiles(parts, "B")
        return b.transpose(1, 2).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)

    return Formula(compute)


def vblora_places(parts: Mapping[str, Shape], matrix: Shape | None) -> Places:
    """Return how many vectors the bank has, for each part that says which of them are taken."""
    bank = parts.get("vblora_vector_bank")
    size = bank[0] if bank else None
    return {f"vblora_logits_{side}_topk_indices": (size,) for side in "AB"}


class Vera(BaseModel):
    """What VeRA states."""

    model_config = ConfigDict(extra="ignore")

    r: int = Field(default=256, ge=1, le=1_000_000)
    projection_prng_key: Seed = 0


def vera(layer: Layer) -> Formula:
    """VeRA (arXiv 2310.11454): Δ = diag(b)·B·diag(d)·A, with B and A common to all layers.

    They are stored, or drawn again from the seed that the configuration names, as large as the
    largest layer: each takes its first rows and columns.
    """
    stated = layer.settings.stated(Vera)
    if not layer.sizes:
        raise refuse(layer, "no layer of the base fits the adapter")
    largest = tuple(max(size[side] for size in layer.sizes) for side in (0, 1))

    def compute(parts: Parts, base: Tensor) -> Tensor:
        out, width = base.shape
        a, b = parts.get("vera_A"), parts.get("vera_B")
        scale_b, scale_d = parts["vera_lambda_b"], parts["vera_lambda_d"]
        if scale_b.shape != (out,):
            raise ValueError("another number of outputs")
        if a is None or b is None:
            device = scale_b.device
            if device.type == "meta":
                a, b = (torch.empty(n, device=device) for n in _vera_shapes(stated.r, largest))
            else:
                a, b = _vera_projections(stated.projection_prng_key, stated.r, largest)
        a, b = a[:, :width].to(scale_d.dtype), b[:out].to(scale_b.dtype)
        if a.shape[1] != width or b.shape[0] != out:
            raise ValueError("projections smaller than the layer")
        return (scale_b[:, None] * b) @ (scale_d[:, None] * a)

    return Formula(compute)


def vera_size(out: int, shape: Shape) -> tuple[int, int]:
    """Return (out, in) of a layer with `out` outputs, whichever way round it is kept."""
    return out, math.prod(shape) // max(out, 1)


def _vera_shapes(rank: int, largest: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, largest[1]), (largest[0], rank)


def _vera_projections(key: int, rank: int, largest: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Draw A [r, in] and B [out, r] of Kaiming's uniform distribution, one after the other."""
    generator = torch.Generator().manual_seed(key)
    drawn: list[Tensor] = []
    for shape in _vera_shapes(rank, largest):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]
