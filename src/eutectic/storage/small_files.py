"""Files from elsewhere that are read whole: regular ones only, with bounds on all that they hold.

What is refused is an OSError where the file itself is at fault and a ValueError where its content
is, each with a text that names the bound; rooms turn both into their own errors.
"""

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from eutectic.storage.placeholders import placeholder

CONFIG_BYTES = 16 << 20  # of a configuration; id2label of 20,000 classes takes two of them
INDEX_BYTES = 100_000_000  # of what lists tensors, such as a safetensors header may have
JOURNAL_BYTES = 4 << 30  # of what this program wrote itself
MOST_DIGITS = 300  # of an integer, so that each is finite as a float
MOST_LEVELS = 100  # of lists and objects in each other

_BYTES = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
_CLOSED_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # a pipe put there after it was looked at
_KINDS: tuple[tuple[Callable[[int], bool], int, str], ...] = (
    (stat.S_ISDIR, errno.EISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, errno.EINVAL, "a pipe, not a regular file"),
    (stat.S_ISSOCK, errno.EINVAL, "a socket, not a regular file"),
    (stat.S_ISCHR, errno.EINVAL, "a device, not a regular file"),
    (stat.S_ISBLK, errno.EINVAL, "a device, not a regular file"),
)
_LONG = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")
# One half of a pair of UTF-16, as JSON writes it; whole pairs are found too, and looked at closely.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> int:
    """Return a descriptor that reads a regular file, links followed.

    OSError for anything else, which is never opened: that would wait for a pipe's writer, or set a
    device in motion.
    """
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | _BYTES | _CLOSED_ON_EXEC | _NO_WAITING)
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: Path) -> None:
    """Raise OSError unless a path leads to a regular file; for files that a library opens.

    A file of an object store is fetched in whole.
    """
    _check_regular(path.stat().st_mode, path)
    if placeholder(path) is not None:
        from eutectic.storage.mirror import make_whole

        make_whole(path)


def _check_regular(mode: int, path: Path) -> None:
    for is_kind, number, what in _KINDS:
        if is_kind(mode):
            raise OSError(number, what, str(path))


def read_start(path: Path, count: int) -> bytes:
    """Return the first bytes of a regular file; of one of an object store no more are fetched."""
    held = placeholder(path)
    if held is not None:
        from eutectic.storage.ranged_files import RangedFile

        content = bytearray(min(count, held.size))
        RangedFile(held).read_into(memoryview(content), 0)
        return bytes(content)
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(count)


def read_bytes(path: Path, limit: int = CONFIG_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; OSError for any other."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else file.read(limit + 1)
        if max(size, len(content)) > limit:
            what = f"{max(size, len(content)):,} bytes, the limit is {limit:,}"
            raise OSError(errno.EFBIG, what, str(path))
    return content


def read_text(path: Path, limit: int = CONFIG_BYTES) -> str:
    """Return the text of a regular file; ValueError where it is not UTF-8."""
    return decoded(read_bytes(path, limit))


def decoded(content: bytes) -> str:
    """Return UTF-8 as text; ValueError where it is anything else."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text, byte {error.start:,}") from None


def parse_json(text: str | bytes, *, unique: bool = False, deep: bool = True) -> Any:
    """Return the value of a JSON text; ValueError says what is wrong with it.

    Refused besides bad syntax: more than `MOST_LEVELS` levels, integers of more than `MOST_DIGITS`
    digits, halves of UTF-16 pairs, which no file can store again, and with `unique` keys that stand
    twice in one object, of which others take the last. Without `deep`, levels are not counted: for
    long tables of which the caller checks every value.
    """
    text = decoded(text) if isinstance(text, bytes) else text
    pairs = _no_duplicates if unique else None
    # Millions of calls in long tables, where nothing is refused.
    whole = _integer if _LONG.search(text) else None
    try:
        value = json.loads(text, parse_int=whole, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    strings = _SURROGATE.search(text) is not None
    if deep or strings:
        _check_values(value, strings=strings)
    return value


_TOO_DEEP = f"nested more than {MOST_LEVELS} levels deep"


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits, the limit is {MOST_DIGITS}")
    return int(digits)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} occurs twice")
    return table


def _check_values(value: Any, *, strings: bool) -> None:
    """Refuse values too deep to be handled by functions that call themselves, and bad `strings`."""
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                held = cast("dict[str, Any]", item)
                below += held.values()
                below += held if strings else ()
            elif isinstance(item, list):
                below += cast("list[Any]", item)
            elif strings and isinstance(item, str):
                _check_string(item)
        level = below if strings else [v for v in below if isinstance(v, (dict, list))]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_string(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{text[:60]!r} is not valid Unicode (half of a pair)") from None


def read_json(
    path: Path,
    error: Callable[[str], Exception],
    *,
    kind: type = dict,
    limit: int = CONFIG_BYTES,
    unique: bool = False,
) -> Any:
    """Return the JSON value of a file, an object or what `kind` says; raise `error` of a text."""
    try:
        value = parse_json(read_bytes(path, limit), unique=unique)
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror or fault}).") from fault
    except ValueError as fault:
        raise error(f"{path}: not valid JSON ({fault}).") from fault
    if not isinstance(value, kind):
        kinds = {list: "a list", dict: "a JSON object"}
        raise error(f"{path}: must hold {kinds[kind]}, holds {type(value).__name__}.")
    return value
