"""The order of a model's tensors from its inputs to its outputs, by their names alone."""

import re
from collections.abc import Iterable
from typing import Any

_NUMBER = re.compile(r"(?:^|[.\[])(\d+)(?=[.\[\]]|$)")
_INPUTS = re.compile(
    r"embed|(^|\.)(wte|wpe|shared|patch\w*|pos\w*|cls_token|conv1|conv_in|stem)(\.|$)", re.I
)
_CROSS = re.compile(r"cross_?att|enc_?dec_?att|encoder_att", re.I)
_ATTENTION = re.compile(r"att", re.I)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense_?relu|intermediate|(^|\.)(fc\d?|w[123]|output|lin[12])(\.|$)"
    r"|up_proj|gate_proj|down_proj|experts",
    re.I,
)
# Inside an attention or an MLP: what reads the layer's input first, what writes its output last.
_ROLES = tuple(
    re.compile(rf"(^|\.)({words})(\.|$)", re.I)
    for words in (
        "q|query|q_proj|q_lin|wq|qkv|qkv_proj|query_key_value|c_attn|in_proj\\w*|router|gate",
        "k|key|k_proj|k_lin|wk",
        "v|value|v_proj|v_lin|wv",
        "gate_proj|gate_up_proj|w1|wi|wi_0",
        "up_proj|w3|wi_1|fc1|c_fc|lin1|intermediate|dense_h_to_4h",
        "o|output|o_proj|out_proj|out_lin|wo|c_proj|down_proj|w2|fc2|lin2|dense|dense_4h_to_h",
    )
)


def in_model_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which an input meets their layers.

    Tables of inputs come first, then every tower's blocks by number, then what no block holds: the
    last norm and the heads. Inside a block attention precedes the MLP. Encoders precede decoders,
    other towers keep the order in which they are met.

    >>> in_model_order(["lm_head.weight", "layers.10.mlp.up_proj.weight",
    ...                 "layers.9.mlp.down_proj.weight", "layers.9.self_attn.q_proj.weight"])
    ['layers.9.self_attn.q_proj.weight', 'layers.9.mlp.down_proj.weight', 'layers.10.mlp.up_proj.weight', 'lm_head.weight']
    """  # noqa: E501
    listed = list(names)
    towers: dict[str, int] = {}
    for name in listed:
        towers.setdefault(_tower(name), len(towers))
    return sorted(listed, key=lambda name: _place(name, towers))


def _tower(name: str) -> str:
    found = _NUMBER.search(name)
    return "" if found is None else name[: found.start()]


def _place(name: str, towers: dict[str, int]) -> tuple[Any, ...]:
    """Return what sorts a name: stage, tower, block, part of the block, role in it."""
    if _NUMBER.search(name) is None:
        return (0 if _INPUTS.search(name) else 2, 0, 0, (), 0, (), 0, name)
    tower = _tower(name)
    rest = name[len(tower) :]
    part, begins = _part(rest)
    numbers = [(int(n[1]), n.start()) for n in _NUMBER.finditer(rest)]
    blocks = tuple(n for n, start in numbers if start < begins)
    inside = tuple(n for n, start in numbers if start >= begins)
    decodes = 1 if re.search(r"decoder", tower) else 0
    role = next((i for i, words in enumerate(_ROLES) if words.search(rest)), len(_ROLES))
    if part < 3 and ".output." in rest.lower():  # BERT's attention.output.dense
        role = len(_ROLES) - 1
    return (1, decodes, towers[tower], blocks, part, inside, role, name)


def _part(rest: str) -> tuple[int, int]:
    """Return which part of a block a name is of, and where its word begins."""
    for number, words in enumerate((_CROSS, _ATTENTION, _MLP)):
        found = words.search(rest)
        if found is not None:
            return (1, 0, 2)[number], found.start()
    return 3, len(rest)
