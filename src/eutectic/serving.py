"""Choosing an adapter for each request, in front of servers of one base and many adapters.

Needs torch, safetensors and the folder that `eutectic route --export` writes; nothing else of a
routed model. `router.json` says what the router's tensors mean; see docs/guides/adapters.md.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eutectic.conventions import PEFT_ROOT
from eutectic.errors import CheckpointError, RequestError
from eutectic.storage.small_files import CONFIG_BYTES, read_text

ROUTER_JSON = "router.json"
ROUTER_FORMAT = 1


class RequestRouter:
    """Chooses an adapter's name for every sample of a batch, by one pass of the base model.

    A layer's score of expert t is x̄·w_t + b_t, x̄ the mean of the layer's input over the sample's
    tokens (of norm 1 where `normalise`). Layers that `accumulate` add up log-probabilities in the
    order in which they are passed; the expert of `layer` is chosen, or that of most layers. These
    are the choices of the routed model in the mode "vote".
    """

    def __init__(self, folder: str | Path, model: nn.Module, layer: str | None = None) -> None:
        """Read the router in `folder`, for the base model or a PEFT model of it with adapters.

        Raises:
            CheckpointError: the folder holds no router, or one of another format.
            RequestError: the model has none of its layers, or `layer` is none of them.
        """
        layer = None if layer is None else layer.removesuffix(".weight")
        self.folder, self.model, self.layer = Path(folder), model, layer
        self.stated = _stated(self.folder)
        self.names: list[str] = self.stated["experts"]
        tensors = load_file(self.folder / self.stated["file"])
        paths: list[str] = self.stated["layers"] if layer is None else _until(self.stated, layer)
        modules = dict(model.named_modules())
        self.layers = {p: m for p in paths if (m := _layer(modules, p)) is not None}
        if len(self.layers) != len(paths):
            lacking = [p for p in paths if p not in self.layers]
            raise RequestError(f"the model has no layer '{lacking[0]}': is it the router's base?")
        self.maps = {p: (tensors[f"{p}.weight"], tensors[f"{p}.bias"]) for p in paths}

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> list[str]:
        """Return the adapter's name for each sample of the model's inputs."""
        scores: list[tuple[str, Tensor]] = []
        off = getattr(self.model, "disable_adapter", nullcontext)
        with off(), self._watching(inputs.get("attention_mask"), scores):
            self.model(**inputs)
        votes: list[Tensor] = []
        total: Tensor | float = 0.0
        for path, found in scores:
            total = found.log_softmax(-1) + total if self.stated["accumulate"] else found
            if self.layer in (None, path):
                votes.append(total.argmax(-1))
        counts = nn.functional.one_hot(torch.stack(votes), len(self.names)).sum(0)
        return [self.names[t] for t in counts.argmax(-1).tolist()]

    @contextmanager
    def _watching(self, mask: Tensor | None, scores: list[tuple[str, Tensor]]) -> Iterator[None]:
        def watch(path: str) -> Any:
            weight, bias = self.maps[path]

            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].float()
                x = x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1])
                kept = mask if mask is not None and mask.shape == x.shape[:2] else x[..., 0] * 0 + 1
                kept = kept.to(x)[..., None]
                mean = (x * kept).sum(1) / kept.sum(1).clamp_min(1)
                if self.stated["normalise"]:
                    mean = nn.functional.normalize(mean, dim=-1)
                scores.append((path, mean @ weight.to(x).mT + bias.to(x)))

            return hook

        held = [m.register_forward_pre_hook(watch(p)) for p, m in self.layers.items()]
        try:
            yield
        finally:
            for handle in held:
                handle.remove()


def _layer(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """Return the layer of a path, below PEFT's root or in a model that has another head around."""
    found = modules.get(path) or modules.get(PEFT_ROOT + path)
    inside = [m for own, m in modules.items() if own.endswith(f".{path}")]
    return found or (inside[0] if len(inside) == 1 else None)


def _stated(folder: Path) -> dict[str, Any]:
    """Return what router.json says."""
    try:
        stated = json.loads(read_text(folder / ROUTER_JSON, CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / ROUTER_JSON}: cannot be read ({error}).\n"
            "Name a folder that eutectic route --export wrote."
        ) from None
    keys = {"format", "experts", "layers", "file", "normalise", "accumulate"}
    if not isinstance(stated, dict) or not keys <= stated.keys():
        raise CheckpointError(f"{folder / ROUTER_JSON}: no router of eutectic's.")
    if stated["format"] != ROUTER_FORMAT:
        raise CheckpointError(
            f"{folder / ROUTER_JSON}: format {stated['format']}, known is {ROUTER_FORMAT}."
        )
    return stated


def _until(stated: dict[str, Any], layer: str) -> list[str]:
    """Return the layers that a choice by one layer needs."""
    layers: list[str] = stated["layers"]
    if layer not in layers:
        raise RequestError(f"'{layer}' is no routed layer.\nLayers: {', '.join(layers[:5])}, …")
    return layers[: layers.index(layer) + 1] if stated["accumulate"] else [layer]
