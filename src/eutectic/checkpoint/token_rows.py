"""Rows of tables that an adapter trained alone: which tokens they are."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eutectic.checkpoint.adapter_keys import Group
from eutectic.checkpoint.changes import TokenRows
from eutectic.errors import CheckpointError
from eutectic.words import shown

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource


def trained_rows(
    source: "TensorSource",
    group: Group,
    module: str,
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    label: str,
) -> TokenRows:
    """Return the change of a table whose rows an adapter trained; `shape` is the base's."""
    rows, whole = group["trainable_tokens_delta"], group.get("full")
    tokens = _tokens(config, module, label)
    held = shape if whole is None else whole.shape
    if len(held) != 2 or rows.shape != (len(tokens), held[1]):
        raise CheckpointError(
            f"{label}: '{module}' has rows of shape {list(rows.shape)} for {len(tokens)} tokens, "
            f"the base's table is {list(held)}.\nThe adapter belongs to another base."
        )
    beyond = [token for token in tokens if not 0 <= token < held[0]]
    if beyond:
        raise CheckpointError(
            f"{label}: '{module}' trains the token {beyond[0]}, and the base's table has "
            f"{held[0]} rows.\nThe adapter belongs to a base with a larger vocabulary."
        )
    placed = {token: place for place, token in enumerate(tokens)}
    ascending = sorted(placed)
    places = tuple(placed[token] for token in ascending)
    return TokenRows(source, rows, tuple(ascending), places, held[1], whole)


def _tokens(config: Mapping[str, Any], module: str, label: str) -> Sequence[int]:
    """Return the tokens that a configuration lists for a table."""
    stated = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(stated, Mapping):
        fitting = [p for p in stated if module == p or module.endswith(f".{p}")]
        stated = stated[fitting[0]] if len(fitting) == 1 else None
    listed: list[Any] = stated if isinstance(stated, list) else []
    if not listed or not all(type(token) is int for token in listed):
        raise CheckpointError(
            f"{label}: adapter_config.json does not list the tokens whose rows '{module}' trains "
            f"(got {shown(stated)}).\nRestore the configuration."
        )
    return listed
