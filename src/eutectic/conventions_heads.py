"""What a tensor's name says of its place in a model: output layers, buffers, parts of a layer.

Beside `conventions.py`, by the same rule: each function answers one question about one name.
"""

import re
from collections.abc import Iterable

# --- Output layers ---

# Modules that turn what a model knows into what one task wants, by the names of transformers, timm,
# torchvision, TRL and sentence-transformers. `fc_norm` replaces a body's last norm in front of
# timm's head; `final_logits_bias` is BART's.
_OUTPUT = re.compile(
    r"(^|\.)(\w*classifier\w*|classification_head|score|logits_proj|logits|heads?|\w+_heads?"
    r"|head_dist|head_norm|fc|fc_norm|last_linear|qa_outputs|cls|\w*predictions?|\w+_predictor"
    r"|pooler|sequence_summary|vocab_(transform|layer_norm|projector)|pred_layer|embed_out"
    r"|output_projection|final_logits_bias|proj_out|(text|visual|image|audio)_projection)(?=\.|$)"
    # Words that mean an output layer at the root only: layers have an `output` of their own.
    r"|^(output|out|linear|projector)(?=\.)"
    r"|(^|\.)decoder(?=\.(weight|bias)$)"
)
# Modules of sentence-transformers behind its transformer, each in a folder of its own.
_MODULE = re.compile(r"\d+_(?!\w*(Transformer|CLIPModel|Router|Asym|Embeddings?)\b)[A-Za-z]\w*\.")
_NUMBERED = re.compile(r"(^|\.)\d+\.")


def output_part(name: str) -> str | None:
    """Return a name from its output layer on, None where it belongs to none.

    An output layer stands beside the layers, never in one: no number comes before it.

    >>> output_part("roberta.classifier.dense.weight"), output_part("h.0.mlp.fc.weight")
    ('classifier.dense.weight', None)
    >>> output_part("2_Dense.linear.weight"), output_part("0_CLIPModel.logit_scale")
    ('2_Dense.linear.weight', None)
    """
    if _MODULE.match(name):
        return name
    match = _OUTPUT.search(name)
    if match is None or _NUMBERED.search(name[: match.start() + 1]):
        return None
    return name[match.start() :].removeprefix(".")


def is_output_layer(name: str) -> bool:
    """Tell whether a tensor belongs to an output layer, by position and convention.

    >>> is_output_layer("score.weight"), is_output_layer("model.layers.0.mlp.gate_proj.weight")
    (True, False)
    """
    return output_part(name) is not None


# Layers around a language model's logits: transforms and biases stay where the matrix is tied.
_VOCABULARY_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|final_logits_bias|pred_layer|predictions"
    r"|vocab_(transform|layer_norm|projector))(?=\.|$)"
)


def vocabulary_heads(names: Iterable[str]) -> frozenset[str]:
    """Return the tensors of the output layers that give a logit per token, their transforms too.

    >>> sorted(vocabulary_heads(["lm_head.bias", "cls.predictions.bias", "bert.pooler.dense.bias"]))
    ['cls.predictions.bias', 'lm_head.bias']
    """
    parts = {name: part for name in names if (part := output_part(name)) is not None}
    return frozenset(name for name, part in parts.items() if _VOCABULARY_HEAD.search(part))


# --- Buffers: computed from the configuration, or counters, and written by some versions only ---

_BUFFER = re.compile(
    r"(^|\.)(position_ids|token_type_ids|(original_)?inv_freq|num_batches_tracked|masked_bias"
    r"|relative_position_index|relative_coords_table|attn_mask|causal_mask|(cos|sin)_cached"
    r"|freqs_(cis|cos|sin)|_float_tensor|embed_positions\.weights)$"
)
# GPT-2's and GPT-NeoX's triangles of ones `[1, 1, n, n]`; a bias of that name has one dimension.
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")


def is_buffer(name: str, dimensions: int) -> bool:
    """Tell whether a tensor is no parameter: it holds nothing that training changes.

    >>> is_buffer("h.0.attn.bias", 4), is_buffer("pool.attention.bias", 1)
    (True, False)
    """
    return _BUFFER.search(name) is not None or (
        dimensions == 4 and _CAUSAL_MASK.search(name) is not None
    )


# --- Parts of a layer, where two models differ in size ---

_KEYS_VALUES = re.compile(r"(^|\.)(k|v|key|value|[kv]_proj|[kv]_lin|kv_proj|W[kv])\.\w+$")
_QUERIES = re.compile(r"(^|\.)(q|query|q_proj|q_lin|qkv|qkv_proj|query_key_value|c_attn)\.\w+$")
_MLP = re.compile(
    r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|c_fc|w[123]|wi|wi_[01]|wo|lin[12]"
    r"|linear[12]|dense_h_to_4h|dense_4h_to_h|intermediate\.dense|(?<!attention\.)output\.dense"
    r"|mlp\.c_proj)\.\w+$"
)
_NORM = re.compile(r"norm|(^|\.)ln_", re.IGNORECASE)


def is_key_or_value(name: str) -> bool:
    """Tell whether a tensor projects to keys or values, apart from the queries."""
    return _KEYS_VALUES.search(name) is not None


def is_query(name: str) -> bool:
    """Tell whether a tensor projects to queries, alone or packed with keys and values."""
    return _QUERIES.search(name) is not None


def is_mlp(name: str) -> bool:
    """Tell whether a tensor is one of an MLP's.

    >>> is_mlp("layer.0.output.dense.weight"), is_mlp("layer.0.attention.output.dense.weight")
    (True, False)
    """
    return _MLP.search(name) is not None


def is_norm(name: str) -> bool:
    """Tell whether a tensor belongs to a normalisation, whose length is the hidden size."""
    return _NORM.search(name) is not None
