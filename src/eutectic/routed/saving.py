"""Routed models written to a folder: a checkpoint, one safetensors file and one JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from eutectic.errors import OutputError, RequestError
from eutectic.routed.routed_modules import Experts
from eutectic.routed.router import RouterKind
from eutectic.routed.routing_modes import routing_of

DESCRIPTION = "routed.json"
FACTORS = "routed.safetensors"
PLAIN_WEIGHTS = "model.safetensors"  # of models that do not come from transformers
FORMAT = 1


class RoutedLayer(BaseModel):
    """A routed layer: the name of its weight, and the path of its module."""

    name: str
    path: str


class Description(BaseModel):
    """What `routed.json` says; see `Routing` for most of it."""

    model_config = ConfigDict(strict=True)

    format: int = FORMAT
    architecture: str
    experts: list[str]
    router: RouterKind
    accumulate: bool
    batch_first: bool
    short: dict[str, dict[str, int]]
    left_out: list[str] = []  # absent in files of earlier versions
    layers: list[RoutedLayer]


def save_routed(routed: nn.Module, folder: str | Path, **options: Any) -> None:
    """Write a routed model: the merged model as it would save itself, and the experts beside it.

    The folder loads in transformers as the merged model; `load_routed` adds the experts.

    Args:
        routed: from `build_routed` or `load_routed`.
        folder: created when missing.
        **options: passed to the model's own `save_pretrained`.

    Raises:
        RequestError: the model is not routed, or options were given to a model that has no
            `save_pretrained` of its own.
        OutputError: the folder cannot be written.
    """
    handle = routing_of(routed)
    path = Path(folder)
    weights = base_state_dict(routed)
    held = experts_of(routed)
    description = Description(
        architecture=type(routed).__name__,
        experts=list(handle.experts),
        router=handle.router,
        accumulate=handle.accumulate,
        batch_first=handle.batch_first,
        short=handle.short,
        left_out=handle.left_out,
        layers=[RoutedLayer(name=experts.name, path=path) for path, experts in held.items()],
    )
    tensors = {
        f"{path}.{key}": tensor.contiguous()
        for path, experts in held.items()
        for key, tensor in experts.state_dict().items()
    }
    own = getattr(type(routed), "save_pretrained", None)
    if own is None and options:
        raise RequestError(f"{type(routed).__name__} takes no options for saving: {options}.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / DESCRIPTION).unlink(missing_ok=True)
        if own is not None:
            own(routed, path, state_dict=weights, **options)
        else:
            save_file({n: t.contiguous().clone() for n, t in weights.items()}, path / PLAIN_WEIGHTS)
        save_file(tensors, path / FACTORS)
        # Last: a folder without it is no finished routed model.
        text = json.dumps(description.model_dump(), indent=1)
        (path / DESCRIPTION).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: the routed model cannot be written: {error}.") from error


def base_state_dict(routed: nn.Module) -> dict[str, Tensor]:
    """Return the merged model's own state dict, without experts and routers."""
    prefixes = tuple(f"{p}." for p, m in routed.named_modules() if isinstance(m, Experts))
    return {n: t for n, t in routed.state_dict().items() if not n.startswith(prefixes)}


def experts_of(routed: nn.Module) -> dict[str, Experts]:
    """Return the experts by the path of the layer that they belong to."""
    return {
        path.removesuffix(".experts"): module
        for path, module in routed.named_modules()
        if isinstance(module, Experts)
    }
