"""What a tensor's name says of its place among the layers and parts of a model.

Beside `conventions.py`, by the same rule: each function answers one question about names.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from eutectic.conventions import reads_image
from eutectic.conventions_heads import is_output_layer

_LAYER = re.compile(r"^(?P<stack>.+?)\.(?P<number>\d+)(?P<rest>\..*)$")
# What turns tokens, positions and patches into the first layer's inputs, and what goes with it.
_BEFORE = re.compile(
    r"embed|(^|\.)(wte|wpe|shared|tok_embeddings)\.|rotary|inv_freq|relative_pe|slopes|patch"
    r"|(^|\.)(ln_pre|pre_layrnorm|layernorm_pre|conv\d?)\."
)
_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|connector|merger|deepstack_merger_list|projector)\."
)
_VISION = ("vision", "visual")
_TEXT = ("text", "language", "llm")


@lru_cache(maxsize=1 << 17)
def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack of layers that a tensor lies in and the layer's number, None outside.

    The first number in a name counts: layers have numbered parts, such as a mixture's experts.

    >>> layer_of("model.layers.3.mlp.experts.7.w1.weight"), layer_of("model.norm.weight")
    (('model.layers', 3), None)
    """
    match = _LAYER.match(name)
    return None if match is None else (match["stack"], int(match["number"]))


def at_layer(name: str, number: int) -> str:
    """Return the name of the same tensor of another layer.

    >>> at_layer("model.layers.3.mlp.experts.7.w1.weight", 5)
    'model.layers.5.mlp.experts.7.w1.weight'
    """
    match = _LAYER.match(name)
    return name if match is None else f"{match['stack']}.{number}{match['rest']}"


def stack_depths(names: Iterable[str]) -> dict[str, int]:
    """Return each stack of layers and how many layers it has."""
    depths: dict[str, int] = {}
    for name in names:
        found = layer_of(name)
        if found is not None:
            depths[found[0]] = max(depths.get(found[0], 0), found[1] + 1)
    return depths


def stands_before_layers(name: str) -> bool:
    """Tell whether a tensor outside the layers makes the first layer's inputs.

    >>> stands_before_layers("model.embed_tokens.weight"), stands_before_layers("model.norm.weight")
    (True, False)
    """
    return _BEFORE.search(name) is not None and not is_output_layer(name)


def belongs_to(name: str, part: str) -> bool:
    """Tell whether a tensor belongs to a part of the model, as recipes name parts.

    `text…` and `language…` are all but what sees images and what hands them over, `vision…` what
    sees images, `…projector` and `…merger` what hands them over, `encoder` and `decoder` the two
    stacks of a translator, `shared` what is neither's; anything else is what names begin with.

    >>> belongs_to("model.visual.blocks.0.attn.qkv.weight", "vision_tower")
    True
    """
    if part in ("", "default"):
        return True
    projector = _PROJECTOR.search(name) is not None
    if "projector" in part or "merger" in part or "connector" in part:
        return projector
    if part.startswith(_VISION):
        return reads_image(name) and not projector
    if part.startswith(_TEXT):
        return not reads_image(name) and not projector
    if part in ("encoder", "decoder"):
        return f".{name}".find(f".{part}.") >= 0
    if part == "shared":
        return not any(belongs_to(name, own) for own in ("encoder", "decoder"))
    return name.startswith(f"{part}.")


def main_stacks(names: Iterable[str]) -> list[str]:
    """Return the stacks of layers that a language model runs through, the deepest first.

    What sees images has layers of its own, which are left out where there are others.
    """
    depths = stack_depths(names)
    text = {stack: n for stack, n in depths.items() if belongs_to(f"{stack}.", "text")}
    chosen = text or depths
    outer = {
        stack: n
        for stack, n in chosen.items()
        if not any(stack.startswith(f"{o}.") for o in chosen)
    }
    return sorted(outer, key=lambda stack: (-outer[stack], stack))


# --- Mixtures, whose experts transformers 5 packs in memory ---

_EXPERT = re.compile(
    r"\.(?:block_sparse_moe|mlp|feed_forward)\.experts\.\d+\."
    r"(?P<own>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)
_SPARSE = re.compile(r"\.block_sparse_moe\.")


@lru_cache(maxsize=1 << 17)
def spellings(name: str) -> tuple[str, ...]:
    """Return a tensor's name in the file, and as transformers 5 has it in memory where it differs.

    >>> spellings("model.layers.0.block_sparse_moe.experts.3.w1.weight")[1]
    'model.layers.0.mlp.experts.gate_up_proj'
    """
    match = _EXPERT.search(name)
    if match is not None:
        packed = "down_proj" if match["own"] in ("w2", "down_proj") else "gate_up_proj"
        return (name, f"{name[: match.start()]}.mlp.experts.{packed}")
    if _SPARSE.search(name):
        return (name, _SPARSE.sub(".mlp.", name))
    return (name,)


# --- Configurations ---

# Keys that say how many layers a stack has.
_DEPTH_KEYS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"),
    *("decoder_layers", "num_decoder_layers"),
)
# Keys that list layers by their numbers.
LAYER_LISTS = frozenset(
    {
        *("mlp_only_layers", "cross_attention_layers", "full_attention_idxs", "attn_layer_idxs"),
        *("moe_layers", "dense_layers", "full_attn_idxs", "attention_layers_idx"),
        *("fullatt_block_indexes", "deepstack_visual_indexes"),
    }
)


def depth_keys(stack: str) -> list[str]:
    """Return the keys of a configuration that may say how many layers a stack has.

    >>> depth_keys("decoder.block")
    ['decoder_layers', 'num_decoder_layers']
    """
    words = stack.split(".")
    if "decoder" in words:
        return [key for key in _DEPTH_KEYS if "decoder" in key]
    if "encoder" in words:
        return [key for key in _DEPTH_KEYS if "decoder" not in key]
    return list(_DEPTH_KEYS)


def is_for_stack(stack: str, part: str) -> bool:
    """Tell whether a part of a configuration ("" for the outermost) is that of a stack of layers.

    >>> is_for_stack("model.language_model.layers", "text_config"), is_for_stack("h", "")
    (True, True)
    """
    if not part:
        return True
    if reads_image(f"{stack}."):
        return part.startswith(_VISION)
    if "encoder" in stack.split(".") or "decoder" in stack.split("."):
        return part in stack.split(".")
    return part.startswith(_TEXT) or part == "llm_config"
