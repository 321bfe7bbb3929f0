"""Files of object stores, read range by range, with read-ahead and a cache of bounded size.

A range that follows the last one is fetched with more of what comes next, twice as much each time;
a large one goes straight into the caller's memory, in pieces side by side. What is fetched ahead is
kept for all files together within `CACHE_BYTES`. So each byte of a merge comes over the network
about once, by requests of some megabytes, however small the tensors are.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice

from eutectic.storage.file_systems import file_system, persistently
from eutectic.storage.placeholders import Placeholder
from eutectic.storage.remote_urls import Url

CACHE_BYTES = 256 << 20
PIECE = 16 << 20  # of one request at most
LARGE = 4 << 20  # from here on nothing is kept
HEADER = 256 << 10  # is fetched at a file's start: most headers with it
_LEAST = 64 << 10
_GAP = 256 << 10  # bytes that are cheaper to fetch than to leave out
_SIDE_BY_SIDE = 8
_MOST_STREAMS = 256
_IDLE = 10.0  # seconds after which a stream no longer counts


def fetch(url: Url, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of a file by one request, which is repeated if it fails."""
    if start == stop:
        return b""
    source = file_system(url)
    # The hub's would read ahead by itself, and forget it.
    options = {"cache_type": "none"} if url.scheme == "hf" else {}

    def ask() -> bytes:
        content: bytes = source.cat_file(url.path, start=start, end=stop, **options)
        if len(content) != stop - start:
            raise ConnectionError("fewer bytes than asked for")
        return content

    return persistently(url, ask)


def side_by_side() -> ThreadPoolExecutor:
    """Return the threads that wait for stores, of this process."""
    return _threads_of(os.getpid())


@cache
def _threads_of(process: int) -> ThreadPoolExecutor:
    del process  # a fork has none of its parent's threads
    return ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="eutectic-store")


def pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """Return a range in parts of one request each."""
    return [(a, min(stop, a + PIECE)) for a in range(start, stop, PIECE)]


@dataclass
class _Block:
    """Bytes that were fetched, or are being fetched."""

    start: int
    stop: int
    content: Future[bytes] = field(default_factory=lambda: Future[bytes]())


@dataclass
class _Blocks:
    """The blocks of one file, in order; they do not overlap."""

    starts: list[int] = field(default_factory=list[int])
    blocks: list[_Block] = field(default_factory=list[_Block])
    streams: OrderedDict[int, tuple[int, float]] = field(
        default_factory=OrderedDict[int, "tuple[int, float]"]
    )  # where a reader has come to -> how much is fetched for it, and when

    def at(self, position: int) -> tuple[_Block | None, int | None]:
        """Return the block that holds a byte, else where the next one begins, if any does."""
        place = bisect.bisect_right(self.starts, position)
        if place and self.blocks[place - 1].stop > position:
            return self.blocks[place - 1], None
        return None, self.starts[place] if place < len(self.starts) else None

    def add(self, block: _Block) -> None:
        place = bisect.bisect_right(self.starts, block.start)
        self.starts.insert(place, block.start)
        self.blocks.insert(place, block)

    def drop(self, block: _Block) -> None:
        place = bisect.bisect_right(self.starts, block.start) - 1
        if place >= 0 and self.blocks[place] is block:
            del self.starts[place], self.blocks[place]


