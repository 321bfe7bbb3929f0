"""Which row a token has: read from every kind of tokenizer file, without a tokenizer library.

`tokenizer.json` says all of it. Without it, `vocab.json`, `vocab.txt` or a SentencePiece model has
the vocabulary, and `added_tokens.json`, `tokenizer_config.json` and `special_tokens_map.json` add
tokens. transformers gives special tokens that stand nowhere the next rows, and so does this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from eutectic.errors import CheckpointError
from eutectic.models.named_classes import check_named_classes
from eutectic.storage.small_files import parse_json, read_bytes
from eutectic.vocabulary.sentencepiece_model import looks_like_model, pieces_of

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
VOCAB_JSON, VOCAB_TXT, MERGES = "vocab.json", "vocab.txt", "merges.txt"
# Names of SentencePiece models, in the order in which they are looked for.
PIECES = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("sentencepiece.model", "source.spm"),
)
LARGEST = 512 << 20  # bytes of a tokenizer file; that of 262,144 tokens has 34 MB
SPECIAL_KEYS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
    "mask_token",
)
_DIGITS = 9  # of a row
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Tokenizer classes whose rows are not the positions of the pieces (fairseq's dictionary): tokens
# in front, and how many pieces are left out for them.
_FAIRSEQ = (("<s>", "<pad>", "</s>", "<unk>"), 3)
_CAMEMBERT = (("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"), 1)
_SHIFTED: Mapping[str, tuple[tuple[str, ...], int]] = {
    **dict.fromkeys(("XLMRoberta", "MBart", "MBart50", "Nllb", "XGLM", "Barthez"), _FAIRSEQ),
    "Camembert": _CAMEMBERT,
}

Kind = Literal["BPE", "WordPiece", "Unigram", "WordLevel", "vocab.json", "vocab.txt", "pieces", ""]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one model, and the rows of its tables that stand for them.

    Attributes:
        rows: token -> row, of the vocabulary and of added tokens.
        added: added token -> how it is found in a text (`special`, `lstrip`, …).
        special: role (`eos_token`) -> token.
        kind: the tokenizer's model, or the file where there is no `tokenizer.json`.
        identity: a hash of the files.
        beyond: tokens that no file gives a row.
    """

    rows: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    special: Mapping[str, str] = field(default_factory=dict[str, str])
    kind: str = ""
    identity: str = ""
    beyond: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many rows a table needs."""
        return max(self.rows.values(), default=-1) + 1

    def by_row(self) -> dict[int, str]:
        """Return row -> token; of two tokens in one row the added one, which a text yields."""
        table = {row: token for token, row in self.rows.items()}
        return table | {self.rows[token]: token for token in self.added}


def read_tokens(folder: Path) -> Tokens | None:
    """Return the tokens of a folder's tokenizer, None where it has none.

    CheckpointError where its files are broken, or of a kind that cannot be read.
    """
    content = _contents(folder)
    config = _json(folder, CONFIG, content)
    whole = _json(folder, TOKENIZER, content)
    found = _whole(folder, whole) if whole else _parts(folder, config, content)
    if found is None:
        return None
    rows, added, kind = found
    _add_stated(folder, rows, added, config, content)
    special, listed = special_tokens(config, _json(folder, SPECIAL_MAP, content))
    beyond: list[str] = []
    for token in (*(special[key] for key in SPECIAL_KEYS if key in special), *listed):
        if token not in rows:
            rows[token] = max(rows.values(), default=-1) + 1
            added[token] = {"special": True}
            beyond.append(token)
    return Tokens(rows, added, special, kind, _identity(content), tuple(beyond))


def tokens_of_gguf(stated: Mapping[str, Any]) -> Tokens | None:
    """Return the tokens that a GGUF file lists in its settings (`tokenizer.ggml.*`)."""
    listed, types = stated.get("tokens"), stated.get("token_type")
    if not isinstance(listed, list) or not listed:
        return None
    tokens = [str(token) for token in listed]
    kinds = types if isinstance(types, list) and len(types) == len(tokens) else [1] * len(tokens)
    added: dict[str, Mapping[str, Any]] = {
        token: {"special": kind == _CONTROL}
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    special: dict[str, str] = {}
    for key, role in _GGUF_ROLES.items():
        row = stated.get(key)
        if isinstance(row, int) and 0 <= row < len(tokens):
            special[role] = tokens[row]
    kind = "BPE" if stated.get("model") == "gpt2" else ""
    rows = {token: row for row, token in enumerate(tokens)}
    identity = hashlib.sha256("\0".join(tokens).encode()).hexdigest()
    return Tokens(rows, added, special, kind, identity)


_CONTROL, _USER_DEFINED = 3, 4  # types of tokens in GGUF, as in SentencePiece
_GGUF_ROLES = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}


def files_identity(folder: Path) -> str:
    """Return a hash of the files that give tokens their rows; empty where there are none."""
    content = _contents(folder)
    return _identity(content) if content.keys() - {CONFIG, SPECIAL_MAP, ADDED} else ""


def _contents(folder: Path) -> dict[str, bytes]:
    held = sorted(name for name in _KNOWN if (folder / name).is_file())
    return {name: _content(folder / name) for name in held}


def _identity(content: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, value in content.items():
        digest.update(f"{name} {len(value)} ".encode() + value)
    return digest.hexdigest()


def special_tokens(*files: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return role -> token, and further special tokens, as configurations state them."""
    special: dict[str, str] = {}
    listed: dict[str, None] = {}
    for values in files:
        for key, value in values.items():
            token = as_text(value)
            if key.endswith("_token") and token is not None:
                special.setdefault(key, token)
        for key in _LISTS:
            more = values.get(key)
            held = list(more.values()) if isinstance(more, Mapping) else more
            for value in held if isinstance(held, list) else ():
                token = as_text(value)
                if token is not None:
                    listed[token] = None
    return special, list(listed)


