"""Kinds whose change repeats, or is sparse: in a matrix, or in its spectrum."""

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from eutectic.checkpoint.peft_kinds.formulas import (
    Formula,
    Layer,
    Parts,
    Places,
    Seed,
    Shape,
)


class Fourier(BaseModel):
    """What FourierFT states."""

    model_config = ConfigDict(extra="ignore")

    scaling: float = 150.0
    random_loc_seed: Seed | None = 777


def fourierft(layer: Layer) -> Formula:
    """FourierFT (arXiv 2405.03003): Δ = s·Re(IDFT of n coefficients), their places from a seed."""
    stated = layer.settings.stated(Fourier)

    def compute(parts: Parts, base: Tensor) -> Tensor:
        values = parts["fourierft_spectrum"]
        out, width = base.shape
        spectrum = torch.zeros(out, width, dtype=values.dtype, device=values.device)
        if values.numel() > spectrum.numel():
            raise ValueError("more coefficients than entries")
        if values.device.type != "meta":
            generator = torch.Generator().manual_seed(stated.random_loc_seed or 0)
            places = torch.randperm(out * width, generator=generator)[: values.numel()]
            spectrum[places // width, places % width] = values
        return torch.fft.ifft2(spectrum).real * stated.scaling

    turned = bool(layer.settings.common.fan_in_fan_out)
    return Formula(compute, matrices=5.0, transposed=turned)


def c3a(layer: Layer) -> Formula:
    """C³A (arXiv 2407.19342): blocks are circulant, Δ[l, j] = w[(j − l) mod b] / in."""

    def compute(parts: Parts, base: Tensor) -> Tensor:
        kernel = parts["c3a_kernel"]
        rows, columns, size = kernel.shape
        step = torch.arange(size)
        blocks = kernel[:, :, (step[None, :] - step[:, None]) % size]
        width = columns * size
        return blocks.permute(0, 2, 1, 3).reshape(rows * size, width) / width

    return Formula(compute)


class Miss(BaseModel):
    """What MiSS states."""

    model_config = ConfigDict(extra="ignore")

    init_weights: bool | str = True


def miss(layer: Layer) -> Formula:
    """MiSS (arXiv 2409.15371): Δ[o, i] = D[i mod r, o mod m]; its form "bat" multiplies W₀ too."""
    bat = layer.settings.stated(Miss).init_weights == "bat"

    def compute(parts: Parts, base: Tensor) -> Tensor:
        block = parts["miss_block"]
        out, width = base.shape
        if not bat:
            rows = torch.arange(width) % block.shape[0]
            columns = torch.arange(out) % block.shape[1]
            if out % block.shape[1]:
                raise ValueError("outputs are no multiple of the block")
            return block[rows][:, columns].mT
        size = block.shape[-1]
        if block.shape != (out // size, size, size) or out % size or width % size:
            raise ValueError("blocks do not fit")
        tiles = base.reshape(out // size, size, width // size, size).permute(2, 0, 1, 3)
        return (tiles @ block + block).permute(1, 2, 0, 3).reshape(out, width)

    return Formula(compute, bat, 3.0)


def shira(layer: Layer) -> Formula:
    """SHiRA (arXiv 2406.13175): a few entries of the weight, at stored places."""

    def compute(parts: Parts, base: Tensor) -> Tensor:
        places, values = parts["shira_indices"], parts["shira_weight"]
        if places.shape != (2, values.numel()):
            raise ValueError("as many places as values")
        change = torch.zeros(base.shape, dtype=values.dtype, device=values.device)
        if values.device.type != "meta":
            change.index_put_((places[0].long(), places[1].long()), values, accumulate=True)
        return change

    return Formula(compute)


def shira_places(parts: Mapping[str, Shape], matrix: Shape | None) -> Places:
    """Return how many rows and columns the changed matrix has, where it is known."""
    del parts
    return {"shira_indices": (None, None) if matrix is None else matrix}
