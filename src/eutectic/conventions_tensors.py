"""What a tensor's name says of what it is: a linear map, a table, a kernel, vectors.

A name says it at its end: the parameter's own name, and the module that holds it. What stands
before says where the module is, not what: a linear layer inside of an embedding is a linear layer.
Shapes are looked at by whoever asks (`planning/treatment.py`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NUMBERS = re.compile(r"(^|\.)\d+(?=\.|$)")
# Weight norm and spectral norm keep a weight under another name. The direction (or the unscaled
# weight) has its shape; the magnitudes beside it are vectors.
_DIRECTION = re.compile(r"\.(parametrizations\.weight\.original1?|weight_v|weight_orig)$")
_MAGNITUDE = re.compile(r"(\.parametrizations\.weight\.original0|(^|[._])weight_g)$")


def holder(name: str) -> tuple[str, str, str]:
    """Return a tensor's own name, the module that holds it, and the one around that.

    Numbers of layers and of parts are passed over.

    >>> holder("encoder.layers.3.mlp.0.weight")
    ('weight', 'mlp', 'layers')
    >>> holder("pos_conv.parametrizations.weight.original1")
    ('weight', 'pos_conv', '')
    """
    plain = _NUMBERS.sub("", _DIRECTION.sub(".weight", name))
    *_, around, module, own = ("", "", *plain.split("."))
    return own, module, around


def bias_beside(name: str) -> str:
    """Return the name of the bias that a module with this weight would have.

    >>> bias_beside("ups.0.weight_v")
    'ups.0.bias'
    """
    return re.sub(r"(^|\.)weight$", r"\1bias", _DIRECTION.sub(".weight", name))


# --- Parameters of a module's own, by their own names ---

# Positions relative to each other, with a bias for each: tables, though they are called biases.
_RELATIVE = re.compile(
    r"^(rel(ative)?_(pos|attention|bias|height|width)|attention_bias(es)?$|attn_bias_table)"
    r"|(^|_)position_bias|^(height|width)_rel$"
)
_MAP = re.compile(r"(proj|projection|weights?|kernel|matrix|linear|gate|(^|_)(w|fc)\d?)$")
_NORM_WEIGHT = re.compile(r"(norm|scale)_weights?$")
_VECTORS = re.compile(
    r"(^|_)bias(es)?(_[a-z0-9]+)?$"  # biases of a stack or per head: `pos_bias_u`, `r_w_bias`
    r"|(^|_)(scales?|gains?|gammas?|betas?|alphas?|lambdas?|temperature|slopes?|sinks?|decay|norm)(_|\d*$)"
    r"|^(A_logs?|Ds?|dts?|freqs)$"  # of state spaces: one row per channel
    r"|^time_(mix|first|faaaa|maa|decay)(_[a-z]+)?$|^x_[rwkvag]$|^[rk]_[ka]$"  # RWKV
    r"|^ls\d?$|_magnitude(_vector)?$"
)
_TABLE = re.compile(
    r"embed|(^|_)emb(s?|_.*)$|position(s|_.*|al.*)?$|(^|_)pos(_.*)?$|(^|_)ape$|lookup|_table$|codebook"
    r"|codevector|(^|_)tokens?(\d|_.*)?$|(^|_)(latents?|quer(y|ies)|probes?|prompts?|ctx)(_[a-z0-9]+)?$"
)


def is_vectors(own: str) -> bool:
    """Tell whether a bare parameter of two axes and more is a stack of vectors, such as biases.

    >>> is_vectors("gate_up_proj_bias"), is_vectors("A_log"), is_vectors("relative_position_bias")
    (True, True, False)
    """
    if _RELATIVE.search(own) or (_MAP.search(own) and not _NORM_WEIGHT.search(own)):
        return False
    return _VECTORS.search(own) is not None


def is_table_parameter(own: str) -> bool:
    """Tell whether a bare parameter is a table: of positions, learned tokens, queries, codes.

    >>> is_table_parameter("rel_pos_h"), is_table_parameter("query"), is_table_parameter("q_proj")
    (True, True, False)
    """
    if _RELATIVE.search(own):
        return True
    return _MAP.search(own) is None and not is_vectors(own) and _TABLE.search(own) is not None


def is_map_parameter(own: str) -> bool:
    """Tell whether a bare parameter is called after what multiplies: `x_proj_weight`."""
    return _MAP.search(own) is not None


# --- Modules that hold a `weight` ---

_NORM_MODULE = re.compile(r"norm(\d|_\w)*$|(^|_)(ln|bn|grn|rms)(_?\d|_[a-z])*$", re.IGNORECASE)
_LINEAR_MODULE = re.compile(
    r"proj|dense|linear|mapping|transformation|(^|_)(fc|lin|mlp|out|up|down|gate)(_?\d)?$"
    r"|embed_out$|unembed|patch(es)?_?embed|^(bbox|time|class)_embed$|^timestep_embed",
    re.IGNORECASE,
)
_TABLE_MODULE = re.compile(
    r"embed|^(wte|wpe|shared|tokens?_type\w*)$|relative_attention_bias|(^|_)embs?(_.*)?$|_tokens?$"
    r"|codebooks?$|lookup|(^|_)quer(y|ies)_feat|^reference_points$|^refpoint|^pe(_[a-z])?$"
    r"|^bias_values$",
    re.IGNORECASE,
)
_EMBEDDER = re.compile(r"(^|_)embedder$")  # of patches, it is linear; of rows and queries, a table
# A module of such a name is a table where the one around it is of embeddings.
_EMBEDDING = re.compile(r"^(\w+_)?embed(ding|der)?s?$")
_PLAIN = re.compile(r"^(tok|token|pos|position|word|segment|type|row|col|column)s?(_\w+)?$")
# A table that its module's name alone does not tell: CTRL's tokens, EoMT's queries.
_TABLE_AT_THE_TOP = re.compile(r"^((transformer|model)\.)?(w|query)\.weight$")


def is_norm_module(module: str) -> bool:
    """Tell whether a module normalises: its weights scale, each entry by itself.

    >>> is_norm_module("q_norm"), is_norm_module("LayerNorm"), is_norm_module("norm_proj")
    (True, True, False)
    """
    return _NORM_MODULE.search(module) is not None


def is_table(name: str) -> bool:
    """Tell whether a weight of two axes, without a bias beside it, is a lookup table.

    >>> is_table("bert.embeddings.position_embeddings.weight"), is_table("lm_head.weight")
    (True, False)
    >>> is_table("embeddings.projection.weight"), is_table("embeddings.token.weight")
    (False, True)
    """
    _, module, around = holder(name)
    if _LINEAR_MODULE.search(module) or (_EMBEDDER.search(module) and "patch" in around):
        return False
    if _TABLE_MODULE.search(module) or (_EMBEDDING.search(around) and _PLAIN.search(module)):
        return True
    return _TABLE_AT_THE_TOP.search(name) is not None


def is_magnitude(name: str) -> bool:
    """Tell whether a tensor holds the magnitudes of a weight that is normalised."""
    return _MAGNITUDE.search(name) is not None


# --- Three axes: stacks of matrices, kernels, and maps with an axis of heads ---

_EXPERTS = re.compile(r"expert|(^|[._])moe([._]|$)", re.IGNORECASE)
_EXPERTS_IN_ROWS = re.compile(r"(^|\.)experts\.mlp\.(w[12]|v1)$")
_KERNEL = re.compile(r"conv|(^|[._])(kernel|filter)s?([._]|$)", re.IGNORECASE)
_TRANSPOSED_KERNEL = re.compile(
    r"deconv|conv_?transpose|transposed?_?conv|convtr([._]|$)|convt_", re.IGNORECASE
)
_EXPERT_COUNT = re.compile(r"^(moe_)?(num|n)_(\w+_)?experts$|^moe_num_experts$")
# Kernels of several experts in two axes, `[E, out·in·k·k]`, of timm's CondConv.
_FLAT_KERNEL = re.compile(r"^conv_(dw|pwl?)$")
# [in, heads, size] or [out, heads, size]: one map, of XLNet and Funnel.
_HEADS_APART = re.compile(r"(^|\.)(rel_attn\.[qkvor]|r_kernel)$")


def is_expert_stack(name: str) -> bool:
    """Tell whether a name says that three axes are a mixture's experts, not a kernel.

    >>> is_expert_stack("block_sparse_moe.input_linear.weight"), is_expert_stack("conv.weight")
    (True, False)
    """
    return _EXPERTS.search(name) is not None


def experts_in_rows(name: str, rows: int, config: Mapping[str, Any]) -> int:
    """Return how many experts' matrices lie one below the other in a matrix, 1 for a single one.

    DBRX keeps `experts.mlp.w1` as `[E·width, hidden]`.

    >>> experts_in_rows("ffn.experts.mlp.w1", 64, {"ffn_config": {"moe_num_experts": 4}})
    4
    """
    count = max(expert_counts(config), default=1)
    alike = _EXPERTS_IN_ROWS.search(name) is not None and count > 0
    return count if alike and rows > count and rows % count == 0 else 1


def is_kernel(name: str) -> bool:
    """Tell whether a name says that a weight is a convolution's."""
    return _KERNEL.search(name) is not None


def is_transposed_kernel(name: str) -> bool:
    """Tell whether a name says that a weight is a transposed convolution's.

    >>> is_transposed_kernel("deconv_layers.0.weight"), is_transposed_kernel("conv1.weight")
    (True, False)
    """
    return _TRANSPOSED_KERNEL.search(name) is not None


def is_linear_module(module: str) -> bool:
    """Tell whether a module's name is that of a linear layer, or of several in a stack."""
    return _LINEAR_MODULE.search(module) is not None


def is_flat_kernel(module: str) -> bool:
    """Tell whether a weight of two axes without a bias holds kernels, one in each row."""
    return _FLAT_KERNEL.search(module) is not None


def has_heads_apart(name: str) -> bool:
    """Tell whether three axes are one linear map, whose rows or columns are split by heads."""
    return _HEADS_APART.search(name) is not None


def expert_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield every number of experts that a configuration states, also of a part of the model."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from expert_counts(value)
        elif _EXPERT_COUNT.search(key) and type(value) is int:
            yield value
