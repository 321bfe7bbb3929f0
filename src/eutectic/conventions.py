"""What a tensor's name says: every pattern over tensor and module names, in one place.

Checkpoints say nothing of what their tensors are for; names do, by the habits of the common
libraries. Each function answers one question about one name. Patterns that look alike and differ
stand beside each other, with the reason. Nothing here knows a shape, a file or a model.
"""

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

# --- Vocabularies, whose rows are tokens ---

# Wider than `is_token_embedding`, because a copy is recognised by its content too; position tables
# of their own and relative biases are nobody's output layer.
_VOCABULARY = re.compile(r"embed|(^|\.)(wte|shared)\.")
_OUTPUT_VOCABULARY = re.compile(r"(lm_head|embed_out|output_projection|(^|\.)decoder)\.weight$")
# Exact, because its number of rows becomes the configuration's vocab_size.
_TOKEN_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|wte|shared|tok_embeddings)\.weight$"
)


def may_be_vocabulary(name: str) -> bool:
    """Tell whether a matrix may be a table of tokens, going by its name alone."""
    return _VOCABULARY.search(name) is not None


def is_output_vocabulary(name: str) -> bool:
    """Tell whether a matrix gives one logit per token: a language model's output layer."""
    return _OUTPUT_VOCABULARY.search(name) is not None


@lru_cache(maxsize=1 << 17)  # asked of the base's names for every expert
def is_token_embedding(name: str) -> bool:
    """Tell whether a matrix is the model's input table of tokens, one row per token.

    >>> is_token_embedding("model.embed_tokens.weight"), is_token_embedding("h.0.embed.weight")
    (True, False)
    """
    return _TOKEN_EMBEDDING.search(name) is not None


# --- Classification heads ---

# The weight whose rows are the classes, in transformers' classifiers. Exact, unlike
# `classification_head`: their number becomes that of the configuration's classes.
CLASSIFIERS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
_HEAD = re.compile(r"(^|\.)(\w*classifier\w*|classification_head|score|logits_proj|head)(?=\.)")


def classification_head(name: str) -> str | None:
    """Return the module that is a head by the habits of transformers and timm, None for no head.

    >>> classification_head("roberta.classifier.out_proj.weight")
    'roberta.classifier'
    """
    match = _HEAD.search(name)
    return name[: match.end()] if match else None


# --- Layouts ---

# transformers' Conv1D and OpenCLIP's projections keep weights as [in, out].
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_OPENCLIP_PROJECTION = re.compile(r"(^|\.)(visual\.proj|text_projection)$")
_TEXT_PROJECTION = re.compile(r"(^|\.)text_projection(\.weight)?$")
PARTS = ("[q]", "[k]", "[v]")  # of a packed in-projection, where their inputs differ


def is_conv1d(name: str) -> bool:
    """Tell whether a weight is a `Conv1D`'s, kept `[in, out]`, in a model of `CONV1D_MODELS`."""
    return _CONV1D.search(name) is not None


def is_openclip_projection(name: str) -> bool:
    """Tell whether a matrix is one of OpenCLIP's bare parameters, kept `[in, out]`."""
    return _OPENCLIP_PROJECTION.search(name) is not None


def is_text_projection(name: str) -> bool:
    """Tell whether a matrix is CLIP's text projection, a module or a bare parameter."""
    return _TEXT_PROJECTION.search(name) is not None


def is_packed(name: str) -> bool:
    """Tell whether a tensor is the in-projection of `nn.MultiheadAttention`, rows q, k, v."""
    return name.endswith("in_proj_weight")


def is_counter(name: str) -> bool:
    """Tell whether a buffer is batch norm's counter: it always differs, and means nothing."""
    return name.endswith("num_batches_tracked")


# --- Layers ---

# Attention projections and the first matrix of the MLP, by the names of the common libraries.
_ROUTED = re.compile(
    r"\.(in_proj_weight"
    r"|((attn|attention|SelfAttention|EncDecAttention|self_attn|cross_attn|encoder_attn)\."
    r"([qkvo]|kv|dense|c_proj|proj|out|to_out\.0|output\.dense|Wo|value_proj|output_proj))\.weight"
    r"|(query|key|value|[qkvo]_proj|out_proj|[qkv]_lin|out_lin|c_attn|q_attn|qkv_proj|qkv"
    r"|query_key_value|W_?qkv|linear_[qkv]|linear_out)(\.linear)?\.weight"
    r"|(q_[ab]_proj|kv_[ab]_proj|kv_a_proj_with_mqa)\.weight"  # through a space of low rank
    r"|(intermediate\.dense|fc1|c_fc|[Ww]i|wi_[01]|up_proj|gate_proj|gate_up_proj|lin1|linear1"
    r"|dense_h_to_4h|w1|w3|intermediate_dense)(\.linear)?\.weight)$"
)
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.[])")


def is_attention_or_mlp_input(name: str) -> bool:
    """Tell whether a weight is an attention projection or the first matrix of an MLP.

    >>> is_attention_or_mlp_input("h.0.mlp.c_fc.weight")
    True
    """
    return _ROUTED.search(f".{name}") is not None


def layer_group(name: str) -> str:
    """Return a name with every layer number replaced: like layers share it.

    A part of a fused matrix, `name[part]`, is like the same part of the other layers.

    >>> layer_group("encoder.layer.11.attention.self.query.weight")
    'encoder.layer.*.attention.self.query.weight'
    >>> layer_group("layers.7.mlp.experts.gate_up_proj.3[1]")
    'layers.*.mlp.experts.gate_up_proj.*[1]'
    """
    return _LAYER_NUMBER.sub("*", name)


