"""Equivalent spellings of tensor names, in one table: what writers of checkpoints call one tensor.

Libraries rename a model's tensors between versions, and wrappers put components of their own into
the path. `canonical` gives every known spelling of a name one form, which is for comparing names
and never written. Sources: `conversion_mapping.py` and the models' `_checkpoint_conversion_mapping`
of transformers (4.52, 4.57, 5), `torch.nn.utils` (`weight_norm`, `parametrizations`), PEFT, FSDP.
Nothing here knows a shape, a file or a model.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from eutectic.conventions_adapters import PART_NAMES

# --- Wrappers: components that torch and PEFT put between a module and its parameters ---

_WRAPPERS = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FSDP
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_fpw_module",  # fairscale
    "_forward_module",  # Lightning
    "module",  # DistributedDataParallel, DeepSpeed
    "base_layer",  # PEFT's layers
    "original_module",  # PEFT's modules_to_save: the frozen one
    "token_adapter",  # PEFT's trainable tokens
)
# PEFT's copies of modules that are trained whole; those of norms have a kind of their own.
_COPIES = "modules_to_save|ln_tuning_layers"
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPERS)}|(?:{_COPIES})(?:\.default)?)\.")
_ADAPTER_MODULE = re.compile(rf"(?:^|(?<=\.))(?:{_COPIES})\.([^.]+)\.(?=.)")
_FROZEN = re.compile(r"(^|\.)original_module\.")
_TRAINED = re.compile(rf"(^|\.)(?:{_COPIES})\.")
# The adapter's name inside the key of its parameter, which PEFT leaves out when it saves.
_ADAPTER_NAME = re.compile(rf"\.({PART_NAMES})\.(?!(?:weight|bias)$)([^.]+)(?=\.weight$|\.bias$|$)")

# --- Leading components of language and vision-language models ---

# Where a language model lies within the whole moved from version to version:
# `language_model.model.` (files of LLaVA, Gemma-3, Mllama, PaliGemma …), `model.` (of Qwen2-VL),
# `model.language_model.` (memory since 4.52, what FSDP writes), `language_model.` (without its
# output layer). The other towers lie under `model.` since 4.52. `thinker.` is left out where
# Qwen-Omni's is saved alone.
_LEADING = re.compile(r"(?:(?:base_model|model|language_model|thinker|vlm)\.)+")
# Emu3's text model. Not a leading component by itself: CLIP has a `text_model` beside another.
_TEXT_MODEL = re.compile(r"text_model\.(?:model\.|(?=lm_head\.))")
# First components of a language model's body, and of what stands beside it as a whole.
LANGUAGE = frozenset({"layers", "embed_tokens", "norm", "decoder", "h", "wte"})
OUTPUTS = frozenset({"lm_head"})
# CLIP and SigLIP inside another model lost their own prefix in version 5.
_TOWER = re.compile(r"(?<![^.])((?:vision|image|video)_tower)\.vision_model\.")

# --- Inner components and last components ---


@dataclass(frozen=True)
class Equivalence:
    """Two spellings of a part of a name: `spelt` is read as `canonical`."""

    spelt: str  # for people
    canonical: str
    pattern: re.Pattern[str]
    template: str


def _same(spelt: str, canonical: str, pattern: str, template: str) -> Equivalence:
    return Equivalence(spelt, canonical, re.compile(pattern), template)


# Only where the module is a norm: layer scales and others are called gamma too.
_NORM = r"((?:^|\.)(?:[^.]*norm[^.]*|(?:[^.]*_)?(?:ln|bn|gn)(?:_?\d+|_[^.]*)?)\.)"
EQUIVALENCES = (
    _same("gamma/beta", "weight/bias", rf"(?i:{_NORM})gamma$", r"\1weight"),
    _same("gamma/beta", "weight/bias", rf"(?i:{_NORM})beta$", r"\1bias"),
    *(
        _same(
            "parametrizations.weight.original0/1",
            "weight_g/weight_v",
            rf"(?<![^.])parametrizations\.([^.]+)\.original{number}$",
            rf"\1_{letter}",
        )
        for number, letter in ((0, "g"), (1, "v"))
    ),
    _same(
        "parametrizations.weight.original",
        "weight_orig",
        r"(?<![^.])parametrizations\.([^.]+)\.original$",
        r"\1_orig",
    ),
    _same(
        "parametrizations.weight.0._u/_v",
        "weight_u/weight_v",
        r"(?<![^.])parametrizations\.([^.]+)\.0\._([uv])$",
        r"\1_\2",
    ),
    # Mixtral, MiniMax and PhiMoE since transformers 5; Granite's router.
    _same("block_sparse_moe", "mlp", r"(?<![^.])block_sparse_moe\.", "mlp."),
    _same("router.layer", "router", r"(?<![^.])mlp\.router\.layer\.", "mlp.router."),
    _same("gate", "router", r"(?<![^.])mlp\.gate\.(?=weight$|bias$)", "mlp.router."),
)
# Cheap to look for, so that most names take the short way.
_UNUSUAL = re.compile(r"gamma$|beta$|parametrizations\.|block_sparse_moe\.|mlp\.(?:router|gate)\.")


@dataclass(frozen=True)
class Canonical:
    """A name in the form that all its spellings share, and what was left out and renamed."""

    name: str
    leading: str = ""  # leading components left out, such as "model.language_model."
    wrappers: frozenset[str] = frozenset()  # wrappers left out
    renamed: frozenset[tuple[str, str]] = frozenset()  # (spelt, canonical) of equivalences


def canonical(name: str) -> Canonical:
    """Return the form that all known spellings of a name share.

    >>> canonical("model.language_model.layers.0.mlp.up_proj.weight").name
    'layers.0.mlp.up_proj.weight'
    >>> canonical("_orig_mod.bert.encoder.LayerNorm.gamma").name
    'bert.encoder.LayerNorm.weight'
    """
    bare = unwrapped(name)
    wrappers = frozenset[str]()
    if bare != name:
        wrappers = frozenset(found.strip(".") for found in _WRAPPER.findall(name))
    leading = ""
    if match := _LEADING.match(bare):
        leading = match.group()
        bare = bare[match.end() :]
    renamed: set[tuple[str, str]] = set()
    if match := _TEXT_MODEL.match(bare):
        kept = "" if bare.startswith("text_model.lm_head.") else "text_model."
        leading += match.group()
        bare = kept + bare[match.end() :]
    elif leading and bare.startswith("text_model."):
        leading += "text_model."
    shorter = _TOWER.sub(r"\1.", bare)
    if shorter != bare:
        renamed.add(("vision_tower.vision_model", "vision_tower"))
        bare = shorter
    if _UNUSUAL.search(bare):
        for rule in EQUIVALENCES:
            other = rule.pattern.sub(rule.template, bare)
            if other != bare:
                renamed.add((rule.spelt, rule.canonical))
                bare = other
    return Canonical(bare, leading, wrappers, frozenset(renamed))


def unwrapped(name: str, adapters: Collection[str] = ()) -> str:
    """Return a name without the components that wrappers put into it.

    `adapters` are names of adapters beside "default".

    >>> unwrapped("module._fsdp_wrapped_module.score.modules_to_save.default.weight")
    'score.weight'
    """
    if adapters:
        name = _ADAPTER_MODULE.sub(lambda m: "" if m[1] in adapters else m[0], name)
    return _WRAPPER.sub("", name)


def without_adapter_name(key: str) -> str:
    """Return the key of an adapter's parameter as PEFT saves it, without the adapter's name.

    >>> without_adapter_name("model.q.lora_A.default.weight"), without_adapter_name("k.ia3_l.a")
    ('model.q.lora_A.weight', 'k.ia3_l')
    """
    return _ADAPTER_NAME.sub(r".\1", key)


def output_leading(body: str) -> str:
    """Return an output layer's leading components, where the language model's body has `body`.

    >>> output_leading("model.language_model."), output_leading("language_model.model.")
    ('', 'language_model.')
    """
    return body.removesuffix("language_model.").removesuffix("model.")


def adapter_name(key: str) -> str | None:
    """Return the adapter's name in the key of its parameter, None where there is none."""
    match = _ADAPTER_NAME.search(key)
    return match[2] if match else None


def is_frozen_copy(name: str) -> bool:
    """Tell whether a tensor is the module that PEFT keeps unchanged beside the trained one."""
    return "original_module." in name and _FROZEN.search(name) is not None


def is_trained_copy(name: str) -> bool:
    """Tell whether a tensor is of the module that PEFT trains in place of the original."""
    return _TRAINED.search(name) is not None