def as_text(value: object) -> str | None:
    """Return the text of a token as configurations write it: a string, or a record of one."""
    if isinstance(value, Mapping):
        value = cast("Mapping[str, object]", value).get("content")
    return value if isinstance(value, str) else None


_KNOWN = (TOKENIZER, CONFIG, SPECIAL_MAP, ADDED, VOCAB_JSON, VOCAB_TXT, *PIECES)
# Files that hold a vocabulary in a form that only transformers reads.
_OTHER = ("tekken.json", "vocab.tiktoken", "bpe.codes", "*.tiktoken", "vocab-src.json")


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _json(folder: Path, name: str, content: Mapping[str, bytes]) -> dict[str, Any]:
    if name not in content:
        return {}
    try:
        value = parse_json(content[name])
    except ValueError as error:
        raise CheckpointError(f"{folder / name}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: must hold a JSON object.")
    return cast("dict[str, Any]", value)


Found = tuple[dict[str, int], dict[str, Mapping[str, Any]], str]


def _whole(folder: Path, value: Mapping[str, Any]) -> Found:
    """Return the vocabulary, the added tokens and the kind of a `tokenizer.json`."""
    path = folder / TOKENIZER
    model = value.get("model")
    vocabulary: object = model.get("vocab") if isinstance(model, Mapping) else None
    rows: dict[str, int] = {}
    if isinstance(vocabulary, Mapping):
        rows = _checked(path, cast("Mapping[Any, Any]", vocabulary))
    elif isinstance(vocabulary, list):  # Unigram: [token, score] in the order of rows
        for row, pair in enumerate(cast("list[Any]", vocabulary)):
            if not (isinstance(pair, list) and pair and isinstance(pair[0], str)):
                raise CheckpointError(
                    f"{path}: entry {row} of the vocabulary is no [token, score]."
                )
            rows[pair[0]] = row
    else:
        raise CheckpointError(f"{path}: has no vocabulary (model.vocab).")
    assert isinstance(model, Mapping)
    kind = model.get("type") or _kind_of(model)
    added: dict[str, Mapping[str, Any]] = {}
    listed = value.get("added_tokens") or ()
    for entry in listed if isinstance(listed, list) else ():
        own = cast("Mapping[str, Any]", entry) if isinstance(entry, Mapping) else {}
        token, row = own.get("content"), own.get("id")
        if not isinstance(token, str) or not isinstance(row, int) or not _is_row(row):
            raise CheckpointError(f"{path}: an added token has no content or no id.")
        added[token] = {k: v for k, v in own.items() if k not in ("content", "id")}
        rows[token] = row
    return rows, added, str(kind)


