"""What a name says of a matrix that is kept together with others, or apart from them.

The matrices of a mixture's experts are kept one by one (`experts.3.gate_proj.weight`), stacked
(`experts.down_proj`), and stacked with gate and up in one (`experts.gate_up_proj`). Sources:
`conversion_mapping.py` and the models of transformers, vLLM's `w13_weight`, unsloth's gpt-oss.
Names are canonical ones (`conventions_names`). Nothing here knows a file or a model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GATE_UP = ("gate", "up")
QKV = ("q", "k", "v")
_ROLES = {
    **{"gate_proj": ("gate",), "w1": ("gate",), "linear": ("gate",)},  # Mixtral; Grok
    **{"up_proj": ("up",), "w3": ("up",), "linear_v": ("up",)},
    **{"down_proj": ("down",), "w2": ("down",), "linear_1": ("down",)},
    **{
        "gate_up_proj": GATE_UP,
        "w13": GATE_UP,
        "input_linear": GATE_UP,
        **{"output_linear": ("down",), "fc1": GATE_UP, "fc2": ("down",)},
    },
    **{"gate_up_projs": GATE_UP, "gate_projs": ("gate",), "up_projs": ("up",)},
    "down_projs": ("down",),
    **{"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "qkv_proj": QKV},
}
_SINGLE = re.compile(
    r"(?P<group>.*(?<![^.])experts)\.(?P<expert>\d+)\.(?:mlp\.)?"
    r"(?P<role>gate_up_proj|gate_proj|up_proj|down_proj|w[123]|linear(?:_v|_1)?)\.(?P<kind>weight|bias)"
)
_LISTED = re.compile(
    r"(?P<group>.*(?<![^.])experts)\.(?P<role>(?:gate_up|gate|up|down)_projs)\.(?P<expert>\d+)\."
    r"(?P<kind>weight|bias)"
)
_STACKED = re.compile(
    r"(?P<group>.*(?<![^.])experts)\.(?P<role>gate_up_proj|gate_proj|up_proj|down_proj|w13|w[123]|fc[12](?=\.weight))"
    r"(?:[._](?P<kind>weight|bias))?"
)
# Granite's and JetMoE's stacks; of two dimensions in the shared expert.
_LINEARS = re.compile(r"(?P<group>.*)\.(?P<role>(?:in|out)put_linear)\.(?P<kind>weight)")
# Phi-3 keeps together, in this order of rows, what Llama-like models keep apart.
_DENSE = re.compile(
    r"(?P<group>.*(?:mlp|shared_experts?))\.(?P<role>gate_up_proj|gate_proj|up_proj)\."
    r"(?P<kind>weight|bias)"
    r"|(?P<attention>.*self_attn)\.(?P<projection>qkv_proj|[qkv]_proj)\.(?P<type>weight|bias)"
)

# Models that keep stacks as [E, in, out]; all others in the conventions keep [E, out, in].
INPUTS_FIRST = frozenset(
    {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"}
)
OUTPUTS_FIRST = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3"}
    | {"glm4_moe", "minimax", "phimoe", "granitemoe", "granitemoeshared", "granitemoehybrid"}
    | {"jetmoe", "lfm2_moe", "jamba", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "flex_olmo"}
)
# Models whose fused rows alternate: gate, up, gate, up …
ALTERNATING = frozenset({"gpt_oss"})


@dataclass(frozen=True)
class Packing:
    """What one tensor holds: matrices of one module, by their roles in the order of rows."""

    group: str  # the module's canonical path
    roles: tuple[str, ...]
    kind: str  # "weight" or "bias"
    expert: int | None = None  # number of the expert; None where all are stacked, or none is
    stacked: bool = False  # the first dimension counts experts


def packing(name: str, dimensions: int) -> Packing | None:
    """Return what a tensor with a canonical name holds, None where it is no such matrix.

    >>> packing("layers.0.mlp.experts.3.w1.weight", 2)
    Packing(group='layers.0.mlp.experts', roles=('gate',), kind='weight', expert=3, stacked=False)
    """
    for pattern in (_SINGLE, _LISTED):
        if match := pattern.fullmatch(name):
            wanted = 2 if match["kind"] == "weight" else 1
            if dimensions != wanted:
                return None
            roles = _ROLES[match["role"]]
            return Packing(match["group"], roles, match["kind"], int(match["expert"]))
    if match := _STACKED.fullmatch(name):
        kind = match["kind"] or "weight"
        wanted = 3 if kind == "weight" else 2
        if dimensions != wanted:
            return None
        return Packing(match["group"], _ROLES[match["role"]], kind, stacked=True)
    if match := _LINEARS.fullmatch(name):
        roles, group = _ROLES[match["role"]], match["group"]
        if dimensions == 3:
            return Packing(f"{group}.experts", roles, "weight", stacked=True)
        return Packing(group, roles, "weight") if dimensions == 2 else None
    if match := _DENSE.fullmatch(name):
        group = match["group"] or match["attention"]
        role = match["role"] or match["projection"]
        kind = match["kind"] or match["type"]
        if dimensions != (2 if kind == "weight" else 1):
            return None
        return Packing(group, _ROLES[role], kind)
    return None


def attention_heights(config: Mapping[str, Any], rows: int) -> tuple[int, int, int] | None:
    """Return how many of the rows of a fused q, k and v are each; None where nothing says.

    >>> attention_heights({"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}, 48)
    (32, 8, 8)
    """
    for part in (config, *(own for own in config.values() if isinstance(own, Mapping))):
        heads, width = part.get("num_attention_heads"), part.get("hidden_size")
        if not isinstance(heads, int) or heads < 1:
            continue
        pairs = part.get("num_key_value_heads") or heads
        size = part.get("head_dim") or (width // heads if isinstance(width, int) else 0)
        if isinstance(pairs, int) and isinstance(size, int) and size:
            if (heads + 2 * pairs) * size == rows:
                return heads * size, pairs * size, pairs * size
    return None
