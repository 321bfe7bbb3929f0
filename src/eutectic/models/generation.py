"""How models generate text: the settings of `generation_config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eutectic.errors import CheckpointError
from eutectic.models.task_kinds import TaskKind
from eutectic.models.transformers_loading import first_line, transformers_for

GENERATION = "generation_config.json"
_SEARCH = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "penalty_alpha"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    *("num_return_sequences", "constraints", "force_words_ids", "dola_layers"),
    *("max_length", "max_new_tokens", "max_time", "prompt_lookup_num_tokens"),
    *("min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
)


def set_generation(model: Any, kind: TaskKind, folders: Sequence[Path]) -> None:
    """Let a model generate as the first `generation_config.json` in `folders` says, if any.

    Tokens that it forces or forbids are part of the model. Its search is not: exact match is of
    greedy decoding, and lm-evaluation-harness names its own.

    Raises:
        CheckpointError: the file cannot be read.
    """
    folder = next((f for f in folders if (f / GENERATION).is_file()), None)
    if folder is None or kind not in ("sequence-to-sequence", "lm-eval"):
        return
    settings = transformers_for("Generating texts").GenerationConfig
    try:
        found = settings.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / GENERATION}: cannot be read: {first_line(error)}"
        ) from None
    if kind == "sequence-to-sequence":
        plain = settings()
        for name in _SEARCH:
            if hasattr(plain, name):  # names come and go with transformers' versions
                setattr(found, name, getattr(plain, name))
    model.generation_config = found
