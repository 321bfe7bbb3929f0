"""What the keys of adapters' files say: which part of a change each tensor is, and of what.

Sources: the layers of PEFT (0.13 to 0.21) and how it saves them. Nothing here knows a file.
"""

import re

# What the kinds of PEFT call the parts of a change, beside a module or in it.
PART_NAMES = (
    r"lora_(?:embedding_)?[AB]|lora_E|lora_magnitude_vector"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
    r"|oft_(?:embedding_)?R|boft_[Rs]|hra_u|hira_(?:embedding_)?[AB]"
    r"|vera_lambda_[bd]|vera_[AB]|vblora_logits_[AB](?:_topk_(?:indices|weights))?|vblora_vector_bank"
    r"|fourierft_spectrum|c3a_kernel|miss_block"
    r"|shira_(?:weight|indices)|trainable_tokens_delta|ia3_l"
)
# Modules by which PEFT knows that a table is to be kept tied; of others it warns.
TIED_BY_PEFT = frozenset({"embed_tokens", "lm_head"})
VERA_PROJECTIONS = frozenset({"vera_A", "vera_B"})  # common to all layers
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>{PART_NAMES})(?P<bias>\.bias)?(?:\.weight)?")
# A bare parameter of a module is adapted by a wrapper, several of them by one in another.
_NESTED = re.compile(r"(?P<module>.+?)(?P<depth>(?:\.base_layer)+)(?P<part>\.lora_[AB](?:\..+)?)")
_DEPTH = re.compile(r"(?P<module>.+)@(?P<depth>\d+)")


def adapter_part(key: str) -> tuple[str, str] | None:
    """Return the module that a part of an adapter's change belongs to, and the part's name.

    >>> adapter_part("enc.q.hada_w1_a"), adapter_part("enc.q.lora_B.bias")
    (('enc.q', 'hada_w1_a'), ('enc.q', 'lora_B.bias'))
    """
    match = _PART.fullmatch(key)
    return None if match is None else (match["module"], match["part"] + (match["bias"] or ""))


def with_depth(key: str) -> str:
    """Return the key of a factor with the depth of its wrapper: PEFT nests those of one module.

    >>> with_depth("experts.base_layer.lora_A.weight")
    'experts@1.lora_A.weight'
    """
    match = _NESTED.fullmatch(key)
    if match is None:
        return key
    return f"{match['module']}@{match['depth'].count('.')}{match['part']}"


def without_depth(module: str) -> tuple[str, int]:
    """Return a module's path and the depth that `with_depth` put into it; 0 where there is none."""
    match = _DEPTH.fullmatch(module)
    return (module, 0) if match is None else (match["module"], int(match["depth"]))
