"""What configurations say of a vocabulary: sizes and special tokens, in nested parts too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

# Keys of sizes. Only values that were a table's number of rows change, but for the main one.
SIZES = ("vocab_size", "n_vocab", "padded_vocab_size", "text_vocab_size", "decoder_vocab_size")
# Keys of a model's language part, in the order in which they are looked for.
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "language_model_config", "decoder")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_PAIRS = "forced_decoder_ids"  # [[position, row], …]

Config = Mapping[str, Any]


def main_part(config: Config) -> tuple[str, ...]:
    """Return where a configuration states the size of the table of tokens: keys to the part."""
    if _size(config) is not None:
        return ()
    name = _text_part(config)
    return () if name is None else (name, *main_part(config[name]))


def _text_part(config: Config) -> str | None:
    """Return the key of a configuration's language part; None where it has none."""
    return next((n for n in _TEXT_PARTS if isinstance(config.get(n), Mapping)), None)


def _size(part: Config) -> int | None:
    """Return the number of tokens that one part of a configuration states by itself."""
    return next((part[key] for key in SIZES if isinstance(part.get(key), int)), None)


def stated_size(config: Config) -> int | None:
    """Return the number of tokens that a configuration states for its text model."""
    part: Any = config
    for key in main_part(config):
        part = part[key]
    return _size(part)


def with_size(config: Config, before: Collection[int], size: int) -> dict[str, Any]:
    """Return a configuration that states `size` wherever it states the rows of the tables `before`.

    The language part states it in any case.
    """

    def changed(part: Config) -> dict[str, Any]:
        return {
            key: changed(cast("Config", value))
            if isinstance(value, Mapping)
            else size
            if key in SIZES and value in before and not isinstance(value, bool)
            else value
            for key, value in part.items()
        }

    written = changed(config)
    part = written
    for key in main_part(config):
        part = part[key]
    held = [key for key in SIZES if isinstance(part.get(key), int)]
    if held:
        part[held[0]] = size
    elif "model_type" in part:
        part["vocab_size"] = size
    return written


def is_token_key(key: str) -> bool:
    """Tell whether a key of a configuration names rows of tokens.

    >>> is_token_key("eos_token_id"), is_token_key("image_token_index"), is_token_key("num_tokens")
    (True, True, False)
    """
    return key.endswith(("_token_id", "_token_ids", "_token_index")) or key in _ID_LISTS


def rows_stated(config: Config) -> dict[str, list[int]]:
    """Return key -> rows of tokens that a configuration and its language parts name.

    A part that states a vocabulary of another size is left out: its rows are of another table.
    """
    found: dict[str, list[int]] = {}
    main, part = stated_size(config), config
    while True:
        if _size(part) in (None, main):
            for key, value in part.items():
                if is_token_key(key):
                    found.setdefault(key, []).extend(row for row in _flat(value) if row >= 0)
        if (name := _text_part(part)) is None:
            return found
        part = part[name]


def _flat(value: object) -> list[int]:
    if isinstance(value, list):
        return [row for item in cast("list[object]", value) for row in _flat(item)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def with_rows(
    config: Config, new_row: Callable[[int], int | None], sizes: Collection[int]
) -> dict[str, Any]:
    """Return a configuration whose special tokens have their new rows.

    `new_row` is asked for every row; what it has none for is None, or left out of a list. Parts
    that state a vocabulary of their own, of another size than `sizes`, are left alone.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            found = [moved(item) for item in cast("list[Any]", value)]
            return [item for item in found if item is not None and item != []]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return new_row(value)
        return value

    def changed(part: Config) -> dict[str, Any]:
        own = _size(part)
        if own is not None and own not in sizes:
            return dict(part)
        written: dict[str, Any] = {}
        for key, value in part.items():
            if isinstance(value, Mapping):
                written[key] = changed(cast("Config", value))
            elif is_token_key(key):
                written[key] = moved(value)
            elif key == _PAIRS and isinstance(value, list):
                pairs = [[p[0], moved(p[1])] for p in cast("list[Any]", value) if len(p) == 2]
                written[key] = [pair for pair in pairs if pair[1] is not None]
            else:
                written[key] = value
        return written

    return changed(config)


def with_tokens_of(config: Config, other: Config) -> dict[str, Any]:
    """Return a configuration that names the special tokens of another, wherever it names any.

    `other` is that of the model whose tokenizer goes along.
    """
    theirs = {k: v for k, v in _named(other).items() if v is not None}

    def changed(part: Config) -> dict[str, Any]:
        return {
            key: changed(cast("Config", value))
            if isinstance(value, Mapping)
            else theirs.get(key, value)
            if is_token_key(key)
            else value
            for key, value in part.items()
        }

    return {
        **{k: v for k, v in theirs.items() if k not in config and k in other},
        **changed(config),
    }


def _named(config: Config) -> dict[str, Any]:
    found = {k: v for k, v in config.items() if is_token_key(k)}
    part: Any = config
    for key in main_part(config):
        part = part[key]
        found |= {k: v for k, v in part.items() if is_token_key(k)}
    return found
