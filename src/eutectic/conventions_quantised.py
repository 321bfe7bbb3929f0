"""What the names of quantised checkpoints say: which tensor scales, shifts or packs which other."""

import re

# What stands beside a tensor of codes, by the writer: DeepSeek and transformers' fine-grained FP8
# (whose "inverse" multiplies), compressed-tensors and fbgemm, DeepSeek-V4, Mistral, ComfyUI.
_SCALES_OF = ("_scale_inv", "_scale")
_SCALES_BESIDE = (".scale", ".qscale_weight", ".scale_weight")
BLOCKS, SCALES = "_blocks", "_scales"  # of gpt-oss
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
_SCALE = re.compile(r"(\.weight_(scale|global_scale|scale_2|shape)|_proj_scale)$")
# Integers of two and more dimensions that plain models keep: masks and positions.
_BUFFER = re.compile(
    r"(^|[._])(bias|masked_bias|attn_?mask|mask|causal_mask|position_ids|position_index"
    r"|relative_position_index|token_type_ids|tril|idx|index|coords\w*)$"
)


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
    return _COMPANION.search(name) is not None


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
