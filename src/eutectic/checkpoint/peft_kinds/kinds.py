"""The table of PEFT's kinds that have a merged weight, by the name that a configuration gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from eutectic.checkpoint.peft_kinds import low_rank, patterned, rotations
from eutectic.checkpoint.peft_kinds.formulas import Formula, Layer, Places, Shape


@dataclass(frozen=True)
class Kind:
    """How one kind's adapters change a weight."""

    formula: Callable[[Layer], Formula] | None  # None where it only replaces tensors
    parts: frozenset[str] = frozenset()  # what its file may hold of a layer
    shared: frozenset[str] = frozenset()  # and of the whole adapter
    states: type[BaseModel] | None = None  # what its configuration may say besides
    # Bounds of the indices it stores, from its parts' shapes and `[out, in]`, if that is known.
    places: Callable[[Mapping[str, Shape], Shape | None], Places] | None = None


def _kind(
    formula: Callable[[Layer], Formula],
    parts: str,
    shared: str = "",
    states: type[BaseModel] | None = None,
    places: Callable[[Mapping[str, Shape], Shape | None], Places] | None = None,
) -> Kind:
    return Kind(formula, frozenset(parts.split()), frozenset(shared.split()), states, places)


# LORA is read by `adapters`, which keeps its thin factors as they are where it can.
KINDS: Mapping[str, Kind] = {
    "ADALORA": _kind(low_rank.adalora, "lora_A lora_B lora_E", states=low_rank.AdaLora),
    "LOHA": _kind(
        low_rank.loha,
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        states=low_rank.Lycoris,
    ),
    "LOKR": _kind(
        low_rank.lokr,
        "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
        states=low_rank.Lycoris,
    ),
    "HIRA": _kind(low_rank.hira, "hira_A hira_B hira_embedding_A hira_embedding_B"),
    "VERA": _kind(
        low_rank.vera, "vera_lambda_b vera_lambda_d", "vera_A vera_B", states=low_rank.Vera
    ),
    "VBLORA": _kind(
        low_rank.vblora,
        "vblora_logits_A vblora_logits_A_topk_indices vblora_logits_A_topk_weights "
        "vblora_logits_B vblora_logits_B_topk_indices vblora_logits_B_topk_weights",
        "vblora_vector_bank",
        states=low_rank.VbLora,
        places=low_rank.vblora_places,
    ),
    "OFT": _kind(rotations.oft, "oft_R oft_embedding_R", states=rotations.Oft),
    "BOFT": _kind(rotations.boft, "boft_R boft_s"),
    "HRA": _kind(rotations.hra, "hra_u", states=rotations.Hra),
    "FOURIERFT": _kind(patterned.fourierft, "fourierft_spectrum", states=patterned.Fourier),
    "C3A": _kind(patterned.c3a, "c3a_kernel"),
    "MISS": _kind(patterned.miss, "miss_block", states=patterned.Miss),
    "SHIRA": _kind(patterned.shira, "shira_weight shira_indices", places=patterned.shira_places),
    "LN_TUNING": Kind(None),
    "TRAINABLE_TOKENS": Kind(None, frozenset({"trainable_tokens_delta"})),
}
LORA_PARTS = frozenset(
    "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector lora_B.bias "
    "trainable_tokens_delta".split()
)
