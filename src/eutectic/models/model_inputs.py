"""What a model takes: tokens or pictures, how many, and how its inputs are padded."""

from typing import Any

from torch import nn

DEFAULT_MAX_LENGTH = 512

# Models whose first position comes after the number of the padding token, as RoBERTa's.
_COUNTED_FROM_PADDING = {"camembert", "data2vec-text", "ibert", "longformer", "mpnet"}


def padding_id(tokenizer: Any) -> int:
    """Return the token that texts are padded with."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def tell_padding(model: nn.Module, tokenizer: Any) -> None:
    """Let a classifier know which token pads its inputs, in its configuration.

    Decoders classify by the last token that is no padding. Their configurations often name none, or
    another tokenizer's, and then read padding: figures would depend on the size of batches.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        config: Any = model.config
        own = getattr(config, "get_text_config", None)  # since transformers 4.45
        (own() if own else config).pad_token_id = padding_id(tokenizer)


def takes_images(model: nn.Module) -> bool:
    """Tell whether the model's inputs are pictures; a bare vision encoder's are."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def image_mode(config: Any) -> str:
    """Return what pictures a model takes: grey (`L`) where its configuration has one channel."""
    seen = getattr(config, "vision_config", None) or config
    return "L" if getattr(seen, "num_channels", None) == 1 else "RGB"


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for; None where it has no table of them."""
    positions = getattr(config, "max_position_embeddings", None)
    kind = str(getattr(config, "model_type", ""))
    if not isinstance(positions, int) or positions < 1:
        return None
    if "roberta" in kind or kind in _COUNTED_FROM_PADDING:
        positions -= (getattr(config, "pad_token_id", None) or 0) + 1
    return positions


def longest_input(processor: Any, config: Any) -> int:
    """Return how many tokens a model takes, and its tokenizer allows; at most 512."""
    limits = [getattr(processor, "model_max_length", None), positions_of(config)]
    return min([DEFAULT_MAX_LENGTH, *(n for n in limits if isinstance(n, int) and n > 0)])
