"""Routed models on disk: an ordinary checkpoint, one safetensors file and one JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eutectic.errors import CheckpointError, MissingExtraError, OutputError, RequestError
from eutectic.routed.build import finish, install
from eutectic.routed.call import Routing
from eutectic.routed.layers import Layer, find_layers
from eutectic.routed.linear import Experts
from eutectic.routed.modes import routing_of
from eutectic.routed.router import ROUTERS

DESCRIPTION = "routed.json"
FACTORS = "routed.safetensors"
PLAIN_WEIGHTS = "model.safetensors"  # of models that do not come from transformers
FORMAT = 1


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
    layers, tensors = _describe(routed)
    description = {
        "format": FORMAT,
        "architecture": type(routed).__name__,
        "experts": list(handle.experts),
        "router": handle.router,
        "accumulate": handle.accumulate,
        "batch_first": handle.batch_first,
        "short": handle.short,
        "left_out": handle.left_out,
        "layers": layers,
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
        (path / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
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


def _describe(routed: nn.Module) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    layers: list[dict[str, str]] = []
    tensors: dict[str, Tensor] = {}
    for path, experts in experts_of(routed).items():
        layers.append({"name": experts.name, "path": path})
        for key, tensor in experts.state_dict().items():
            tensors[f"{path}.{key}"] = tensor.contiguous()
    return layers, tensors


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
    available = find_layers(loaded)
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
    path: Path, tensors: dict[str, Tensor], layer: Layer, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = [
        tensors.get(f"{layer.path}.{key}") for key in ("up", "down", "router.weight", "router.bias")
    ]
    up, down, weight, bias = found
    if up is None or down is None or weight is None or bias is None or up.ndim != 3:
        raise CheckpointError(f"{path / FACTORS}: incomplete for the layer '{layer.name}'.")
    size = up.shape[2]
    wanted = [
        (experts, layer.out_features, size),
        (experts, size, layer.in_features),
        (experts, layer.in_features),
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
    return load_model(path, model)


def load_model(path: Path, model_class: type[Any] | None = None) -> Any:
    """Return a transformers model in the dtype that it is stored in.

    Args:
        path: its folder.
        model_class: None takes the class that config.json names.

    Raises:
        CheckpointError: config.json names no class that transformers has.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf", f"loading {path}") from None
    if model_class is None:
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / 'config.json'}: cannot be read: {error}.") from None
        name = (config.get("architectures") or ["?"])[0]
        model_class = getattr(transformers, str(name), None)
        if model_class is None:
            raise CheckpointError(
                f"{path}: its architecture '{name}' is not in transformers.\n"
                "Pass the class, or a module, as model=."
            )
    old = int(transformers.__version__.split(".")[0]) < 5
    options: dict[str, Any] = {"torch_dtype": "auto"} if old else {"dtype": "auto"}
    return model_class.from_pretrained(path, local_files_only=True, **options)


__all__ = ["base_state_dict", "experts_of", "load_model", "load_routed", "save_routed"]
