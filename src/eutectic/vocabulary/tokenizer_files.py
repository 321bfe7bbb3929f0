"""The tokenizer of an output, whole: the donor's files, with tokens added or left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from eutectic.checkpoint.folder import copy_side_files, side_files
from eutectic.checkpoint.writer import write_atomically
from eutectic.errors import CheckpointError
from eutectic.storage import storage_of
from eutectic.storage.small_files import parse_json, read_bytes
from eutectic.vocabulary.agreement import Vocabulary
from eutectic.vocabulary.sentencepiece_model import (
    USER_DEFINED,
    Piece,
    looks_like_model,
    pieces_of,
    with_pieces,
)
from eutectic.vocabulary.tokens import (
    ADDED,
    CONFIG,
    LARGEST,
    MERGES,
    PIECES,
    SPECIAL_MAP,
    TOKENIZER,
    VOCAB_JSON,
    VOCAB_TXT,
    files_identity,
)

_PATTERNS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt"),
    *("dict.txt", "*.model", "*.spm", "spm*", "tekken.json", "*.tiktoken", "bpe.codes"),
    *("chat_template*", "additional_chat_templates/*", "tokenization_*.py", "emoji.json"),
)
_FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
_LOW = -100.0  # score of a piece that no text is cut into


@dataclass(frozen=True)
class _Edit:
    """What changes in a tokenizer's files."""

    rows: Mapping[str, int]  # of the output
    by_row: Mapping[int, str]
    added: Mapping[str, Mapping[str, Any]]  # new added tokens, in the order of rows
    words: Mapping[str, str]  # new tokens of the vocabulary itself -> whose they are
    folders: Mapping[str, Path]  # model -> the folder of its tokenizer
    removes: bool


def is_tokenizer_file(name: str) -> bool:
    """Tell whether a file belongs to a tokenizer, its chat template included."""
    return any(fnmatchcase(name, pattern) for pattern in _PATTERNS)


def write_tokenizer(vocabulary: Vocabulary, folders: Mapping[str, Path], target: Path) -> None:
    """Put the output's tokenizer into `target`, in place of any that is there.

    `folders` are those of the models' tokenizers. All files of the donor's are taken, and where the
    vocabulary differs from its own, each is rewritten, so that fast and slow tokenizers agree.
    """
    source = folders[vocabulary.donor]
    if not files_identity(source):  # a GGUF file has its own, which lies in the target by now
        source = target
    names = [name for name in side_files(source) if is_tokenizer_file(name)]
    if source != target:
        for name in side_files(target):
            if is_tokenizer_file(name):
                storage_of(target).remove(target / name)
        copy_side_files(source, target, names)
    if not (vocabulary.new or vocabulary.removed or vocabulary.created):
        return
    edit = _edit_of(vocabulary, folders)
    for name in names:
        writer = _WRITERS.get(name)
        if writer is not None:
            write_atomically(target / name, writer(_read(source / name), edit))
    if TOKENIZER not in names and ADDED not in names and edit.added:
        write_atomically(target / ADDED, _added_file(b"{}", edit))


def unwritable(vocabulary: Vocabulary, folder: Path) -> str | None:
    """Return why a tokenizer cannot be written with the output's vocabulary, None where it can."""
    own = vocabulary.models[vocabulary.donor]
    words = [t for t, n in vocabulary.new.items() if t not in vocabulary.models[n].added]
    if not words and not vocabulary.removed:
        return None
    if not own.kind:
        return "only transformers reads its tokenizer, which is not saved as tokenizer.json"
    name = next((n for n in PIECES if (folder / n).is_file()), None)
    if name is not None and looks_like_model(content := _read(folder / name)):
        pieces = [piece.text for piece in pieces_of(content)]
        if any(own.rows.get(text) not in (row, None) for row, text in enumerate(pieces)):
            return f"the rows of its tokens are not the positions of the pieces in {name}"
    return None


