"""A small file in place of a large one of an object store, which is read there range by range.

A library that opens one by itself finds no checkpoint in it, where zeros might be taken for one.
`small_files` puts the whole file there where a library is about to.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.storage.remote_urls import MARK, Url, url_of

_MAGIC = b"eutectic: this file lies in an object store; read it with eutectic. "
_MOST = 8192


@dataclass(frozen=True)
class Placeholder:
    """What a file in a store is."""

    url: Url
    size: int
    stamp: int  # differs once the file was replaced


def placeholder(path: Path) -> Placeholder | None:
    """Return what a placeholder stands for; None for every other file."""
    if MARK not in str(path):
        return None
    try:
        if path.stat().st_size > _MOST:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_MAGIC):
        return None
    told: Mapping[str, Any] = json.loads(content[len(_MAGIC) :])
    url = url_of(str(told["url"]))
    assert url is not None
    return Placeholder(url, int(told["bytes"]), int(told["stamp"]))


def content_of(held: Placeholder) -> bytes:
    """Return the bytes of a placeholder."""
    told = {"url": str(held.url), "bytes": held.size, "stamp": held.stamp}
    return _MAGIC + json.dumps(told).encode()
