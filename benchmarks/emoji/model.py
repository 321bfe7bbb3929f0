"""The suite's model: EfficientNet-lite0 without its classifier, under the names of its file.

The architecture is that of EfficientNet-lite (github.com/tensorflow/tpu, models/official/
efficientnet/lite): the blocks of EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excitation,
with ReLU6, TensorFlow's padding and batch norms of ε = 1e-3.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

# Kernel, stride, factor of expansion, channels in, channels out, blocks.
STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
HIDDEN = 1280
MEAN, DEVIATION = 127.0, 128.0  # of pixels, as the network was trained


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution without bias, whose inputs `padded` pads."""
    return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def padded(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return what a layer sees of images `[n, channels, height, width]`: an odd zero goes last."""
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    high, wide = (max(kernel - (size - 1) % stride - 1, 0) for size in images.shape[2:])
    return F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


class Block(nn.Module):
    """Pixels expanded, convolved channel by channel and projected, beside the identity."""

    def __init__(self, kernel: int, stride: int, factor: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * factor
        self.whole = stride == 1 and inputs == outputs
        if factor > 1:
            self._expand_conv, self._bn0 = convolution(inputs, wide, 1), norm(wide)
        self._depthwise_conv = convolution(wide, wide, kernel, stride, groups=wide)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = convolution(wide, outputs, 1), norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return `[n, outputs, ⌈height / stride⌉, ⌈width / stride⌉]`."""
        states = images
        if hasattr(self, "_expand_conv"):
            states = F.relu6(self._bn0(self._expand_conv(states)))
        states = self._depthwise_conv(padded(states, self._depthwise_conv))
        states = self._bn2(self._project_conv(F.relu6(self._bn1(states))))
        return images + states if self.whole else states


class EfficientNetLite(nn.Module):
    """The body: pictures to features."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, 32, 3, 2), norm(32)
        self._blocks = nn.ModuleList(
            Block(kernel, stride if first else 1, factor, inputs if first else outputs, outputs)
            for kernel, stride, factor, inputs, outputs, count in STAGES
            for first in (True, *(False,) * (count - 1))
        )
        self._conv_head, self._bn1 = convolution(320, HIDDEN, 1), norm(HIDDEN)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features `[n, 1280]`, means over places, of uint8 pictures `[n, 3, h, w]`."""
        images = (pixel_values.float() - MEAN) / DEVIATION
        # Not in bfloat16, where depthwise convolutions on a CPU take longer.
        with torch.autocast("cpu", enabled=False):
            states = F.relu6(self._bn0(self._conv_stem(padded(images, self._conv_stem))))
            for block in self._blocks:
                states = block(states)
            return F.relu6(self._bn1(self._conv_head(states))).mean((2, 3))


def load_model(folder: Path) -> EfficientNetLite:
    """Return the model of a folder in evaluation mode."""
    with torch.device("meta"):
        model = EfficientNetLite()
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model.requires_grad_(True).eval()


def save(model: nn.Module, folder: Path) -> None:
    """Write a model's tensors, its norms' statistics among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def features(model: nn.Module, images: Tensor, batch: int = 25) -> Tensor:
    """Return the features `[n, 1280]`, float32, of uint8 pictures `[n, 3, h, w]`."""
    return torch.cat([model(part).float() for part in images.split(batch)])