def _edit_of(vocabulary: Vocabulary, folders: Mapping[str, Path]) -> _Edit:
    added: dict[str, Mapping[str, Any]] = {}
    words: dict[str, str] = {}
    own = vocabulary.models[vocabulary.donor]
    for token in own.beyond:
        if token in vocabulary.rows:
            added[token] = own.added[token]
    for token, name in vocabulary.new.items():
        flags = vocabulary.models[name].added.get(token)
        if flags is None:
            words[token] = name
        else:
            added[token] = flags
    added |= dict.fromkeys(vocabulary.created, {"normalized": True})
    rows = vocabulary.rows
    by_row = {row: token for token, row in rows.items()}
    by_row |= {rows[token]: token for token in own.added if token in rows}
    order = dict(sorted(added.items(), key=lambda pair: rows[pair[0]]))
    removes = bool(vocabulary.removed)
    return _Edit(rows, by_row, order, words, folders, removes)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _json(content: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", parse_json(content))


def _written(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _flags(token: str, edit: _Edit) -> dict[str, Any]:
    own = {key: value for key, value in edit.added[token].items() if key in _FLAGS}
    return {**_FLAGS, **own}


def _tokenizer(content: bytes, edit: _Edit) -> bytes:
    """Return a `tokenizer.json` with the output's vocabulary."""
    value = _json(content)
    model: dict[str, Any] = value["model"]
    vocabulary = model["vocab"]
    listed: list[dict[str, Any]] = [
        {**entry, "id": edit.rows[entry["content"]]}
        for entry in value.get("added_tokens") or ()
        if entry["content"] in edit.rows
    ]
    known = {entry["content"] for entry in listed}
    if isinstance(vocabulary, list):
        unknown = model.get("unk_id")
        if isinstance(unknown, int):
            model["unk_id"] = edit.rows.get(vocabulary[unknown][0])
        scores = {pair[0]: pair[1] for pair in vocabulary if pair[0] in edit.rows}
        scores |= _scores_of(edit)
        model["vocab"] = [[t, scores.get(t, _LOW)] for t in _in_rows(scores, edit)]
    else:
        words = {t: edit.rows[t] for t in vocabulary if t in edit.rows}
        words |= {token: edit.rows[token] for token in edit.words}
        model["vocab"] = words
        if isinstance(model.get("merges"), list):
            model["merges"] = _merges(model["merges"], edit)
    for token in edit.added:
        if token not in known:
            listed.append({"id": edit.rows[token], "content": token, **_flags(token, edit)})
    value["added_tokens"] = sorted(listed, key=lambda entry: entry["id"])
    _give_rows(model, value["added_tokens"])
    if edit.removes:
        for key in ("post_processor", "padding"):
            value[key] = _renumbered(value.get(key), edit)
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _give_rows(model: dict[str, Any], listed: Sequence[Mapping[str, Any]]) -> None:
    """Put added tokens into the vocabulary where the library would give them other rows.

    It numbers those that the vocabulary lacks from the number of its tokens on, so that each that
    is put in moves the others: all are, where one has to be.
    """
    vocabulary = model["vocab"]
    size, last = len(vocabulary), -1
    if isinstance(vocabulary, list):
        return
    moved = False
    for entry in listed:
        token, row = entry["content"], entry["id"]
        if token not in vocabulary:
            moved = moved or row != (last + 1 if last >= size else size)
        last = max(last, row)
    if moved:
        for entry in listed:
            vocabulary.setdefault(entry["content"], entry["id"])


def _in_rows(tokens: Mapping[str, Any], edit: _Edit) -> list[str]:
    """Return tokens in the order of their rows; rows between that none of them has are named."""
    placed = {edit.rows[token]: token for token in tokens}
    last = max(placed, default=-1)
    filled = ({**edit.by_row, **placed}.get(row) for row in range(last + 1))
    return [token if token is not None else f"<row_{row}>" for row, token in enumerate(filled)]


def _scores_of(edit: _Edit) -> dict[str, float]:
    """Return new token of a Unigram vocabulary -> its score in the model that it is from."""
    scores: dict[str, float] = {}
    for name in dict.fromkeys(edit.words.values()):
        theirs = {t for t, n in edit.words.items() if n == name}
        folder = edit.folders[name]
        if (folder / TOKENIZER).is_file():
            pairs: Iterable[Any] = _json(_read(folder / TOKENIZER))["model"]["vocab"]
        else:
            found = next(n for n in PIECES if (folder / n).is_file())
            pairs = ((p.text, p.score) for p in pieces_of(_read(folder / found)))
        scores |= {token: score for token, score in pairs if token in theirs}
    return scores


Merge = str | list[str]


def _merges(own: list[Merge], edit: _Edit) -> list[Merge]:
    """Return the merges whose parts and whose result are tokens; those of new words at the end."""
    kept = [merge for merge in own if _makes_token(merge, edit)] if edit.removes else list(own)
    known = {_parts(merge) for merge in kept}
    joined = bool(kept) and isinstance(kept[0], str)
    for name in dict.fromkeys(edit.words.values()):
        for merge in _merges_in(edit.folders[name]):
            parts = _parts(merge)
            if parts not in known and _makes_token(merge, edit):
                known.add(parts)
                kept.append(" ".join(parts) if joined else list(parts))
    return kept


def _merges_in(folder: Path) -> list[Merge]:
    if (folder / TOKENIZER).is_file():
        return _json(_read(folder / TOKENIZER))["model"].get("merges") or []
    if (folder / MERGES).is_file():
        return _merge_lines(_read(folder / MERGES))[1]
    return []


def _merge_lines(content: bytes) -> tuple[list[str], list[Merge]]:
    """Return the first line of a `merges.txt`, if it is its version, and the merges."""
    lines = content.decode().split("\n")
    head = [line for line in lines[:1] if line.startswith("#version")]
    return head, [line for line in lines[len(head) :] if line]


def _parts(merge: Merge) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _makes_token(merge: Merge, edit: _Edit) -> bool:
    first, second = _parts(merge)
    rows = edit.rows
    return first in rows and second in rows and first + second in rows


def _renumbered(value: Any, edit: _Edit) -> Any:
    """Return a part of a `tokenizer.json` with the rows of the tokens that it names."""
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if len(items) == 2 and isinstance(items[0], str) and isinstance(items[1], int):
            return [items[0], edit.rows.get(items[0], items[1])]  # ["[SEP]", 102]
        return [_renumbered(item, edit) for item in items]
    if not isinstance(value, Mapping):
        return value
    own = cast("Mapping[str, Any]", value)
    written = {key: _renumbered(item, edit) for key, item in own.items()}
    tokens = own.get("tokens")
    if isinstance(tokens, list) and isinstance(own.get("ids"), list):
        ids = zip(tokens, own["ids"], strict=False)
        written["ids"] = [edit.rows.get(token, row) for token, row in ids]
    if isinstance(own.get("pad_token"), str) and "pad_id" in own:
        written["pad_id"] = edit.rows.get(own["pad_token"], own["pad_id"])
    return written


def _config(content: bytes, edit: _Edit) -> bytes:
    """Return a `tokenizer_config.json` whose added tokens are the output's."""
    value = _json(content)
    decoder = value.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        own = cast("dict[str, dict[str, Any]]", decoder)
        kept = {edit.rows[e["content"]]: e for e in own.values() if e["content"] in edit.rows}
        kept |= {edit.rows[t]: {"content": t, **_flags(t, edit)} for t in edit.added}
        value["added_tokens_decoder"] = {str(row): kept[row] for row in sorted(kept)}
    return _written(_without_removed(value, edit))


def _special_map(content: bytes, edit: _Edit) -> bytes:
    return _written(_without_removed(_json(content), edit))


def _without_removed(value: dict[str, Any], edit: _Edit) -> dict[str, Any]:
    """Return a configuration without the special tokens that the output lacks."""
    if not edit.removes:
        return value
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(value.get(key), list):
            value[key] = [
                t for t in value[key] if (t["content"] if isinstance(t, dict) else t) in edit.rows
            ]
    return value


def _added_file(content: bytes, edit: _Edit) -> bytes:
    kept = {t: edit.rows[t] for t in _json(content) if t in edit.rows}
    return _written(kept | {token: edit.rows[token] for token in edit.added})


def _vocab_json(content: bytes, edit: _Edit) -> bytes:
    kept = {t: edit.rows[t] for t in _json(content) if t in edit.rows}
    kept |= {token: edit.rows[token] for token in edit.words}
    return (json.dumps(kept, ensure_ascii=False) + "\n").encode()


def _vocab_txt(content: bytes, edit: _Edit) -> bytes:
    lines = [line.removesuffix("\r") for line in content.decode().split("\n")]
    kept = {line: 0 for line in lines if line in edit.rows}
    return ("\n".join(_in_rows(kept | dict.fromkeys(edit.words, 0), edit)) + "\n").encode()


def _merges_txt(content: bytes, edit: _Edit) -> bytes:
    head, merges = _merge_lines(content)
    lines = [*head, *(" ".join(_parts(merge)) for merge in _merges(merges, edit))]
    return ("\n".join(lines) + "\n").encode()


def _pieces(content: bytes, edit: _Edit) -> bytes:
    """Return a SentencePiece model with the output's pieces."""
    if not looks_like_model(content) or not (edit.words or edit.removes):
        return content  # added tokens stand in files of their own
    kept = {piece.text: piece for piece in pieces_of(content) if piece.text in edit.rows}
    scores = _scores_of(edit)
    kept |= {token: Piece(token, scores.get(token, _LOW)) for token in edit.words}
    pieces = [kept.get(t) or Piece(t, 0.0, USER_DEFINED) for t in _in_rows(kept, edit)]
    return with_pieces(content, pieces)


_WRITERS = {
    TOKENIZER: _tokenizer,
    CONFIG: _config,
    SPECIAL_MAP: _special_map,
    ADDED: _added_file,
    VOCAB_JSON: _vocab_json,
    VOCAB_TXT: _vocab_txt,
    MERGES: _merges_txt,
    **dict.fromkeys(PIECES, _pieces),
}
