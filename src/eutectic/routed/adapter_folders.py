"""Folders of PEFT adapters: factors, and a configuration that says how to load them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from eutectic.conventions import PEFT_ROOT
from eutectic.models.arguments import TEXTS, signature_of
from eutectic.models.loading import transformers_for
from eutectic.routed.routed_modules import Experts, RoutedLinear
from eutectic.storage import announce

# PEFT's kinds of task, and the class of transformers that loads the base of each.
_TASKS = (
    ("CAUSAL_LM", "AutoModelForCausalLM"),
    ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    ("SEQ_CLS", "AutoModelForSequenceClassification"),
    ("TOKEN_CLS", "AutoModelForTokenClassification"),
    ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
    ("FEATURE_EXTRACTION", "AutoModel"),
)
# Modules that PEFT takes whole from the adapter's file, for adapters of these kinds.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def write_adapter(
    routed: nn.Module, layers: Mapping[str, Experts], t: int, target: Path, base: Path
) -> None:
    """Write expert `t` as a LoRA adapter on the model in the folder `base`."""
    ranks = {path: experts.up.shape[2] for path, experts in layers.items()}
    rank = max(ranks.values())
    smaller = {path: r for path, r in ranks.items() if r != rank}
    modules = (routed.get_submodule(path) for path in layers)
    loaded = loaded_by(routed)
    heads = _HEADS.get(str(loaded["task_type"]), ())
    if any(set(path.split(".")) & set(heads) for path in layers):
        heads, loaded = (), _by_class(routed)
    config = {
        "peft_type": "LORA",
        **loaded,
        # PEFT looks from the folder that a program runs in, so that only a whole path is one.
        "base_model_name_or_path": str(base.resolve()),
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
    tensors = {
        f"{PEFT_ROOT}{path}.lora_{side}.weight": factor[t].detach().contiguous()
        for path, experts in layers.items()
        for side, factor in (("A", experts.down), ("B", experts.up))
    }
    tensors |= {
        f"{PEFT_ROOT}{path}.{name}": tensor.detach().contiguous()
        for path, module in routed.named_modules()
        if path.rpartition(".")[2] in heads
        for name, tensor in module.state_dict().items()
    }
    target.mkdir(parents=True, exist_ok=True)
    for written in ("adapter_model.safetensors", "adapter_config.json"):
        announce(target / written)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def loaded_by(model: nn.Module) -> dict[str, Any]:
    """Return what tells PEFT the class of an adapter's base: its kind of task, or the class itself.

    A kind of task only where transformers has this very class for it; then the adapter loads with
    the `AutoPeftModelFor…` of that kind. Any other, such as those for images, with `AutoPeftModel`.
    """
    kind = type(model)
    found: dict[str, Any] = {"task_type": None, "auto_mapping": None}
    if not any(parent.__name__ == "PreTrainedModel" for parent in kind.__mro__):
        return found
    transformers = transformers_for("Exporting adapters")
    for task, name in _TASKS:
        models = getattr(getattr(transformers, name), "_model_mapping", {})
        config: Any = type(model.config)
        if config not in models or kind not in _several(models[config]):
            continue
        # PEFT hands texts to bare models by names that other models do not take.
        if task != "FEATURE_EXTRACTION" or set(TEXTS) <= set(signature_of(model).names):
            return {**found, "task_type": task}
    return _by_class(model)


def _by_class(model: nn.Module) -> dict[str, Any]:
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"task_type": None, "auto_mapping": mapping}


def _several(kinds: Any) -> tuple[Any, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
