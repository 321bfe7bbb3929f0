"""Names of a model's parameters in memory and in the files that transformers writes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from eutectic.checkpoint.names import align


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
