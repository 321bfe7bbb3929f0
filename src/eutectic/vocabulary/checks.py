"""Whether tables, tokenizer, configuration and special tokens of a model agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eutectic.errors import Note
from eutectic.vocabulary.configuration import rows_stated, stated_size
from eutectic.vocabulary.tokens import Tokens


def vocabulary_notes(
    tables: Mapping[str, int],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokens: Tokens | None,
) -> list[Note]:
    """Return a warning for everything that would fail or mislead once the model is used.

    `tables` are the rows of the table of tokens and of the output layer, by name. A token beyond a
    table crashes the model that reads it; a table smaller than `vocab_size` does not load; a
    special token beyond it is never made, so that generation does not end.
    """
    if not tables:
        return []
    notes: list[Note] = []
    rows = min(tables.values())
    first = min(tables, key=lambda name: tables[name])
    if len(set(tables.values())) > 1:
        notes.append(Note("tables_differ", tuple(tables), {"rows": dict(tables)}, "warning"))
    stated = stated_size(config)
    if stated is not None and stated > rows:
        numbers = {"rows": rows, "stated": stated}
        notes.append(Note("table_too_small", (first,), numbers, "warning"))
    if tokens is not None:
        beyond = sorted((row, token) for token, row in tokens.rows.items() if row >= rows)
        if beyond:
            numbers = {"rows": rows, "table": first, "row": beyond[0][0]}
            names = tuple(token for _, token in beyond)
            notes.append(Note("tokens_beyond_table", names, numbers, "warning"))
    named = {**rows_stated(config)}
    for key, values in rows_stated(generation).items():
        named[key] = [*named.get(key, []), *values]
    lost = {key: row for key, values in named.items() for row in values if row >= rows}
    if lost:
        numbers = {"rows": rows, "named": lost}
        notes.append(Note("special_beyond_table", tuple(lost), numbers, "warning"))
    return notes
