"""Routed models read from the folder that `save_pretrained` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eutectic.errors import CheckpointError
from eutectic.models.sites import Site, routable_sites
from eutectic.models.transformers_loading import load_stored
from eutectic.routed.assembly import finish, install
from eutectic.routed.forward_pass import Routing
from eutectic.routed.router import ROUTERS
from eutectic.routed.saving import DESCRIPTION, FACTORS, FORMAT, PLAIN_WEIGHTS, Description


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
        tuple(description.experts),
        description.router,
        description.accumulate,
        description.batch_first,
        description.short,
        description.left_out,
    )
    available = {layer.name: layer for layer in routable_sites(loaded)}
    device = next(loaded.parameters()).device
    for item in description.layers:
        layer = available.get(item.name)
        if layer is None or layer.path != item.path:
            raise CheckpointError(
                f"{path}: the routed layer '{item.name}' is not in {type(loaded).__name__}.\n"
                "Load it with the class that it was saved from."
            )
        up, down, weight, bias = _tensors(path, tensors, layer, len(routing.experts))
        router = ROUTERS[description.router](weight, bias)
        install(loaded, layer, up.to(device), down.to(device), router.to(device), routing)
    return finish(loaded, routing)


def _tensors(path: Path, held: Mapping[str, Tensor], layer: Site, experts: int) -> list[Tensor]:
    """Return `up`, `down`, and the router's weight and bias of one layer."""
    keys = [f"{layer.path}.{key}" for key in ("up", "down", "router.weight", "router.bias")]
    found = [held[key] for key in keys if key in held]
    if len(found) < len(keys) or found[0].ndim != 3:
        raise CheckpointError(f"{path / FACTORS}: incomplete for the layer '{layer.name}'.")
    size, (rows, columns) = found[0].shape[2], layer.shape
    wanted = [(experts, rows, size), (experts, size, columns), (experts, columns), (experts,)]
    shapes = [tuple(tensor.shape) for tensor in found]
    if shapes != wanted:
        raise CheckpointError(
            f"{path / FACTORS}: '{layer.name}' has factors of shapes {shapes}, where {wanted} fit."
        )
    return found


def _read_description(path: Path) -> Description:
    file = path / DESCRIPTION
    try:
        description = Description.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a routed model, it has no {DESCRIPTION}.") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from None
    except ValidationError as error:
        bad = dict.fromkeys(str(item["loc"][0]) for item in error.errors() if item["loc"])
        raise CheckpointError(
            f"{file}: damaged; {', '.join(bad) or 'its JSON'} is not as expected."
        ) from None
    if description.format != FORMAT:
        raise CheckpointError(
            f"{file}: format {description.format}, this version reads {FORMAT}; update eutectic."
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
