"""The experts as ordinary PEFT LoRA adapters, for servers of many adapters on one base."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from eutectic.errors import OutputError, RequestError
from eutectic.routed.routed_modules import RoutedLinear
from eutectic.routed.routing_modes import routing_of
from eutectic.routed.saving import base_state_dict, experts_of

BASE = "merged"
EXPERTS = "experts"
PROTOTYPES = "prototypes.safetensors"


def export_lora(routed: nn.Module, folder: str | Path) -> None:
    """Write the merged model, one LoRA adapter per expert, and the routers.

    `merged/` is the base; `experts/<name>/` are adapters with A = F_t, B = B_t and scale 1, so that
    a model with adapter t equals the routed model with oracle t. `prototypes.safetensors` holds
    per layer `<path>.weight` `[T, in]` and `<path>.bias` `[T]`: scores are linear in the mean
    input of the layer's unmasked tokens (of norm 1 for the prototype router); its metadata names
    the experts in order and the router.

    Args:
        routed: a routed transformers model.
        folder: created when missing.

    Raises:
        RequestError: not a routed model, a packed in-projection (which LoRA has no form for), a
            model without `save_pretrained`, or a name of an expert that is no folder name.
        OutputError: the folder cannot be written.
    """
    handle = routing_of(routed)
    path = Path(folder)
    layers = experts_of(routed)
    own = getattr(type(routed), "save_pretrained", None)
    packed = [p for p in layers if not isinstance(routed.get_submodule(p), RoutedLinear)]
    if packed or own is None:
        raise RequestError(
            f"the packed in-projections {packed[:3]} have no LoRA form; route other layers."
            if packed
            else f"{type(routed).__name__} has no save_pretrained, so PEFT could not load it."
        )
    bad = [name for name in handle.experts if name in (".", "..") or set(name) & set("/\\\0")]
    if bad:
        raise RequestError(f"these names of experts cannot be folders: {bad}.")
    try:
        own(routed, path / BASE, state_dict=base_state_dict(routed))
        for t, name in enumerate(handle.experts):
            target = path / EXPERTS / name
            target.mkdir(parents=True, exist_ok=True)
            _write_adapter(routed, t, target, str(path / BASE))
        routers: dict[str, Tensor] = {}
        for p, experts in layers.items():
            routers[f"{p}.weight"] = experts.router.weight.contiguous()
            routers[f"{p}.bias"] = experts.router.bias.contiguous()
        metadata = {"experts": json.dumps(list(handle.experts)), "router": handle.router}
        save_file(routers, path / PROTOTYPES, metadata=metadata)
    except OSError as error:
        raise OutputError(f"{path}: the export cannot be written: {error}.") from error


def _write_adapter(routed: nn.Module, t: int, target: Path, base: str) -> None:
    layers = experts_of(routed)
    ranks = {path: experts.up.shape[2] for path, experts in layers.items()}
    rank = max(ranks.values())
    smaller = {path: r for path, r in ranks.items() if r != rank}
    modules = [routed.get_submodule(path) for path in layers]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(m, RoutedLinear) and m.transposed for m in modules),
        "target_modules": list(layers),
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for path, experts in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = experts.down[t].detach().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = experts.up[t].detach().contiguous()
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
