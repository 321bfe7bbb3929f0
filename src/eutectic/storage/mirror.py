"""What lies in an object store, shown as a folder of this machine.

Small files are fetched, all others have a placeholder. One listing tells what is there; files that
are here already are kept while the store says that they are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.errors import CheckpointError, why_failed
from eutectic.storage.file_systems import check_bucket, file_system, persistently
from eutectic.storage.placeholders import Placeholder, content_of, placeholder
from eutectic.storage.ranged_files import fetch, pieces, side_by_side, whole
from eutectic.storage.remote_urls import Url, is_staging, local_path, shown_at, url_of

MANIFEST = "eutectic.manifest.json"  # is written last into a folder that is complete
RECORD = ".eutectic-store.json"
_SMALL = 32 << 20  # of a file that is fetched when its folder is opened
_MOST_FILES = 10_000
_MOST_LEVELS = 5
# Weights, archives and states of training, which are read in parts or not at all.
_LARGE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|onnx|onnx_data|msgpack|npz|npy|zip|tar|tgz|gz|zst|7z"
    r"|pkl|pickle|ot|tflite|parquet|arrow|jsonl|csv|tsv|png|jpe?g|webp)",
    re.IGNORECASE,
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
_SINGLE = (*_WEIGHTS, ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".txt", ".parquet")
# Folders of a model's folder that are seldom meant by it.
_ASIDE = re.compile(r"(checkpoint-|global_step)\d+|runs|logs|wandb|onnx.*|openvino.*|original")


@dataclass(frozen=True)
class Stored:
    """A file as a store lists it."""

    url: Url
    size: int
    stamp: int  # differs once the file was replaced


_seen: set[tuple[int, Url]] = set()  # of this process: what was asked for already


def view(location: str | Path) -> Path:
    """Return a path that shows what lies at a location, looked at anew.

    A path of this machine is itself. CheckpointError says in words why a store cannot be asked.
    """
    url = url_of(location)
    if url is None:
        return local_path(location)
    path = shown_at(url)
    if is_staging(path):
        return path
    try:
        return _view(url, path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or url}: {why_failed(error)}.") from None


def view_once(location: str | Path) -> Path:
    """Return the same of a place that this process has looked at, if it has, without asking."""
    url = url_of(location)
    return view(location) if url is None or not seen(shown_at(url)) else shown_at(url)


def seen(path: Path) -> bool:
    """Tell whether this process has looked at what a path shows, or at a folder above it."""
    url = url_of(path)
    if url is None:
        return True
    above = [Url(url.scheme, url.parts[:n]) for n in range(len(url.parts), 1, -1)]
    return any((os.getpid(), one) in _seen for one in above)


def forget(path: Path) -> None:
    """Have a place looked at anew when it is needed next."""
    url = url_of(path)
    for known in list(_seen):
        if url is None or known[1].parts[: len(url.parts)] == url.parts:
            _seen.discard(known)


def _view(url: Url, path: Path) -> Path:
    single = url.name.lower().endswith(_SINGLE) and (url.scheme != "hf" or len(url.parts) > 2)
    if single:
        # What decides how weights are read lies beside them.
        weights = url.name.lower().endswith(_WEIGHTS)
        held = [f for f in stored_in(url.parent) if f.url == url] if weights else _one(url)
        if held:
            beside = stored_in(url.parent) if weights else held
            _show(url.parent, beside, deep=False, alone=not weights)
            _seen.add((os.getpid(), url))
            return path
    found = stored_below(url)
    own = [stored for stored in found if stored.url == url]
    if own:  # a file whose name does not tell
        _show(url.parent, own, deep=False, alone=True)
    else:
        _show(url, found)
    _seen.add((os.getpid(), url))
    return path


def stored_below(url: Url) -> list[Stored]:
    """Return all files below a folder, by one listing; none where there is nothing."""
    source = file_system(url)

    def ask() -> Mapping[str, Mapping[str, Any]]:
        source.invalidate_cache()
        return source.find(url.path, detail=True)

    try:
        found = persistently(url, ask)
    except FileNotFoundError as error:
        if error.strerror != "no such object":
            raise
        found = {}
    if not found:
        check_bucket(url)
    return _of_listing(url, found.values())


def stored_in(url: Url) -> list[Stored]:
    """Return the files of a folder, without those of folders in it."""
    source = file_system(url)

    def ask() -> Iterable[Mapping[str, Any]]:
        source.invalidate_cache()
        return source.ls(url.path, detail=True)

    try:
        found = persistently(url, ask)
    except FileNotFoundError as error:
        if error.strerror == "no such object":
            return []
        raise
    return _of_listing(url, found)


def _one(url: Url) -> list[Stored]:
    source = file_system(url)
    try:
        found = persistently(url, lambda: source.info(url.path))
    except FileNotFoundError as error:
        if error.strerror == "no such object":
            return []
        raise
    return _of_listing(url.parent, [found])


def _of_listing(url: Url, listed: Iterable[Mapping[str, Any]]) -> list[Stored]:
    found: list[Stored] = []
    for info in listed:
        if info.get("type", "file") != "file":
            continue
        parts = tuple(p for p in str(info["name"]).split("/") if p)
        inner = parts[len(url.parts) :]
        odd = {".", ".."} & {*inner} or any("\\" in p or ord(min(p)) < 32 for p in inner)
        if parts[: len(url.parts)] != url.parts or odd or len(inner) > _MOST_LEVELS:
            continue
        # What some programs put for a folder, and what the hub puts into every repository.
        if str(info["name"]).endswith("/") or inner == (".gitattributes",):
            continue
        found.append(Stored(Url(url.scheme, parts), int(info["size"] or 0), _stamp(info)))
        if len(found) > _MOST_FILES:
            raise OSError(0, f"holds more than {_MOST_FILES:,} files; name one folder", str(url))
    return sorted(found, key=lambda stored: stored.url.parts)


def _stamp(info: Mapping[str, Any]) -> int:
    """Return a number that differs once a file was replaced, of what a store says of it."""
    lfs = info.get("lfs")
    known = [lfs["sha256"] if isinstance(lfs, Mapping) and "sha256" in lfs else None]
    known += [info.get(key) for key in ("ETag", "etag", "md5Hash", "content_md5", "blob_id")]
    known += [info.get(key) for key in ("generation", "LastModified", "mtime", "created")]
    first = next((str(value) for value in known if value), "")
    return int.from_bytes(hashlib.sha256(f"{info['size']} {first}".encode()).digest()[:7], "big")


def _show(url: Url, files: Iterable[Stored], *, deep: bool = True, alone: bool = False) -> None:
    """Make the folder of a place such that it shows these files, and no others.

    Without `deep` nothing is said of folders in it; `alone`, nothing of any other file.
    """
    folder = shown_at(url)
    before = _record(folder)
    record = {n: stamp for n, stamp in before.items() if alone or ("/" in n and not deep)}
    todo: list[tuple[Stored, Path]] = []
    held = {"/".join(stored.url.parts[len(url.parts) :]): stored for stored in files}
    if not alone:
        _remove_others(folder, held, deep)
    if not held:
        return
    for name, stored in held.items():
        path, known = folder / name, before.get(name)
        if not (known == stored.stamp and _is_shown(path, stored)):
            _make_room(folder, path)
            if _is_small(name, stored.size):
                todo.append((stored, path))
            else:
                _put(path, content_of(Placeholder(stored.url, stored.size, stored.stamp)))
        record[name] = stored.stamp
    list(side_by_side().map(_fetch_small, todo))
    _put(folder / RECORD, json.dumps(record).encode())
    if MANIFEST in held:
        _check_manifest(url, folder, held)


def _check_manifest(url: Url, folder: Path, held: Mapping[str, Stored]) -> None:
    """Refuse a folder that is not what its manifest says: files of two outputs in one place."""
    try:
        told: Any = json.loads((folder / MANIFEST).read_bytes())["files"]
        sizes = {str(name): int(file["bytes"]) for name, file in told.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        raise OSError(0, f"{MANIFEST} is damaged; remove it, or copy it again", str(url)) from None
    for name, size in sizes.items():
        if name not in held:
            raise OSError(0, f"lacks '{name}', which {MANIFEST} lists; copy it again", str(url))
        if held[name].size != size:
            what = f"'{name}' has {held[name].size:,} bytes, by {MANIFEST} it has {size:,}"
            raise OSError(0, f"{what}; copy the folder again", str(url))


def _is_small(name: str, size: int) -> bool:
    aside = "/" in name and _ASIDE.fullmatch(name.partition("/")[0]) is not None
    return size <= _SMALL and _LARGE.fullmatch(name) is None and not aside


def _is_shown(path: Path, stored: Stored) -> bool:
    held = placeholder(path)
    if held is not None:
        return (held.url, held.size, held.stamp) == (stored.url, stored.size, stored.stamp)
    return path.is_file() and path.stat().st_size == stored.size


def _fetch_small(todo: tuple[Stored, Path]) -> None:
    stored, path = todo
    _put(path, b"".join(fetch(stored.url, *piece) for piece in pieces(0, stored.size)))


def _record(folder: Path) -> dict[str, int]:
    try:
        found: Any = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remove_others(folder: Path, held: Mapping[str, Stored], deep: bool) -> None:
    """Remove what is shown and is no longer there; a run's own files are left."""
    if not folder.is_dir():
        if folder.exists():
            folder.unlink()
        return
    for path in sorted(folder.rglob("*") if deep else folder.iterdir(), reverse=True):
        if not deep and path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        if is_staging(path) or name == RECORD or name in held:
            continue
        with suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if not held:
        with suppress(OSError):
            (folder / RECORD).unlink(missing_ok=True)
            folder.rmdir()


def _make_room(folder: Path, path: Path) -> None:
    """Make the folders of a file, where files of an earlier content may stand in the way."""
    for above in reversed(path.parents):
        if above.is_relative_to(folder.parent) and above.is_file():
            above.unlink()
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _put(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file that other processes see in full or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for part in (content,) if isinstance(content, bytes) else content:
                file.write(part)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def make_whole(path: Path) -> None:
    """Put a file itself in place of its placeholder, for what reads it by itself.

    OSError says in words why it cannot be fetched.
    """
    held = placeholder(path)
    if held is not None:
        _put(path, whole(held))


def make_all_whole(folder: Path, names: Iterable[str] | None = None) -> None:
    """Do so for these files of a folder, or for all of them.

    CheckpointError where one cannot be fetched.
    """
    url = url_of(folder)
    if url is None:
        return
    paths = folder.rglob("*") if names is None else [folder / name for name in names]
    try:
        for path in paths:
            if not is_staging(path) and path.is_file():
                make_whole(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or url}: {why_failed(error)}.") from None
