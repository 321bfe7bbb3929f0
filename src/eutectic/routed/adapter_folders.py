"""Folders of PEFT adapters: factors, and a configuration that says how to load them."""

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from eutectic.checkpoint.folder import copy_side_files, feeding_files
from eutectic.conventions import PEFT_ROOT
from eutectic.models.arguments import TEXTS, signature_of
from eutectic.models.loading import transformers_for
from eutectic.models.task_models import EXPERTS
from eutectic.routed.heads import RoutedHeads, heads_of
from eutectic.routed.routed_modules import Experts, RoutedLinear
from eutectic.storage import announce, storage_of

MERGED = "merged"  # the folder of the base of all adapters
BASES = "bases"  # of those that PEFT loads experts' own classes from
CONFIG = "config.json"

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


@dataclass(frozen=True)
class Export:
    """Where adapters are written, and what lies beside them."""

    path: Path  # the folder while it is written
    output: Path  # what it will be called
    beside: Path | None  # a folder whose tokenizer or processor goes along
    save: Callable[[nn.Module, Path], None]  # writes a model without its experts and routers


def write_expert(
    routed: nn.Module, layers: Mapping[str, Experts], expert: tuple[int, str], export: Export
) -> None:
    """Write one expert, by number and name, as a LoRA adapter, with its own head if it has one.

    A head of another class, or with other classes, has a base of its own beside the merged model:
    its configuration, and the merged model's files.
    """
    t, name = expert
    target, feeding = export.path / EXPERTS / name, export.beside
    found = _with_head(routed, name)
    if found is None:
        write_adapter(routed, layers, t, target, export.output / MERGED)
    else:
        whole, saved, base = found.model, found.saved, MERGED
        if _answers_otherwise(whole, routed):
            base = f"{BASES}/{name}"
            _write_base(found, routed, export, base)
        write_adapter(whole, _experts_in(whole), t, target, export.output / base, saved)
        feeding = found.feeding or feeding
    if feeding is not None:
        copy_side_files(feeding, target, feeding_files(feeding))


@dataclass(frozen=True)
class _Headed:
    """A routed model with an expert's head."""

    model: Any
    names: frozenset[str]  # of the head's tensors
    saved: frozenset[str]  # modules that are the head's, whole
    feeding: Path | None


def _with_head(routed: nn.Module, name: str) -> _Headed | None:
    """Return the routed model with an expert's head; None where an adapter cannot hold that."""
    heads = heads_of(routed)
    if not isinstance(heads, RoutedHeads) or name not in heads:
        return None
    model, names = heads[name], heads.own_names(name)
    saved = frozenset(own.rpartition(".")[0] for own in names)
    inside = _experts_in(model)
    if "" in saved or any(f"{path}.".startswith(f"{s}.") for path in inside for s in saved):
        return None
    return _Headed(model, names, saved, heads.stored[name].feeding)


def _experts_in(model: nn.Module) -> dict[str, Experts]:
    modules = model.named_modules()
    return {p.removesuffix(".experts"): m for p, m in modules if isinstance(m, Experts)}


def _answers_otherwise(whole: Any, routed: Any) -> bool:
    """Tell whether a model has another class, or other classes to choose from."""
    if type(whole) is not type(routed):
        return True
    keys = ("num_labels", "id2label")
    return any(getattr(whole.config, k, None) != getattr(routed.config, k, None) for k in keys)


def _write_base(found: _Headed, routed: nn.Module, export: Export, base: str) -> None:
    """Write what PEFT loads an expert's class from: links to the merged model's weights.

    Where that has a head of another shape, whose place the expert's takes, a copy with that.
    """
    folder = export.path / base
    kept, whole = routed.state_dict(), found.model.state_dict()
    if any(n in kept and kept[n].shape != whole[n].shape for n in found.names):
        export.save(found.model, folder)
    else:
        merged = export.path / MERGED
        disk = storage_of(folder)
        for file in disk.files_below(merged):
            if file != CONFIG:
                disk.copy(merged / file, folder / file, share=True)
        announce(folder / CONFIG)
        found.model.config.save_pretrained(folder)
    if (feeding := found.feeding or export.beside) is not None:
        copy_side_files(feeding, folder, feeding_files(feeding))


def write_adapter(
    routed: nn.Module,
    layers: Mapping[str, Experts],
    t: int,
    target: Path,
    base: Path,
    saved: Set[str] = frozenset(),
) -> None:
    """Write expert `t` as a LoRA adapter on the model in the folder `base`.

    Modules in `saved` go along whole, and those that PEFT always takes for the kind of task.
    """
    ranks = {path: experts.up.shape[2] for path, experts in layers.items()}
    rank = max(ranks.values())
    smaller = {path: r for path, r in ranks.items() if r != rank}
    modules = (routed.get_submodule(path) for path in layers)
    loaded = loaded_by(routed)
    heads = _HEADS.get(str(loaded["task_type"]), ())
    if any(set(path.split(".")) & set(heads) for path in layers):
        heads, loaded = (), _by_class(routed)
    # What lies in a module that PEFT takes whole is no module of its own.
    apart = sorted(path for path in saved if not set(path.split(".")) & set(heads))
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
        **({"modules_to_save": apart} if apart else {}),
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
        if path.rpartition(".")[2] in heads or path in apart
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