def _kind_of(model: Mapping[str, Any]) -> str:
    """Return the type of a tokenizer's model where an old file leaves it out."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _parts(folder: Path, config: Mapping[str, Any], content: Mapping[str, bytes]) -> Found | None:
    """Return the vocabulary of files other than `tokenizer.json`; None where there are none."""
    if VOCAB_JSON in content:
        values = _json(folder, VOCAB_JSON, content)
        return _checked(folder / VOCAB_JSON, values), {}, VOCAB_JSON
    other = next((n for pattern in _OTHER for n in sorted(folder.glob(pattern))), None)
    if VOCAB_TXT in content and other is None:
        try:
            lines = content[VOCAB_TXT].decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{folder / VOCAB_TXT}: not UTF-8 text ({error}).") from None
        lines = lines[:-1] if lines and not lines[-1] else lines
        rows = {line.removesuffix("\r"): row for row, line in enumerate(lines)}
        return rows, {}, VOCAB_TXT
    name = next((name for name in PIECES if name in content), None)
    if name is not None and looks_like_model(content[name]):
        return _pieces(folder / name, content[name], config), {}, "pieces"
    if name is None and other is None:
        return None
    return _by_library(folder)


def _pieces(path: Path, content: bytes, config: Mapping[str, Any]) -> dict[str, int]:
    try:
        pieces = [piece.text for piece in pieces_of(content)]
    except ValueError as error:
        raise CheckpointError(f"{path}: no SentencePiece model ({error}).") from None
    stated = str(config.get("tokenizer_class") or "")
    own = stated.removesuffix("Fast").removesuffix("Tokenizer")
    if own == "Pegasus":
        return _by_library(path.parent)[0]
    front, skipped = _SHIFTED.get(own, ((), 0))
    return {token: row for row, token in enumerate((*front, *pieces[skipped:]))}


def _by_library(folder: Path) -> Found:
    """Return the tokens of files that only transformers reads."""
    try:
        import transformers

        check_named_classes(folder, transformers)
        # Without the last word, transformers asks on the terminal whether code may run.
        loaded: Any = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        rows: dict[str, int] = dict(loaded.get_vocab())
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its tokenizer is in a form that cannot be read here ({error}).\n"
            "Save it with transformers (save_pretrained), which writes tokenizer.json."
        ) from error
    added: dict[str, Mapping[str, Any]] = {}
    for token in loaded.get_added_vocab():
        added[str(token)] = {"special": True}
    return rows, added, ""


def _add_stated(
    folder: Path,
    rows: dict[str, int],
    added: dict[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    content: Mapping[str, bytes],
) -> None:
    """Add the tokens of `tokenizer_config.json` and `added_tokens.json` that are not there yet."""
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        token = as_text(entry)
        if token is None or not (str(number).isdecimal() and len(str(number)) <= _DIGITS):
            path = folder / CONFIG
            raise CheckpointError(f"{path}: added_tokens_decoder has an entry without a token.")
        said = cast("Mapping[str, Any]", entry) if isinstance(entry, Mapping) else {}
        flags = {k: v for k, v in said.items() if k not in ("content", "__type")}
        _add(token, int(number), flags, rows, added)
    for token, row in _checked(folder / ADDED, _json(folder, ADDED, content)).items():
        _add(token, row, {}, rows, added)


def _add(
    token: str,
    row: int,
    flags: Mapping[str, Any],
    rows: dict[str, int],
    added: dict[str, Mapping[str, Any]],
) -> None:
    """Note an added token; what stands first keeps its row."""
    rows.setdefault(token, row)
    added.setdefault(token, flags)


def _checked(path: Path, values: Mapping[Any, Any]) -> dict[str, int]:
    if wrong := next((t for t, row in values.items() if not _is_row(row)), None):
        raise CheckpointError(f"{path}: the token {wrong!r} has no row.")
    return {str(token): row for token, row in values.items()}


def _is_row(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