_TO_LAYER_NUMBER = re.compile(r"(.*?(?<![^.])\d+)\..*")


def block_of(name: str) -> str:
    """Return the repeated part of a network that a tensor is in; the tensor itself where in none.

    >>> block_of("vit.encoder.layer.3.output.dense.weight"), block_of("head.weight")
    ('vit.encoder.layer.3', 'head.weight')
    """
    found = _TO_LAYER_NUMBER.fullmatch(name)
    return name if found is None else found[1]


# --- Modules: what reaches them ---

_IMAGE = re.compile(r"(^|[._])(vision|visual|image|multi_modal)")
_KEYS_AND_VALUES = re.compile(
    r"(encdec|cross_?att|encoder_?att).*\.((k|v|key|value)(_proj)?|c_attn)(\.base_layer)?$"
    r"|(^|\.)enc_to_dec_proj(\.base_layer)?$",
    re.IGNORECASE,
)


def reads_image(path: str) -> bool:
    """Tell whether a module sees the patches of an image, of which none is padding."""
    return _IMAGE.search(path) is not None


_PICTURES_TOWER, _TEXTS_TOWER = "vision_model.", "text_model."  # of models with two towers


def image_tower_names(names: Iterable[str], whole: Collection[str]) -> dict[str, str]:
    """Return what a tower of pictures' tensors are called in a model with a text tower beside it.

    >>> image_tower_names(["encoder.a", "head"], ["vision_model.encoder.a", "text_model.encoder.a"])
    {'encoder.a': 'vision_model.encoder.a'}
    """
    found: dict[str, str] = {}
    for name in names:
        inner = name.removeprefix(_PICTURES_TOWER)
        if f"{_PICTURES_TOWER}{inner}" in whole:
            found[name] = f"{_PICTURES_TOWER}{inner}"
        elif name in whole and not name.startswith(_TEXTS_TOWER):
            found[name] = name  # a projection
    return found


def reads_encoder(path: str) -> bool:
    """Tell whether a decoder's module reads the encoder's states: keys, values, projections."""
    return _KEYS_AND_VALUES.search(path) is not None


# --- PEFT ---

PEFT_ROOT = "base_model.model."
IA3_SUFFIX = ".ia3_l"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
# Modules that adapters add beside the layer they adapt; their inputs are not a base weight's.
_ADAPTER_PART = re.compile(r"\.(lora_\w+|original_module)(\.|$)")


def lora_factor(key: str) -> re.Match[str] | None:
    """Return the groups `module`, `embedding` and `side` of a LoRA factor's key, else None."""
    return _FACTOR.fullmatch(key)


def is_adapter_part(name: str) -> bool:
    """Tell whether a module or parameter in memory belongs to an adapter, not to the base."""
    return _ADAPTER_PART.search(f".{name}") is not None


def canonical_name(name: str) -> str:
    """Return the checkpoint's name of a parameter in memory, of a wrapped (PEFT, compiled) model.

    Unlike an adapter's file (`conventions_names`), memory knows every adapter by its name.

    >>> canonical_name("base_model.model.encoder.q.base_layer.weight")
    'encoder.q.weight'
    >>> canonical_name("base_model.model.encoder.q.ia3_l.default")
    'encoder.q.ia3_l'
    """
    name = name.replace("_orig_mod.", "").removeprefix(PEFT_ROOT)
    name = name.replace(".base_layer.", ".")
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return re.sub(r"\.ia3_l\.[^.]+$", IA3_SUFFIX, name)


# --- Adapters of other programs, in files of their own ---

_KOHYA_KEY = re.compile(r"(lora_(unet|te\d?|transformer|prior)|lycoris)_")
_DIFFUSERS_KEY = re.compile(
    r"(unet|text_encoder(_\d)?|transformer|prior)\..*(lora[._](A|B|up|down)|_lora\.|\.alpha$)"
    r"|.*_lora\.(up|down)\.weight"
)
_MLX_KEY = re.compile(r".+\.(lora_[ab]|m)$")  # with the magnitude of DoRA
_LORA_KEY = re.compile(r".*(lora_|\.lora\.|\.hada_w|\.lokr_w|\.alpha$|\.dora_scale)")


def adapter_keys(keys: Iterable[str]) -> str | None:
    """Return whose adapter a file is that holds nothing else: kohya, diffusers, mlx or peft.

    None where any key is a model's own: some models have LoRA factors in their checkpoints.

    >>> adapter_keys(["lora_unet_mid.lora_up.weight", "lora_unet_mid.alpha"])
    'kohya'
    >>> adapter_keys(["model.layers.0.q_proj.weight", "model.layers.0.q_proj.lora_a"])
    """
    own = list(keys)
    kinds = {"kohya": _KOHYA_KEY, "mlx": _MLX_KEY, "diffusers": _DIFFUSERS_KEY, "peft": _LORA_KEY}
    if not any("lora" in key or "hada" in key or "lokr" in key for key in own):
        return None
    return next((kind for kind, key in kinds.items() if all(map(key.match, own))), None)


_ORIGINAL_LLAMA = re.compile(r"tok_embeddings\.weight|layers\.\d+\.attention\.w[qkvo]\.weight")


def original_llama_key(name: str) -> bool:
    """Tell whether a name is of Meta's or Mistral's own format, before conversion."""
    return _ORIGINAL_LLAMA.fullmatch(name) is not None
