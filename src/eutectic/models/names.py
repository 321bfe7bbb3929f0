"""Names of a model's parameters in memory against names in files; tensors put in by either."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.names import align
from eutectic.errors import CheckpointError
from eutectic.models.loading import pretrained

_PROBE = 1 << 20  # above the values of fresh weights, and exact in float32 for as many keys again


def saved_names(model: nn.Module) -> dict[str, str]:
    """Return parameter -> its name in a checkpoint, where transformers renames it on loading."""
    if not type(model).__module__.startswith("transformers."):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions before 5 rename nothing
        return {}
    # Without memory: packed parameters are taken apart, and only names are wanted.
    held = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    own = {id(tensor): name for name, tensor in held.items()}
    saved = revert_weight_conversion(model, dict(held))  # pyright: ignore[reportArgumentType]
    renamed = {own[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in own}
    return {name: new for name, new in renamed.items() if name != new}


def names_in(keys: Iterable[str], names: Iterable[str], saved: Mapping[str, str]) -> dict[str, str]:
    """Return parameter -> what a checkpoint of these keys would call it, before any prefix.

    A file may have been written by transformers (`saved`) or from a state dict (the names as they
    are): whichever more keys fit.
    """
    keys, own = list(keys), {name: name for name in names}
    renamed = {name: saved.get(name, name) for name in own}
    if renamed == own or len(align(renamed.values(), keys)[0]) <= len(align(own, keys)[0]):
        return own
    return renamed


def file_keys(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return file key -> name in `model.state_dict()`, for a model from `load_model`.

    Names that agree, or agree after a prefix, are taken as they are. For the others (transformers
    renames some between file and memory) a model is loaded from tensors that hold a number each,
    which tells where every key goes. Keys that the model has no use for are left out.

    Raises:
        CheckpointError: transformers joins or splits tensors when it loads them, so that there is
            no such mapping.
    """
    state = model.state_dict()
    mapping, _ = align(state, shapes, expert="the checkpoint")
    found = {k: n for k, n in mapping.items() if state[n].shape == tuple(shapes[k])}
    filled = {state[name].data_ptr() for name in found.values()}
    # Parameters that share memory with none of the tensors found hold something else.
    if len(found) == len(shapes) or all(p.data_ptr() in filled for p in model.parameters()):
        return found
    return _probed(model, shapes)


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
    """Copy tensors, by file key, into a loaded model; those that `file_keys` lacks are passed over.

    They may be any subset of the keys, of any dtype, and must have the shapes of the model's.
    """
    state = model.state_dict()
    with torch.no_grad():
        for key, values in tensors.items():
            if key not in keys:
                continue
            target = state[keys[key]]
            if target.shape != values.shape:
                raise CheckpointError(
                    f"'{key}' has the shape {list(values.shape)}, the model's '{keys[key]}' has "
                    f"{list(target.shape)}."
                )
            target.copy_(values)


def _probed(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    keys = list(shapes)
    state = {k: torch.tensor(float(_PROBE + i)).expand(*shapes[k]) for i, k in enumerate(keys)}
    loaded, _ = pretrained(type(model), None, config=model.config, state=state)
    found: dict[str, str] = {}
    for name, values in loaded.state_dict().items():
        if not values.is_floating_point() or values.numel() == 0:
            continue
        low, high = (float(v) for v in values.aminmax())
        if high < _PROBE:
            continue
        if low != high or tuple(values.shape) != tuple(shapes[keys[int(low) - _PROBE]]):
            raise CheckpointError(
                f"'{name}' is put together from several tensors of the file, so a state cannot be "
                "put into the loaded model.\nEvaluate checkpoint folders instead."
            )
        found.setdefault(keys[int(low) - _PROBE], name)
    return found
