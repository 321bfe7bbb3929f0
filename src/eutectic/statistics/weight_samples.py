"""Samples of the weights that statistics were collected with, by which they are recognised.

A fingerprint depends on which tensors a file happens to hold (tied copies, heads, prefixes) and on
its dtype; a few values of each observed parameter do not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eutectic.checkpoint.content import sample_of
from eutectic.conventions import IA3_SUFFIX
from eutectic.statistics.collection_plan import Plan


def sample_weights(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return parameter name -> dtype and a few values, in a form for JSON.

    Layers under a LoRA adapter count with their effective weight W₀ + ΔW. Parameters whose
    effective weight cannot be told (other kinds of adapter) are left out.
    """
    wrappers = {  # layer -> the adapter around it
        layer: module
        for module in model.modules()
        if isinstance(layer := getattr(module, "base_layer", None), nn.Module)
    }
    parameters: dict[str, tuple[Tensor, nn.Module | None]] = {}
    for site in plan.leaders:
        name = site.name.partition("[")[0]
        parameters.setdefault(name, (site.weight, wrappers.get(site.module)))
    for name, parameter in {**plan.diagonal, **plan.block}.items():
        parameters.setdefault(name, (parameter, None))
    adapted = {id(m.weight): w for m, w in wrappers.items() if isinstance(m.weight, Tensor)}
    samples: dict[str, dict[str, Any]] = {}
    for name, (weight, wrapper) in parameters.items():
        effective = _effective(weight.detach(), wrapper or adapted.get(id(weight)))
        if effective is not None:
            samples[name] = {
                "dtype": str(effective.dtype).removeprefix("torch."),
                "values": sample_of(effective).double().tolist(),
            }
    return dict(sorted(samples.items()))


def _effective(weight: Tensor, wrapper: Any) -> Tensor | None:
    """Return what a layer computes with: its weight, with the change that LoRA makes to it."""
    if wrapper is None or getattr(wrapper, "merged", False):
        return weight
    if any(f"{IA3_SUFFIX}." in f".{name}" for name, _ in wrapper.named_parameters()):
        return weight  # activations are scaled
    if not callable(getattr(wrapper, "get_delta_weight", None)):
        return None
    try:
        deltas = [wrapper.get_delta_weight(name) for name in wrapper.active_adapters]
    except (AttributeError, KeyError, NotImplementedError, RuntimeError):
        return None
    total = weight.float()
    for delta in deltas:
        total = total + delta.detach().float()
    return total
