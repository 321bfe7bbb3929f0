"""What a model cannot take, in words, where it raised whatever its code raises then."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.errors import RequestError
from eutectic.models.model_inputs import positions_of
from eutectic.models.sites import is_encoder_decoder


@contextmanager
def unfit_in_words(
    model: nn.Module, batch: Any, where: str = "", advice: str = "Cut them to {} or less."
) -> Iterator[None]:
    """Turn the error of inputs that no model of these sizes takes into a RequestError.

    Looked for after the fact, so that what fits costs nothing. `where` precedes the sentence,
    `advice` follows that on the length, whose limit it takes.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, which says nothing of sizes
        raise
    except (IndexError, RuntimeError):
        given = batch if isinstance(batch, Mapping) else {}
        why = _unknown_token(model, given) or _too_long(model, given, advice)
        if why is None:
            raise
        raise RequestError(f"{where}{why}") from None


def _unknown_token(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """Say so if a token's number has no row in the model's table."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except (AttributeError, NotImplementedError):  # towers, each with a table of its own
        return None
    if not isinstance(table, nn.Embedding):
        return None
    names = ["input_ids", "decoder_input_ids", *(["labels"] if is_encoder_decoder(model) else [])]
    for name in names:
        ids = given.get(name)
        if not isinstance(ids, Tensor) or not ids.numel():
            continue
        if name != "labels" and (least := int(ids.min())) < 0:  # labels leave positions out so
            return (
                f"{name} hold the token {least}, and the model's table begins at 0.\n"
                "Where it stands for padding, put the tokenizer's padding token there, and 0 in "
                "attention_mask."
            )
        if int(ids.max()) >= table.num_embeddings:
            return (
                f"the inputs hold the token {int(ids.max())}, and the model's table ends at "
                f"{table.num_embeddings - 1}.\nIts tokenizer has tokens that were added and never "
                "given a row: take the tokenizer of the model, or resize the table "
                "(resize_token_embeddings)."
            )
    return None


def _too_long(model: nn.Module, given: Mapping[str, Any], advice: str) -> str | None:
    """Say so if inputs are longer than the model's table of positions."""
    limit, ids = positions_of(getattr(model, "config", None)), given.get("input_ids")
    length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else 0
    if limit is None or length <= limit:
        return None
    return (
        f"inputs of {length} tokens, and the model has {limit} positions.\n{advice.format(limit)}"
    )
