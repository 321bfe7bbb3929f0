"""What is hashed of an output: every byte, but versions, times and the identity of a request.

Folders are replaced by fixed words, so that runs in different places compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Keys that tell how or when a thing was made, not what it holds.
TOLD = frozenset(
    {"eutectic", "torch", "request", "versions", "seconds", "peak_bytes", "pair", "resumed"}
)
PROVENANCE_LINES = re.compile(r'^ "(eutectic|torch|request)": .*\n', re.MULTILINE)
CARD_VERSIONS = re.compile(r"using eutectic \S+ \(torch [^)]*\)")


class Places:
    """Folders that differ between runs, and the words that stand for them."""

    def __init__(self, words: Mapping[str, Path]) -> None:
        longest_first = sorted(words.items(), key=lambda item: -len(str(item[1])))
        self._words = [(str(path.resolve()), word) for word, path in longest_first]

    def hide(self, text: str) -> str:
        """Return the text with every folder replaced."""
        for path, word in self._words:
            text = text.replace(path, word)
        return text


def digests(folder: Path, places: Places) -> dict[str, str]:
    """Return relative path -> hash of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path, places)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def file_digest(path: Path, places: Places) -> str:
    """Return the hash of one file as its kind asks for."""
    if path.suffix == ".safetensors":
        return _safetensors_digest(path, places)
    if path.suffix not in (".json", ".jsonl", ".md", ".txt", ".yaml"):
        return _hash(path.read_bytes())
    text = path.read_text(encoding="utf-8")
    if path.name == "eutectic.json":
        text = PROVENANCE_LINES.sub("", text)
    elif path.name == "README.md":
        text = CARD_VERSIONS.sub("", text)
    elif path.name in ("results.json", "inspection.json"):
        text = _canonical(json.loads(text), places)
    elif path.name.endswith(".outcomes.jsonl"):
        text = "\n".join(_canonical(json.loads(line), places) for line in text.splitlines())
    return _hash(places.hide(text).encode())


def value_digests(value: Any, places: Places) -> dict[str, str]:
    """Return the hash of what a function returned: of a report, one for each of its fields."""
    if dataclasses.is_dataclass(value) or hasattr(value, "model_dump"):
        fields = _fields(value)
        return {
            f"returned.{name}": _hash(_canonical(field, places).encode())
            for name, field in fields.items()
            if name not in TOLD
        }
    return {"returned": _hash(_canonical(value, places).encode())}


def tensor_digest(tensor: Tensor) -> str:
    """Return the hash of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{tensor.dtype} {list(tensor.shape)} {_hash(content)}"


def _safetensors_digest(path: Path, places: Places) -> str:
    """Return a hash of header and tensors, the metadata sorted: writers keep them in any order."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size).decode()
        metadata: dict[str, str] = {}
        if (start := header.find('"__metadata__":')) >= 0:
            begin = start + len('"__metadata__":')
            metadata, end = json.JSONDecoder().raw_decode(header, begin)
            header = header[:start] + header[end:]
        found = hashlib.sha256(places.hide(header).strip().encode())
        found.update(_canonical({k: _parsed(v) for k, v in metadata.items()}, places).encode())
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def _parsed(text: str) -> Any:
    """Return the value of a metadata entry that is JSON, other entries as they are."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _canonical(value: Any, places: Places) -> str:
    return places.hide(json.dumps(_plain(value), sort_keys=True))


def _plain(value: Any) -> Any:
    """Return a value of JSON's types, tensors as their hashes, without what is only told."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if dataclasses.is_dataclass(value) or hasattr(value, "model_dump"):
        value = _fields(value)
    elif isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in TOLD}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or of a pydantic model."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.model_dump(mode="json")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
