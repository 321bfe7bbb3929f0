"""A tokenizer against the tables of its model: every id needs a row."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eutectic import conventions_ties as habits
from eutectic.checking.report import Finding
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.odd_files import pointers_among
from eutectic.checkpoint.weight_files import names_in, read_json_object
from eutectic.conventions import is_token_embedding
from eutectic.errors import CheckpointError, Fault, Note
from eutectic.vocabulary.configuration import rows_stated, stated_size
from eutectic.vocabulary.tokenizer_files import is_tokenizer_file
from eutectic.vocabulary.tokens import ADDED, Tokens, read_tokens
from eutectic.words import few


def tokens_in(folder: Path) -> tuple[Tokens | None, list[Finding]]:
    """Return the tokens of a folder's tokenizer, None where there are none, and their faults."""
    if pointers_among(folder, _files(folder)):
        return None, []  # told of all files together
    try:
        tokens = read_tokens(folder)
    except CheckpointError as error:
        return None, [Fault("tokenizer", str(error))]
    return tokens, [] if tokens is None else [*_two_ids(folder, tokens)]


def no_tokenizer(folder: Path, entries: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Yield that a model that reads tokens has no tokenizer beside it."""
    if table_of(entries) is not None and not _files(folder):
        yield Note("no_tokenizer", level="warning")


def _files(folder: Path) -> list[str]:
    return [n for n in names_in(folder) if is_tokenizer_file(n) and (folder / n).is_file()]


def _two_ids(folder: Path, tokens: Tokens) -> Iterator[Finding]:
    """Yield a token to which two files give different ids."""
    if not (folder / ADDED).is_file():
        return
    for token, number in read_json_object(folder / ADDED).items():
        own = tokens.rows.get(token, number)
        if own != number:
            what = f"gives the token {token!r} the id {number}, another file the id {own}."
            yield Fault("two_ids", what, ADDED)
            return


def table_of(entries: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """Return the table of the tokens that a model reads, None where no name tells which it is."""
    matrices = [e for e in entries.values() if len(e.shape) == 2]
    exact = [e for e in matrices if is_token_embedding(e.name)]
    likely = exact or [e for e in matrices if habits.is_token_table(e.name)]
    return likely[0] if len({e.shape[0] for e in likely}) == 1 else None


def token_findings(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    tokens: Tokens | None,
) -> Iterator[Finding]:
    """Yield where tables, tokenizer, special ids and `vocab_size` do not agree.

    `generation` is what generation_config.json says, {} where there is none.
    """
    table = table_of(entries)
    if table is None:
        return
    rows = table.shape[0]
    stated = stated_size(config)
    if stated is not None and stated != rows:
        yield Fault(
            "vocab_size",
            f"'{table.name}' has {rows:,} rows, the configuration's vocab_size is {stated:,}.",
            next="Set vocab_size to the rows, or save the model again after resizing it.",
        )
    for entry in entries.values():
        output = habits.is_output_table(entry.name) and len(entry.shape) == 2
        if output and entry.shape[1:] == table.shape[1:] and entry.shape[0] != rows:
            told = {"table": table.name, "rows": rows, "held": entry.shape[0]}
            yield Note("output_rows", (entry.name,), told, "warning")
    if tokens is not None:
        yield from _without_rows(tokens, table)
        yield from _other_roles(config, generation, tokens)
    yield from _special_ids(config, generation, rows)


def _without_rows(tokens: Tokens, table: TensorEntry) -> Iterator[Finding]:
    """Yield tokens whose ids have no row, or rows that no token has."""
    rows = table.shape[0]
    beyond = sorted((number, token) for token, number in tokens.rows.items() if number >= rows)
    if beyond:
        names = few([f"{token!r} ({number})" for number, token in beyond])
        yield Fault(
            "ids_without_rows",
            f"{len(beyond)} tokens have ids beyond the {rows:,} rows of '{table.name}': {names}.",
            next="Resize the model (resize_token_embeddings), or take the tokens out.",
        )
    elif 0 < tokens.count < rows:
        numbers = {"count": rows - tokens.count, "rows": rows}
        yield Note("rows_without_token", (table.name,), numbers)


def _special_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], rows: int
) -> Iterator[Finding]:
    """Yield special ids for which the table has no row; negative ones mean none."""
    for file, stated in (("config.json", config), ("generation_config.json", generation)):
        for key, ids in rows_stated(stated).items():
            if beyond := [i for i in ids if i >= rows]:
                told = {"id": beyond[0], "rows": rows, "file": file}
                yield Note("special_id", (key,), told, "warning")


def _other_roles(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokens: Tokens
) -> Iterator[Finding]:
    """Yield special tokens whose id is another one in the configuration than in the tokenizer."""
    told_by = [rows_stated(part) for part in (config, generation)]
    for role, token in tokens.special.items():
        stated = {i for ids in told_by for i in ids.get(f"{role}_id", ())}
        own = tokens.rows.get(token)
        if stated and own is not None and own not in stated:
            told = {"token": token, "own": own, "stated": ", ".join(map(str, sorted(stated)))}
            yield Note("other_special_id", (role,), told, "warning")
