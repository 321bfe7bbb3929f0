"""Routed layers put into a model in place of its own, and the model made a routed one."""

from __future__ import annotations

from types import MethodType
from typing import TypeVar

from torch import Tensor, nn

from eutectic.models.sites import Site
from eutectic.routed.forward_pass import Routing, install_hooks
from eutectic.routed.routed_modules import Experts, RoutedAttention, RoutedLinear
from eutectic.routed.router import Router
from eutectic.routed.saving import save_routed

Model = TypeVar("Model", bound=nn.Module)


def install(
    model: nn.Module, layer: Site, up: Tensor, down: Tensor, router: Router, routing: Routing
) -> None:
    """Replace one layer of `model` by a routed one, which takes over its parameters."""
    experts = Experts(layer.name, up, down, router, routing)
    base = model.get_submodule(layer.path)
    replacement: nn.Module
    if layer.kind == "in_projection":
        assert isinstance(base, nn.MultiheadAttention)
        replacement = RoutedAttention(base, experts)
    else:
        replacement = RoutedLinear(base, experts, transposed=layer.kind == "conv1d")
    replacement.train(base.training)
    # One module may be called by several paths.
    paths = [n for n, m in model.named_modules(remove_duplicate=False) if m is base]
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def finish(model: Model, routing: Routing) -> Model:
    """Attach the handle, the hooks and `save_pretrained` to a model with routed layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # It would drop the padding between its layers, so that no mask fits what they see.
            module.use_nested_tensor = False
    install_hooks(model, routing)
    model.routing = routing  # type: ignore[assignment]
    model.save_pretrained = MethodType(save_routed, model)  # type: ignore[assignment]
    return model