class _Cache:
    """What was fetched of all files, the least recently used of it forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Hashable, _Blocks] = {}
        self._used: OrderedDict[int, tuple[Hashable, _Block]] = OrderedDict()
        self._bytes = 0

    def window(self, key: Hashable, position: int, need: int) -> int:
        """Return how much to fetch for a read of `need` bytes, as far as one can foresee."""
        with self._lock:
            streams = self._files.setdefault(key, _Blocks()).streams
            before = next((e for e in reversed(streams) if abs(position - e) <= _GAP), None)
            window = HEADER if position == 0 else _LEAST
            if before is not None:
                window = streams.pop(before)[0]
            # Not more for all readers together than is kept.
            now = time.monotonic()
            files = self._files.values()
            busy = sum(now - t < _IDLE for f in files for _, t in f.streams.values())
            most = max(_LEAST, CACHE_BYTES // 4 // (busy + 1))
            grown = min(2 * max(window, need), PIECE, most)
            streams[position + need] = (max(grown, _LEAST), now)
            while len(streams) > _MOST_STREAMS:
                streams.popitem(last=False)
            return max(need, min(window, most))

    def moved(self, key: Hashable, position: int, stop: int) -> None:
        """Take note that a reader has come from one place to another."""
        with self._lock:
            streams = self._files.setdefault(key, _Blocks()).streams
            before = next((e for e in reversed(streams) if abs(position - e) <= _GAP), None)
            if before is not None:
                window, _ = streams.pop(before)
                streams[stop] = (window, time.monotonic())

    def take(self, key: Hashable, position: int, window: int, size: int) -> tuple[_Block, bool]:
        """Return the block that holds a byte, and whether the caller must fetch it."""
        with self._lock:
            blocks = self._files.setdefault(key, _Blocks())
            block, following = blocks.at(position)
            if block is not None:
                self._used.move_to_end(id(block))
                return block, False
            block = _Block(position, min(position + window, size, following or size))
            blocks.add(block)
            self._used[id(block)] = (key, block)
            self._bytes += block.stop - block.start
            self._forget(block)
            return block, True

    def covered(self, key: Hashable, position: int, stop: int) -> tuple[_Block | None, int]:
        """Return the block at a place, or None and where the next one begins, `stop` at most."""
        with self._lock:
            blocks = self._files.get(key)
            block, following = (None, None) if blocks is None else blocks.at(position)
            if block is not None:
                self._used.move_to_end(id(block))
            return block, min(stop, following or stop)

    def failed(self, key: Hashable, block: _Block) -> None:
        """Forget a block that could not be fetched."""
        with self._lock:
            self._remove(key, block)

    def _forget(self, kept: _Block) -> None:
        for key, block in list(self._used.values()):
            if self._bytes <= CACHE_BYTES:
                return
            if block is not kept and block.content.done():
                self._remove(key, block)

    def _remove(self, key: Hashable, block: _Block) -> None:
        if self._used.pop(id(block), None) is not None:
            self._files[key].drop(block)
            self._bytes -= block.stop - block.start


_CACHE = _Cache()


class RangedFile:
    """A file of an object store that is read at any offset by any thread; see `OpenedFile`."""

    def __init__(self, held: Placeholder) -> None:
        self.size = held.size
        self.stamp: Hashable = held.stamp
        self._url = held.url
        self._key = (str(held.url), held.stamp)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on; OSError where the file ends early."""
        stop = offset + len(buffer)
        if stop > self.size:
            raise OSError(errno.EIO, "the file ends early", str(self._url))
        position, waiting = offset, list[tuple[int, Future[bytes]]]()
        large = len(buffer) >= LARGE
        while position < stop:
            if large:
                block, following = _CACHE.covered(self._key, position, stop)
                if block is None:
                    for start, end in pieces(position, following):
                        found = side_by_side().submit(fetch, self._url, start, end)
                        waiting.append((start, found))
                    position = following
                    continue
            else:
                block = self._block(position, stop)
            content, start = block.content.result(), block.start
            end = min(stop, block.stop)
            buffer[position - offset : end - offset] = content[position - start : end - start]
            position = end
        for start, found in waiting:
            content = found.result()
            buffer[start - offset : start - offset + len(content)] = content
        _CACHE.moved(self._key, offset, stop)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch ranges that are about to be read, neighbours by one request, side by side."""
        todo = [piece for near in merged(ranges) for piece in pieces(*near)]
        if sum(stop - start for start, stop in todo) <= CACHE_BYTES // 2:
            list(side_by_side().map(self._fetch_all, todo))

    def _fetch_all(self, wanted: tuple[int, int]) -> None:
        position, stop = wanted
        while position < stop:
            block, following = _CACHE.covered(self._key, position, stop)
            if block is None:
                block = self._fetched(position, following - position)
            position = block.stop

    def close(self) -> None:
        """Do nothing: no connection belongs to a file."""

    def _block(self, position: int, stop: int) -> _Block:
        block, _ = _CACHE.covered(self._key, position, stop)
        if block is not None:
            return block
        return self._fetched(position, _CACHE.window(self._key, position, stop - position))

    def _fetched(self, position: int, window: int) -> _Block:
        block, ours = _CACHE.take(self._key, position, window, self.size)
        if ours:
            try:
                block.content.set_result(fetch(self._url, block.start, block.stop))
            except BaseException as error:
                _CACHE.failed(self._key, block)
                block.content.set_exception(error)
                raise
        return block


def merged(ranges: Iterable[tuple[int, int]], gap: int = _GAP) -> list[tuple[int, int]]:
    """Return ranges in order, neighbours as one where little lies between them."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif stop > start:
            found.append((start, stop))
    return found


def whole(held: Placeholder) -> Iterator[bytes]:
    """Yield the pieces of a file in order; some of the next are on their way meanwhile."""
    ask = partial(fetch, held.url)
    todo = iter(pieces(0, held.size))
    coming = deque(side_by_side().submit(ask, *piece) for piece in islice(todo, _SIDE_BY_SIDE))
    while coming:
        yield coming.popleft().result()
        coming.extend(side_by_side().submit(ask, *piece) for piece in islice(todo, 1))
