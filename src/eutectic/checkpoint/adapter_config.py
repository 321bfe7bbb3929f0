"""What an adapter_config.json says, as far as it decides the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.checkpoint.index import read_json_object
from eutectic.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"

# Options under which the merged weight is more, or other, than W₀ + scaling·B·A.
_REFUSED = {
    "use_dora": "DoRA rescales every column of the merged weight; its change is no matrix product",
    "target_parameters": "LoRA on bare parameters (fused mixture-of-experts weights)",
    "layer_replication": "it repeats layers, so that its tensors are not those of the base",
    "trainable_token_indices": "single rows of the embedding are stored apart",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only and has no merged weight",
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "block-diagonal factors are stored in another form",
    "lora_bias": "LoRA with a trained bias in its B factor",
    "arrow_config": "Arrow routes between adapters and has no merged weight",
    "kasa_config": "KaSA also changes the base weight",
    "monteclora_config": "MonteCLoRA stores a distribution over factors",
}
# Initialisations that move part of the base weight into the factors: B·A is then no difference
# from the base on disk.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """The fields of a LoRA configuration that decide the weights; names as in PEFT."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    raw: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """Return r of a module (its path in the model that was adapted)."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Return alpha / r of a module, or alpha / √r under rank-stabilised LoRA."""
        rank = self.rank(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(folder: Path) -> LoraConfig:
    """Return the LoRA configuration in a PEFT folder.

    Raises:
        CheckpointError: it is damaged, is of another kind than LoRA, or uses an option under which
            the merged weight is not W₀ + scaling·B·A (named in the message).
    """
    path = folder / CONFIG_NAME
    raw = read_json_object(path)
    kind = raw.get("peft_type")
    if kind == "IA3":
        raise CheckpointError(
            f"{folder}: an (IA)³ adapter merges with other (IA)³ adapters only, as vectors.\n"
            "Merge it into its base with peft (merge_and_unload), save that, and name the result."
        )
    if kind != "LORA":
        raise CheckpointError(
            f"{folder}: an adapter of the kind {kind!r} cannot be merged; only 'LORA' can.\n"
            "Merge it into its base with peft (merge_and_unload), save that, and name the result."
        )
    for option, reason in _REFUSED.items():
        if raw.get(option):
            raise CheckpointError(
                f"{folder}: the adapter uses '{option}', which cannot be merged: {reason}.\n"
                "Merge it into its base with peft (merge_and_unload) where peft can, save that, "
                "and name the result."
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{folder}: the adapter was initialised with '{init}', which changes the base weights; "
            "B·A is not its difference from the base.\nSave it with "
            "path_initial_model_for_weight_conversion in peft, which turns it into a plain LoRA."
        )
    try:
        config = LoraConfig(
            r=int(raw["r"]),
            lora_alpha=float(raw["lora_alpha"]),
            rank_pattern={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            use_rslora=bool(raw.get("use_rslora")),
            fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
            raw=raw,
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{path}: 'r', 'lora_alpha', 'rank_pattern' or 'alpha_pattern' is missing or has the "
            f"wrong type ({type(error).__name__}: {error})."
        ) from error
    ranks = [config.r, *config.rank_pattern.values()]
    if min(ranks) < 1:
        raise CheckpointError(f"{path}: a rank of {min(ranks)}; ranks are at least 1.")
    return config


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule: the first pattern that matches the end of the path, from a dot or from its start.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
