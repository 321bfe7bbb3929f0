"""Identities of what decides a result: weights, heads, tokenizers, other files, versions."""

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal

from eutectic.checkpoint.experts import fingerprint_of, is_adapter
from eutectic.evaluation.task_files import Task
from eutectic.models.loading import base_folder
from eutectic.storage.small_files import open_regular
from eutectic.versions import version

_PROCESSOR_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tokenizer.model", "source.spm", "target.spm"),
    *("preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
ROUTED = "routed.json"
ROUTED_HEADS = "heads"  # the folder of a routed model that holds the experts' heads
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def fingerprint(folder: Path, base: Path | None) -> str:
    """Return the identity of a checkpoint's weights; of an adapter's own and its base's."""
    whole = base_folder(folder, base)
    found = fingerprint_of(folder, whole)
    if whole != folder:
        return digest_of([found, fingerprint(whole, None)])
    if not (folder / ROUTED).is_file():
        return found
    extra = [file_hash(folder / name) for name in (ROUTED, "routed.safetensors")]
    extra += [file_hash(f) for f in sorted(folder.glob(f"{ROUTED_HEADS}/*/*")) if f.is_file()]
    return digest_of([found, *extra])


def weights_identity(folder: Path, base: Path | None) -> list[Any]:
    """Return a checkpoint's fingerprint, with sizes and times of change of its files of weights."""
    folders = [folder, base] if base is not None and is_adapter(folder) else [folder]
    files = [p for f in folders for p in sorted(f.glob("*")) if p.suffix in _WEIGHTS]
    stats = [(p.name, p.stat()) for p in files]
    return [fingerprint(folder, base), [[n, s.st_size, s.st_mtime_ns] for n, s in stats]]


def head_hashes(task: Task) -> dict[Literal["head", "base_head"], str]:
    """Return the SHA-256 of the head files that a task names."""
    files: dict[Literal["head", "base_head"], str | None]
    files = {"head": task.head, "base_head": task.base_head}
    return {role: file_hash(Path(file)) for role, file in files.items() if file is not None}


@cache
def versions(*, with_harness: bool = False) -> dict[str, str]:
    """Return the versions of what computes the figures."""
    found: dict[str, str] = {}
    harness = ("lm-eval",) if with_harness else ()
    for package in ("eutectic", "torch", "transformers", "tokenizers", "numpy", *harness):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor_hash(folder: Path) -> str:
    """Return the identity of a folder's tokenizer or image processor, "" if it has none."""
    found = {n: file_hash(folder / n) for n in _PROCESSOR_FILES if (folder / n).is_file()}
    return digest_of(found) if found else ""


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
