"""What the names of quantised checkpoints say: which tensor scales, shifts or packs which other."""

import re

# What stands beside a tensor of codes, by the writer: DeepSeek and transformers' fine-grained FP8
# (whose "inverse" multiplies), compressed-tensors and fbgemm, DeepSeek-V4, Mistral, ComfyUI.
_SCALES_OF = ("_scale_inv", "_scale")
_SCALES_BESIDE = (".scale", ".qscale_weight", ".scale_weight")
# What is said of activations, caches and kernels plays no part in weights.
_ACTIVATIONS = re.compile(
    r"(^|[._])(input|activation|act|output|[qkv]|kv|prob)_(scale(_ub|_inv)?|zero_point|global_scale)$"
    r"|\.(qscale_act|scale_input|bias_quant_state|weight_format)$|(^|\.)scaled_fp8$"
)
# Tensors that only quantised checkpoints hold. `weight_scale` alone may be a model's own.
_COMPANION = re.compile(
    r"(_scale_inv|\.SCB|\.(nested_)?(absmax|quant_map)|\.quant_state\.bitsandbytes__\w+"
    r"|\.(qweight|qzeros|g_idx|weight_packed|weight_zero_point|weight_g_idx|qscale_weight))$"
)
_PLAIN_ENDS = (".weight", ".bias")  # of nearly all names, and of no companion
_SCALE = re.compile(r"(\.weight_(scale|global_scale|scale_2|shape)|_proj_scale)$")
# Integers of two and more dimensions that plain models keep: masks and positions.
_BUFFER = re.compile(
    r"(^|[._])(bias|masked_bias|attn_?mask|mask|causal_mask|position_ids|position_index"
    r"|relative_position_index|token_type_ids|tril|idx|index|coords\w*)$"
)


# The tensor of a layer that tells its format; what stands beside it has the same beginning.
_PACKED_LAYER = re.compile(r"(?P<module>.+)\.qweight")  # GPTQ, AWQ
_INT8_SCALES = re.compile(r"(?P<module>.+)\.SCB")  # bitsandbytes
_FOUR_BIT = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>\w+)")
_PACKED_ROWS = re.compile(r"(?P<weight>.+\.weight)_packed")  # compressed-tensors
_STACKED_BLOCKS = re.compile(r"(?P<weight>.+)_blocks")  # gpt-oss
# Quantised checkpoints on the hub, by the habits of those who make them.
_CALLED_QUANTISED = re.compile(
    r"(?i)(^|[-_./])(bnb|gptq|awq|fp8|nf4|int[48]|w[48]a(8|16)|[48]-?bit|mxfp4|nvfp4)([-_./]|$)"
)


def packed_layer(name: str) -> str | None:
    """Return the layer of GPTQ's or AWQ's packed integers, None for another tensor."""
    found = _PACKED_LAYER.fullmatch(name)
    return found["module"] if found else None


def int8_layer(name: str) -> str | None:
    """Return the layer that a tensor of bitsandbytes' scales belongs to, None for another."""
    found = _INT8_SCALES.fullmatch(name)
    return found["module"] if found else None


def four_bit_state(name: str) -> tuple[str, str] | None:
    """Return the weight that a blob of bitsandbytes describes, and its kind; None for another."""
    found = _FOUR_BIT.fullmatch(name)
    return (found["weight"], found["kind"]) if found else None


def packed_rows(name: str) -> str | None:
    """Return the weight that is stored with packed rows, None for another tensor."""
    found = _PACKED_ROWS.fullmatch(name)
    return found["weight"] if found else None


def stacked_blocks(name: str) -> str | None:
    """Return the tensor that gpt-oss stores as blocks, None for another.

    >>> stacked_blocks("mlp.experts.down_proj_blocks"), stacked_blocks("blocks.0.weight")
    ('mlp.experts.down_proj', None)
    """
    found = _STACKED_BLOCKS.fullmatch(name)
    return found["weight"] if found else None


def is_called_quantised(checkpoint: str) -> bool:
    """Tell whether a checkpoint's own name says that it is quantised.

    >>> is_called_quantised("unsloth/llama-3-8b-bnb-4bit"), is_called_quantised("org/habit")
    (True, False)
    """
    return _CALLED_QUANTISED.search(checkpoint) is not None


def scale_names(name: str) -> list[str]:
    """Return the names under which writers keep the scale of a tensor of codes.

    >>> scale_names("q.weight")[:2]
    ['q.weight_scale_inv', 'q.weight_scale']
    """
    module = name.removesuffix(".weight")
    beside = [module + suffix for suffix in _SCALES_BESIDE] if module != name else []
    return [*(name + suffix for suffix in _SCALES_OF), *beside]


def is_of_activations(name: str) -> bool:
    """Tell whether a tensor beside quantised weights says nothing of the weights."""
    return _ACTIVATIONS.search(name) is not None


def is_companion(name: str) -> bool:
    """Tell whether a tensor has a meaning only beside a tensor of codes."""
    return not name.endswith(_PLAIN_ENDS) and _COMPANION.search(name) is not None


def is_weight_scale(name: str) -> bool:
    """Tell whether a tensor scales a weight, if the checkpoint says that it is quantised."""
    return _SCALE.search(name) is not None


def is_integer_buffer(name: str) -> bool:
    """Tell whether integers are a mask or positions, and no codes.

    >>> is_integer_buffer("h.0.attn.bias"), is_integer_buffer("h.0.attn.weight")
    (True, False)
    """
    return _BUFFER.search(name) is not None


# Tensors of formats that are told by name and refused.
_FOREIGN = {
    "quanto": re.compile(r"\.weight\._(data|scale|shift)(\._(data|scale))?$"),
    "hqq": re.compile(r"\.W_q$"),
    "aqlm": re.compile(r"\.codebooks$"),
    "vptq": re.compile(r"\.centroids(\.|$)"),
    "exl2": re.compile(r"\.q_(weight|perm|invperm|groups)$"),
    "exl3": re.compile(r"\.trellis$"),
    "eetq": re.compile(r"\.weight_scales$"),
    "torchao": re.compile(r"(\._weight_qdata|\.weight:_data|\.weight_qdata)$"),
    "spqr": re.compile(r"\.dense_weights$"),
    "mlx": re.compile(r"\.biases$"),
}
_WEIGHT = re.compile(r"(weight|_proj)$")


def foreign_kind(name: str) -> str | None:
    """Return the format, among those that are refused, that a tensor's name tells."""
    return next((kind for kind, own in _FOREIGN.items() if own.search(name)), None)


def is_called_weight(name: str) -> bool:
    """Tell whether integers bear the name of a weight, which plain checkpoints never have."""
    return _WEIGHT.search(name) is not None
