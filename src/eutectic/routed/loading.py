"""Routed models read from the folder that `save_pretrained` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eutectic.errors import CheckpointError
from eutectic.models.sites import Site, routable_sites
from eutectic.models.transformers_loading import load_stored
from eutectic.routed.assembly import finish, install
from eutectic.routed.call import Routing
from eutectic.routed.router import ROUTERS
from eutectic.routed.saving import DESCRIPTION, FACTORS, FORMAT, PLAIN_WEIGHTS


def load_routed(folder: str | Path, model: nn.Module | type[Any] | None = None) -> Any:
    """Return the routed model of a folder that `save_pretrained` wrote.

    Args:
        folder: the folder.
        model: a class with `from_pretrained`, or a module of the right architecture, which takes
            the stored weights and becomes the routed model; None loads the class that the folder
            names from transformers.

    Raises:
        CheckpointError: not a routed model, a damaged file, or one that does not fit the model.
        MissingExtraError: transformers is needed and not installed.
    """
    path = Path(folder)
    description = _read_description(path)
    loaded = _load_base(path, model)
    try:
        tensors = load_file(path / FACTORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / FACTORS}: cannot be read: {error}.") from None
    routing = Routing(
        tuple(description["experts"]),
        description["router"],
        description["accumulate"],
        description["batch_first"],
    )
    routing.short = description["short"]
    routing.left_out = description["left_out"]
    available = {layer.name: layer for layer in routable_sites(loaded)}
    for item in description["layers"]:
        layer = available.get(item["name"])
        if layer is None or layer.path != item["path"]:
            raise CheckpointError(
                f"{path}: the routed layer '{item['name']}' is not in {type(loaded).__name__}.\n"
                "Load it with the class that it was saved from."
            )
        up, down, weight, bias = _tensors(path, tensors, layer, len(routing.experts))
        router = ROUTERS[routing.router](weight, bias)
        device = next(loaded.parameters()).device
        install(loaded, layer, up.to(device), down.to(device), router.to(device), routing)
    return finish(loaded, routing)


def _tensors(
    path: Path, tensors: dict[str, Tensor], layer: Site, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = [
        tensors.get(f"{layer.path}.{key}") for key in ("up", "down", "router.weight", "router.bias")
    ]
    up, down, weight, bias = found
    if up is None or down is None or weight is None or bias is None or up.ndim != 3:
        raise CheckpointError(f"{path / FACTORS}: incomplete for the layer '{layer.name}'.")
    size = up.shape[2]
    wanted = [
        (experts, layer.shape[0], size),
        (experts, size, layer.shape[1]),
        (experts, layer.shape[1]),
        (experts,),
    ]
    shapes = [tuple(t.shape) for t in (up, down, weight, bias)]
    if shapes != wanted:
        raise CheckpointError(
            f"{path / FACTORS}: '{layer.name}' has factors of shapes {shapes}, where {wanted} fit."
        )
    return up, down, weight, bias


def _read_description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a routed model, it has no {DESCRIPTION}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from None
    if isinstance(description, dict):
        description.setdefault("left_out", [])  # files of earlier versions do not name them
    wanted = {
        "format": int,
        "experts": list,
        "router": str,
        "accumulate": bool,
        "batch_first": bool,
        "short": dict,
        "left_out": list,
        "layers": list,
    }
    bad = [
        key
        for key, kind in wanted.items()
        if not isinstance(description, dict) or not isinstance(description.get(key), kind)
    ]
    if not bad and not all(
        isinstance(item, dict) and {type(item.get("name")), type(item.get("path"))} == {str}
        for item in description["layers"]
    ):
        bad = ["layers"]
    if bad or description["router"] not in ROUTERS:
        raise CheckpointError(f"{file}: damaged; {', '.join(bad) or 'router'} is not as expected.")
    if description["format"] != FORMAT:
        raise CheckpointError(
            f"{file}: format {description['format']}, this version reads {FORMAT}; update eutectic."
        )
    return description


def _load_base(path: Path, model: nn.Module | type[Any] | None) -> Any:
    if isinstance(model, nn.Module):
        try:
            given = load_file(path / PLAIN_WEIGHTS)
            missing, unknown = model.load_state_dict(given, strict=False)
            state = model.state_dict()
            filled = {state[name].data_ptr() for name in given if name in state}
            missing = [n for n in missing if state[n].data_ptr() not in filled]  # not tied either
            if missing or unknown:
                raise RuntimeError(f"missing {missing[:3]}, unknown {unknown[:3]}")
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path / PLAIN_WEIGHTS}: does not fit {type(model).__name__}: {error}"
            ) from None
        return model
    return load_stored(path, model)
