"""Reading a file of a store in ranges: the right bytes, few requests, a bounded cache."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from eutectic.storage import ranged_files
from eutectic.storage.placeholders import Placeholder
from eutectic.storage.ranged_files import HEADER, PIECE, RangedFile, merged, pieces
from eutectic.storage.remote_urls import Url

SIZE = 40_000_000


class _Fetched:
    """Bytes of a file that never was, and which ranges of it were asked for."""

    def __init__(self) -> None:
        self.content = random.Random(0).randbytes(1 << 16) * (SIZE // (1 << 16) + 1)
        self.content = self.content[:SIZE]
        self.ranges: list[tuple[int, int]] = []
        self.fails = 0

    def __call__(self, url: Url, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        if self.fails:
            self.fails -= 1
            raise OSError(5, "the store does not answer")
        return self.content[start:stop]

    @property
    def bytes(self) -> int:
        return sum(b - a for a, b in self.ranges)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Fetched]:
    source = _Fetched()
    monkeypatch.setattr(ranged_files, "fetch", source)
    monkeypatch.setattr(ranged_files, "_CACHE", ranged_files._Cache())
    yield source


def _open(size: int = SIZE) -> RangedFile:
    return RangedFile(Placeholder(Url("s3", ("bucket", "file")), size, 1))


def _read(file: RangedFile, start: int, count: int) -> bytes:
    buffer = bytearray(count)
    file.read_into(memoryview(buffer), start)
    return bytes(buffer)


def test_a_header_and_what_stands_behind_it_is_one_request(fetched: _Fetched) -> None:
    file = _open()
    assert _read(file, 0, 512) == fetched.content[:512]
    assert _read(file, 8, 100_000) == fetched.content[8:100_008]
    assert fetched.ranges == [(0, HEADER)]


def test_small_tensors_in_a_row_are_few_requests_and_no_byte_twice(fetched: _Fetched) -> None:
    file, at = _open(), 0
    while at < SIZE:
        count = min(30_000, SIZE - at)
        assert _read(file, at, count) == fetched.content[at : at + count]
        at += count
    assert fetched.bytes == SIZE
    assert len(fetched.ranges) < 12  # of 1,334 reads


def test_far_reads_take_no_more_than_they_need(fetched: _Fetched) -> None:
    file = _open()
    for place in range(1, 30):
        _read(file, place * 1_300_000, 64)
    assert fetched.bytes <= 29 * ranged_files._LEAST


def test_a_large_tensor_comes_in_pieces_and_is_not_kept(fetched: _Fetched) -> None:
    file = _open()
    assert _read(file, 100, 35_000_000) == fetched.content[100:35_000_100]
    assert sorted(fetched.ranges) == pieces(100, 35_000_100)
    assert ranged_files._CACHE._bytes == 0


def test_a_large_tensor_takes_what_is_there_already(fetched: _Fetched) -> None:
    file = _open()
    _read(file, 0, 10)
    assert _read(file, 1000, 6_000_000) == fetched.content[1000:6_001_000]
    assert fetched.bytes == 6_001_000


def test_what_is_expected_is_asked_for_with_its_neighbours(fetched: _Fetched) -> None:
    file = _open()
    near = [(1_000_000 + 5000 * i, 1_000_000 + 5000 * i + 64) for i in range(100)]
    file.expect([*near, (30_000_000, 30_000_100)])
    for start, stop in near:
        assert _read(file, start, stop - start) == fetched.content[start:stop]
    assert _read(file, 30_000_000, 100) == fetched.content[30_000_000:30_000_100]
    assert sorted(fetched.ranges) == [(1_000_000, 1_495_064), (30_000_000, 30_000_100)]


def test_expecting_fills_the_gaps_between_what_is_there(fetched: _Fetched) -> None:
    file = _open()
    _read(file, 500_000, 10)
    file.expect([(400_000, 700_000)])
    assert _read(file, 400_000, 300_000) == fetched.content[400_000:700_000]
    assert fetched.bytes == 300_000


def test_the_cache_is_bounded(fetched: _Fetched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_files, "CACHE_BYTES", 2_000_000)
    file = _open()
    for at in range(0, SIZE - 100_000, 100_000):
        assert _read(file, at, 100_000) == fetched.content[at : at + 100_000]
        assert ranged_files._CACHE._bytes <= 2_000_000
    assert fetched.bytes < 1.02 * SIZE


def test_many_readers_of_one_place_ask_once(fetched: _Fetched) -> None:
    file, found = _open(), list[bytes]()
    threads = [threading.Thread(target=lambda: found.append(_read(file, 0, 999))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {fetched.content[:999]}
    assert len(fetched.ranges) == 1


def test_random_reads_by_threads_give_the_files_bytes(fetched: _Fetched) -> None:
    file, wrong = _open(), list[Any]()

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            start = draw.randrange(SIZE)
            count = min(SIZE - start, draw.choice((1, 700, 90_000, 5_000_000)))
            if _read(file, start, count) != fetched.content[start : start + count]:
                wrong.append((start, count))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failure_is_told_and_the_next_read_asks_again(fetched: _Fetched) -> None:
    file = _open()
    fetched.fails = 1
    with pytest.raises(OSError, match="does not answer"):
        _read(file, 0, 10)
    assert _read(file, 0, 10) == fetched.content[:10]


def test_reading_behind_the_end_is_refused(fetched: _Fetched) -> None:
    with pytest.raises(OSError, match="ends early"):
        _read(_open(100), 90, 20)
    assert not fetched.ranges


def test_ranges_are_merged_across_small_gaps() -> None:
    assert merged([(10, 20), (0, 5), (300, 301), (20, 20)], gap=6) == [(0, 20), (300, 301)]
    assert pieces(3, PIECE + 5) == [(3, PIECE + 3), (PIECE + 3, PIECE + 5)]
