"""Routed inference against the merged model alone, and against dense deltas gathered per sample.

    python benchmarks/routed.py [--repeats 7] [--depth 4] [--batch 32] [--threads 2]

A ViT-B/32-shaped encoder (width 768, 50 tokens; all of its layers are alike, so `--depth` of them
tell the ratio), eight experts of rank 32 on the attention projections and the first MLP matrix, a
batch of mixed tasks. The three models run in turn; printed are the median and range of the rounds'
ratios of wall time. The dense model cannot be further above the routed one than above the merged.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.routed.forward_pass import Routing
from eutectic.routed.routed_folder import finish
from eutectic.routed.routed_layers import choose_layers
from eutectic.routed.routed_modules import install
from eutectic.routed.router import DiscriminantRouter

EXPERTS, RANK = 8, 32


def make_model(depth: int) -> nn.Module:
    """Return a random vision transformer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(num_hidden_layers=depth)
    return CLIPVisionModel(config).eval()


def make_routed(model: nn.Module) -> nn.Module:
    """Return a copy with random experts; their values do not change the cost."""
    routed = copy.deepcopy(model)
    routing = Routing(
        tuple(map(str, range(EXPERTS))), "discriminant", accumulate=False, batch_first=True
    )
    for layer in choose_layers(model):
        up = torch.randn(EXPERTS, layer.shape[0], RANK) * 1e-3
        down = torch.randn(EXPERTS, RANK, layer.shape[1]) * 1e-3
        router = DiscriminantRouter(torch.randn(EXPERTS, layer.shape[1]), torch.zeros(EXPERTS))
        install(routed, layer, up, down, router, routing)
    return finish(routed, routing)


class DenseExperts(nn.Module):
    """y = W x + b + Δ_t x with a dense Δ_t gathered for every sample."""

    def __init__(self, base: nn.Module, deltas: Tensor, router: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.deltas, self.router = base.weight, base.bias, deltas, router

    def forward(self, x: Tensor) -> Tensor:
        """Route, gather, multiply."""
        chosen = self.router(x.mean(1)).argmax(-1)
        return F.linear(x, self.weight, self.bias) + torch.bmm(x, self.deltas[chosen].mT)


def make_dense(model: nn.Module) -> nn.Module:
    """Return a copy with dense experts; like layers share them, to save memory."""
    dense = copy.deepcopy(model)
    shared: dict[tuple[int, int], Tensor] = {}
    for layer in choose_layers(model):
        shape = (layer.shape[0], layer.shape[1])
        deltas = shared.setdefault(shape, torch.randn(EXPERTS, *shape) * 1e-3)
        router = DiscriminantRouter(torch.randn(EXPERTS, layer.shape[1]), torch.zeros(EXPERTS))
        parent, _, child = layer.path.rpartition(".")
        base = dense.get_submodule(layer.path)
        setattr(dense.get_submodule(parent), child, DenseExperts(base, deltas, router))
    return dense


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    merged = make_model(options.depth)
    models: dict[str, Callable[..., object]] = {
        "merged": merged,
        "routed": make_routed(merged),
        "dense": make_dense(merged),
    }
    images = torch.randn(options.batch, 3, 224, 224)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(options.repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(pixel_values=images)
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - start)
    print(", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in times.items()))
    for above, below in (("routed", "merged"), ("dense", "routed"), ("dense", "merged")):
        ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
        low, high = ratios[0], ratios[-1]
        print(f"{above} / {below} {statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
