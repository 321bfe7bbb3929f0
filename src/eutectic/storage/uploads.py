"""How files are sent to object stores, where nothing can be renamed.

The files of a folder are sent in parts that nobody sees. When all are there they are completed one
after the other, indices of weights last, and then the manifest, which has the name, the bytes and
the SHA-256 of each. A folder without its manifest is not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eutectic.storage.file_systems import file_system, in_words, is_of_a_store
from eutectic.storage.mirror import MANIFEST
from eutectic.storage.remote_urls import Url

PART = 16 << 20
_ONE_REQUEST = 4 << 20  # up to here a file is one request
_MOST_PARTS = 9_000  # stores take 10,000
_SIDE_BY_SIDE = 4
_INDEX = ".index.json"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sent:
    """A file that was sent, which nobody sees before it is completed."""

    name: str
    size: int
    sha256: str
    complete: Callable[[], None]
    discard: Callable[[], None]


def send_folder(folder: Path, names: Sequence[str], url: Url, begin: Callable[[], None]) -> None:
    """Send the files of a folder, to be seen together.

    `begin` is called when all are there and the first is about to be seen. OSError in words where
    one cannot be sent; then what was sent so far is discarded.
    """
    ordered = sorted(names, key=lambda name: (name.endswith(_INDEX), name))
    _abort_earlier(url, names)
    sent: list[Sent] = []
    try:
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            coming = [pool.submit(_send, folder / name, name, url) for name in ordered]
            for one in coming:
                if one.exception() is not None:
                    for other in coming:
                        other.cancel()
            failed = [e for one in coming if not one.cancelled() and (e := one.exception())]
            sent = [one.result() for one in coming if not one.cancelled() and not one.exception()]
        if failed:
            raise failed[0]
        begin()
        for file in ordered:
            next(s for s in sent if s.name == file).complete()
        put(manifest_of(sent), url / MANIFEST)
    except BaseException:
        for one in sent:
            with suppress(Exception):  # of what was completed nothing is left to discard
                one.discard()
        raise


def manifest_of(sent: Sequence[Sent]) -> bytes:
    """Return the manifest of files."""
    files = {s.name: {"bytes": s.size, "sha256": s.sha256} for s in sorted(sent, key=_name)}
    return (json.dumps({"format": 1, "files": files}, indent=1) + "\n").encode()


def sent_as(file: Path, name: str) -> Sent:
    """Return what a manifest says of a file that is sent by other means."""
    hashed, size = hashlib.sha256(), 0
    for block in _blocks(file, PART):
        hashed.update(block)
        size += len(block)
    return Sent(name, size, hashed.hexdigest(), lambda: None, lambda: None)


def _name(sent: Sent) -> str:
    return sent.name


def put(content: bytes, url: Url) -> None:
    """Write a small file at once; it is absent, as before, or complete."""
    _asked(url, lambda: file_system(url, writing=True).pipe_file(url.path, content))


def put_file(file: Path, url: Url) -> None:
    """Write a file of any size, which is absent, as before, or complete."""
    sent = _send(file, url.name, url.parent)
    try:
        sent.complete()
    except BaseException:
        with suppress(Exception):
            sent.discard()
        raise


def _send(file: Path, name: str, folder: Url) -> Sent:
    url, size = folder / name, file.stat().st_size
    if size <= _ONE_REQUEST:
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return Sent(name, len(content), digest, lambda: put(content, url), lambda: None)
    part = max(PART, -(-size // _MOST_PARTS))
    store = file_system(url, writing=True)
    # Azure's files are seen when they are closed, whatever is asked for.
    by_closing = url.scheme == "az"
    options = {} if by_closing else {"autocommit": False}
    opened = _asked(url, lambda: store.open(url.path, "wb", block_size=part, **options))
    hashed = hashlib.sha256()
    try:
        for block in _blocks(file, part):
            hashed.update(block)
            _asked(url, lambda block=block: opened.write(block))
        if not by_closing:
            _asked(url, opened.close)
    except BaseException:
        with suppress(Exception):
            _discard(opened)
        raise

    def complete() -> None:
        try:
            _asked(url, opened.close if by_closing else opened.commit)
        except OSError:
            # An answer may be lost after the store has done it.
            if _size_there(url) != size:
                raise

    return Sent(name, size, hashed.hexdigest(), complete, lambda: _discard(opened))


def _discard(opened: Any) -> None:
    opened.discard()
    opened.closed = True  # else it would be sent when Python forgets it


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(size):
            yield block


def _size_there(url: Url) -> int | None:
    try:
        return int(file_system(url, writing=True).info(url.path)["size"])
    except Exception:
        return None


def _abort_earlier(url: Url, names: Sequence[str]) -> None:
    """End uploads of the same files that a killed run has begun; stores charge for their parts."""
    if url.scheme != "s3":
        return  # others forget them by themselves
    store: Any = file_system(url, writing=True)
    prefix = "/".join(url.parts[1:])
    ours = {f"{prefix}/{name}" for name in names}
    with suppress(Exception):  # whoever may write need not be allowed to list
        listed = store.call_s3("list_multipart_uploads", Bucket=url.bucket, Prefix=prefix)
        for upload in listed.get("Uploads", []):
            if upload["Key"] in ours:
                store.abort_mpu(url.bucket, upload["Key"], upload["UploadId"])


def _asked(url: Url, call: Callable[[], _T]) -> _T:
    """Return what a call gives; an error of the store comes in words."""
    try:
        return call()
    except Exception as error:
        if not is_of_a_store(error):
            raise
        raise in_words(url, error) from None
