"""How GGUF files call the tensors of transformers' models, architecture by architecture.

The names are those of llama.cpp's converter (gguf's `tensor_mapping.py`, `convert_hf_to_gguf.py`),
read backwards; what the converter changes besides (rows of queries and keys, norms, transposes)
is undone where the tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LLAMA: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output": "lm_head",
    "output_norm": "transformer.ln_f",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture is in transformers.

    Attributes:
        model_type: of the configuration.
        model: class of the language model.
        names: name in GGUF, without layer and ending -> name in transformers.
        layers: what stands before the number of a layer.
        turned: whether the rows of queries and keys are in the order of llama.cpp's rotation.
        norm_plus_one: whether norms are stored with 1 added.
        transposed: matrices that transformers keeps `[in, out]`.
    """

    model_type: str
    model: str
    names: Mapping[str, str]
    layers: str = "model.layers."
    turned: bool = False
    norm_plus_one: bool = False
    transposed: frozenset[str] = frozenset()


_GEMMA = {**_LLAMA, **_GEMMA_SANDWICH}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, turned=True),
    "mistral": Architecture("mistral", "MistralForCausalLM", _LLAMA, turned=True),
    "mixtral": Architecture("mixtral", "MixtralForCausalLM", {**_LLAMA, **_MIXTRAL}, turned=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _LLAMA, norm_plus_one=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA, norm_plus_one=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA, norm_plus_one=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", {**_LLAMA, "ffn_up": "mlp.gate_up_proj"}),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        _GPT2,
        layers="transformer.h.",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<kind>[a-z0-9_]+)\.(?P<ending>weight|bias)")
# Computed from the configuration; transformers keeps no such tensors.
_BUFFERS = re.compile(r"(^|\.)(rope_freqs|rope_factors_(long|short))\.weight$")


@dataclass(frozen=True)
class GgufName:
    """What a tensor of a GGUF file is."""

    kind: str  # such as "attn_q"
    name: str  # in transformers; `{expert}` where it is a stack of experts


def is_gguf_buffer(name: str) -> bool:
    """Tell whether a tensor of a GGUF file is computed from the configuration."""
    return _BUFFERS.search(name) is not None


def named_in_transformers(name: str, architecture: Architecture) -> GgufName | None:
    """Return what a tensor is called in transformers, None where that is not known.

    >>> named_in_transformers("blk.3.attn_q.weight", ARCHITECTURES["llama"]).name
    'model.layers.3.self_attn.q_proj.weight'
    """
    match = _NAME.fullmatch(name)
    own = None if match is None else architecture.names.get(match["kind"])
    if match is None or own is None:
        return None
    layer = "" if match["layer"] is None else f"{architecture.layers}{int(match['layer'])}."
    return GgufName(match["kind"], f"{layer}{own}.{match['ending']}")


def is_norm_of_gguf(kind: str) -> bool:
    """Tell whether a kind of tensor is a norm.

    >>> is_norm_of_gguf("attn_q_norm"), is_norm_of_gguf("attn_q")
    (True, False)
    """
    return kind.endswith("norm")
