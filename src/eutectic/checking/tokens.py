"""A tokenizer against the tables of its model: every id needs a row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eutectic import conventions_ties as habits
from eutectic.checking.report import Finding
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.odd_files import pointers_among
from eutectic.checkpoint.weight_files import read_json_object
from eutectic.conventions import is_token_embedding
from eutectic.errors import CheckpointError, Fault, Note
from eutectic.storage.small_files import INDEX_BYTES, read_text
from eutectic.words import few

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_ANY = (TOKENIZER, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", _SETTINGS)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
_LARGEST_ID = 1 << 40


@dataclass(frozen=True)
class Tokens:
    """What a folder's tokenizer files say: which token has which id."""

    ids: Mapping[str, int] = field(default_factory=dict[str, int])
    roles: Mapping[str, str] = field(default_factory=dict[str, str])  # "eos_token" -> its token
    read: tuple[str, ...] = ()  # files that list tokens
    there: bool = False  # whether there is any file of a tokenizer

    @property
    def rows(self) -> int:
        """How many rows a table needs, so that every id has one."""
        return max(self.ids.values(), default=-1) + 1


def tokens_in(folder: Path) -> tuple[Tokens, list[Finding]]:
    """Return the tokens of a folder, and what is wrong with the files that list them."""
    ids: dict[str, int] = {}
    read: list[str] = []
    wrong: list[Finding] = []
    settings: dict[str, Any] = {}
    for name, listed in _LISTS.items():
        if not (folder / name).is_file() or (name in _SINGLE and TOKENIZER in read):
            continue
        if pointers_among(folder, [name]):
            continue  # told of all files together
        try:
            found = listed(folder / name)
        except CheckpointError as error:
            wrong.append(Fault("tokenizer", str(error)))
            continue
        if name == _SETTINGS:
            settings = read_json_object(folder / name)
        if found:
            read.append(name)
        for token, number in found.items():
            if ids.setdefault(token, number) != number:
                what = f"gives the token {token!r} the id {number}, {read[0]} the id {ids[token]}."
                wrong.append(Fault("two_ids", what, name))
                break
    roles = {role: text for role in _ROLES if (text := _text_of(settings.get(role)))}
    there = any((folder / name).exists() for name in _ANY)
    return Tokens(ids, roles, tuple(read), there), wrong


def _of_tokenizer(path: Path) -> dict[str, int]:
    content = read_json_object(path, limit=INDEX_BYTES)
    model = content.get("model")
    vocabulary: object = model.get("vocab") if isinstance(model, Mapping) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, Mapping):
        ids.update((str(t), i) for t, i in vocabulary.items() if _is_id(i))
    elif isinstance(vocabulary, list):
        firsts = (item[0] if isinstance(item, list) and item else None for item in vocabulary)
        ids.update((str(token), i) for i, token in enumerate(firsts) if token is not None)
    return {**ids, **_added(content.get("added_tokens"))}


def _added(stated: object) -> dict[str, int]:
    items = [i for i in stated if isinstance(i, Mapping)] if isinstance(stated, list) else []
    return {str(i.get("content")): i["id"] for i in items if _is_id(i.get("id"))}


def _of_settings(path: Path) -> dict[str, int]:
    stated = read_json_object(path).get("added_tokens_decoder")
    items = stated.items() if isinstance(stated, Mapping) else ()
    texts = ((key, _text_of(value)) for key, value in items)
    return {t: int(key) for key, t in texts if t and str(key).isdecimal() and len(str(key)) < 12}


def _of_table(path: Path) -> dict[str, int]:
    table = read_json_object(path, limit=INDEX_BYTES)
    return {str(token): number for token, number in table.items() if _is_id(number)}


def _of_lines(path: Path) -> dict[str, int]:
    try:
        lines = read_text(path, INDEX_BYTES).split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    # Other tools number what stands twice by its last line.
    return {line.rstrip("\r"): number for number, line in enumerate(lines) if line}


_LISTS = {
    TOKENIZER: _of_tokenizer,
    "vocab.json": _of_table,
    "vocab.txt": _of_lines,
    "added_tokens.json": _of_table,
    _SETTINGS: _of_settings,
}
_SINGLE = ("vocab.json", "vocab.txt")  # what tokenizer.json says again


def _text_of(stated: object) -> str:
    text = stated.get("content") if isinstance(stated, Mapping) else stated
    return text if isinstance(text, str) else ""


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_ID


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
    tokens: Tokens,
) -> Iterator[Finding]:
    """Yield where tables, tokenizer, special ids and `vocab_size` do not agree.

    `generation` is what generation_config.json says, {} where there is none.
    """
    table = table_of(entries)
    if table is None:
        return
    rows = table.shape[0]
    parts = [config, *habits.language_parts(config)]
    stated = next((p["vocab_size"] for p in parts if _is_id(p.get("vocab_size"))), None)
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
    if not tokens.there:
        yield Note("no_tokenizer", level="warning")
    yield from _without_rows(tokens, table)
    yield from _special_ids(parts, generation, rows)
    yield from _other_roles(parts, generation, tokens)


def _without_rows(tokens: Tokens, table: TensorEntry) -> Iterator[Finding]:
    """Yield tokens whose ids have no row, or rows that no token has."""
    rows = table.shape[0]
    beyond = sorted((number, token) for token, number in tokens.ids.items() if number >= rows)
    if beyond:
        names = few([f"{token!r} ({number})" for number, token in beyond])
        yield Fault(
            "ids_without_rows",
            f"{len(beyond)} tokens of {tokens.read[0]} have ids beyond the {rows:,} rows of "
            f"'{table.name}': {names}.",
            next="Resize the model (resize_token_embeddings), or take the tokens out.",
        )
    elif tokens.ids and tokens.rows < rows:
        numbers = {"count": rows - tokens.rows, "rows": rows, "tokens": tokens.rows}
        yield Note("rows_without_token", (table.name,), numbers)


def _special_ids(
    parts: list[Mapping[str, Any]], generation: Mapping[str, Any], rows: int
) -> Iterator[Finding]:
    """Yield special ids for which the table has no row; negative ones mean none."""
    for file, stated in (
        *(("config.json", part) for part in parts),
        ("generation_config.json", generation),
    ):
        for key, value in stated.items():
            if key.endswith("_token_id"):
                beyond = [i for i in _ids(value) if i >= rows]
                if beyond:
                    told = {"id": beyond[0], "rows": rows, "file": file}
                    yield Note("special_id", (key,), told, "warning")


def _other_roles(
    parts: list[Mapping[str, Any]], generation: Mapping[str, Any], tokens: Tokens
) -> Iterator[Finding]:
    """Yield special tokens whose id is another one in the configuration than in the tokenizer."""
    for role, token in tokens.roles.items():
        stated = {i for part in (*parts, generation) for i in _ids(part.get(f"{role}_id"))}
        own = tokens.ids.get(token)
        if stated and own is not None and own not in stated:
            told = {"token": token, "own": own, "stated": ", ".join(map(str, sorted(stated)))}
            yield Note("other_special_id", (role,), told, "warning")


def _ids(value: Any) -> list[int]:
    stated: list[Any] = value if isinstance(value, list) else [value]
    return [i for i in stated if _is_id(i)]
