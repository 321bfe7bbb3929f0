"""What every storage must do, shown for the local disk, with the system's calls and without them.

Guards that a file is complete or absent, that a folder appears at once, and that a stranger's files
are left alone.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from eutectic.storage import Storage, storage_of

POSITIONED = ("preadv", "pread", "pwrite", "pwritev", "posix_fallocate")


@pytest.fixture(params=["fast", "portable"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The local disk; `portable`: on a system without positioned reads and writes."""
    if request.param == "portable":
        for name in POSITIONED:
            monkeypatch.delattr(os, name, raising=False)
    return storage_of(Path())


def read(storage: Storage, file: Path, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    opened = storage.open(file)
    try:
        opened.read_into(memoryview(buffer), offset)
    finally:
        opened.close()
    return bytes(buffer)


def test_a_range_is_read(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    assert read(storage, tmp_path / "a", 10, 5) == bytes(range(10, 15))
    assert read(storage, tmp_path / "a", 100, 0) == b""
    with pytest.raises(OSError, match="ends early"):
        read(storage, tmp_path / "a", 90, 11)
    with pytest.raises(FileNotFoundError):
        storage.open(tmp_path / "b")


def test_size_stamp_and_identity(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"123")
    before = storage.open(file)
    assert before.size == 3
    assert storage.identity(file) == (3, file.stat().st_mtime_ns)
    os.utime(file, ns=(5, 5))
    after = storage.open(file)
    assert after.stamp != before.stamp
    assert storage.identity(file) == (3, 5)
    assert storage.identity(tmp_path / "b") is None
    before.close()
    after.close()


def test_a_staged_file_is_filled_in_any_order(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "new/folder/a"
    staged = storage.stage(file, 1000, fresh=True)
    assert (staged.size, file.stat().st_size) == (1000, 1000)

    def fill(part: int) -> None:
        for start in range(part, 1000, 4):
            staged.write(memoryview(bytes([start % 251])), start)

    run_together([lambda part=part: fill(part) for part in range(4)])
    whole = bytearray(1000)
    staged.read_into(memoryview(whole), 0)
    assert whole == bytes(i % 251 for i in range(1000))
    staged.sync()
    staged.close()
    assert file.read_bytes() == whole


def test_threads_read_while_others_write(storage: Storage, tmp_path: Path) -> None:
    staged = storage.stage(tmp_path / "a", 4000, fresh=True)
    wrong: list[int] = []

    def own(part: int) -> None:
        for turn in range(200):
            data = bytes([turn]) * 1000
            staged.write(memoryview(data), part * 1000)
            found = bytearray(1000)
            staged.read_into(memoryview(found), part * 1000)
            if found != data:
                wrong.append(turn)

    run_together([lambda part=part: own(part) for part in range(4)])
    staged.close()
    assert wrong == []


def run_together(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_staged_file_is_taken_up_again(storage: Storage, tmp_path: Path) -> None:
    assert storage.staged(tmp_path / "a") is None
    first = storage.stage(tmp_path / "a", 10, fresh=True)
    first.write(memoryview(b"abc"), 4)
    first.close()
    with pytest.raises(FileExistsError):
        storage.stage(tmp_path / "a", 10, fresh=True)
    again = storage.staged(tmp_path / "a")
    assert again is not None
    found = bytearray(3)
    again.read_into(memoryview(found), 4)
    again.close()
    assert found == b"abc"
    shorter = storage.stage(tmp_path / "a", 7, fresh=False)
    shorter.close()
    assert (tmp_path / "a").read_bytes()[4:] == b"abc"


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system follows every link")
def test_a_link_is_not_taken_up(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError):
        storage.staged(tmp_path / "b")
    with pytest.raises(OSError):
        storage.stage(tmp_path / "b", 2, fresh=False)
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_file_is_replaced_at_the_end_or_not_at_all(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "a"
    with storage.replacing(file) as new:
        new.write(b"old")
        assert not file.exists()
        assert storage.list(tmp_path) == []
    with pytest.raises(RuntimeError), storage.replacing(file) as new:
        new.write(b"half")
        raise RuntimeError
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_what_is_no_regular_file_is_not_replaced(storage: Storage, tmp_path: Path) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "a"
    os.mkfifo(pipe)
    file.write_text("x")
    with pytest.raises(OSError, match="no regular file"), storage.replacing(pipe):
        raise AssertionError("was opened")
    for share in (False, True):
        with pytest.raises(OSError, match="no regular file"):
            storage.copy(file, pipe, share=share)
    assert pipe.is_fifo()


def test_a_file_grows(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "new/a"
    grown = storage.append(file)
    assert grown.read() == b""
    grown.append(b"one\n")
    grown.append(b"tw")
    assert file.read_bytes() == b"one\ntw"
    grown.cut(4)
    grown.append(b"three\n")
    assert grown.read() == b"one\nthree\n"
    grown.close()
    again = storage.append(file)
    again.append(b"four\n")
    again.close()
    assert file.read_bytes() == b"one\nthree\nfour\n"


def test_a_copy_stands_alone_and_a_shared_one_takes_no_room(
    storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    storage.copy(tmp_path / "a", tmp_path / "new/b")
    storage.copy(tmp_path / "a", tmp_path / "other/c", share=True)
    storage.copy(tmp_path / "a", tmp_path / "other/c", share=True)
    assert (tmp_path / "other/c").samefile(tmp_path / "a")
    assert not (tmp_path / "new/b").samefile(tmp_path / "a")
    assert (tmp_path / "new/b").read_bytes() == b"1"


def test_what_cannot_be_linked_is_copied(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "a").write_bytes(b"1")
    storage.copy(tmp_path / "a", tmp_path / "b", share=True)
    assert (tmp_path / "b").read_bytes() == b"1"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


def test_removal_spares_what_a_link_names(storage: Storage, tmp_path: Path) -> None:
    for name in ("a/file", "b/file"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / "a/link").symlink_to(tmp_path / "b")
    storage.remove(tmp_path / "a")
    storage.remove(tmp_path / "absent")
    storage.remove(tmp_path / "b/file")
    assert storage.list(tmp_path) == ["b"]
    assert storage.list(tmp_path / "b") == []


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_committed(there: bool, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "work/sub").mkdir(parents=True)
    (tmp_path / "work/sub/a").write_text("1")
    (tmp_path / "work/.a.17.unfinished").write_text("left by a killed run")
    if there:
        (tmp_path / "out").mkdir()
    storage.commit(tmp_path / "work", tmp_path / "out")
    assert storage.list(tmp_path) == ["out"]
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["sub", "a"]


def test_nothing_is_committed_over_something(storage: Storage, tmp_path: Path) -> None:
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    with pytest.raises(OSError):
        storage.commit(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "out/a").read_text() == "out"
    assert (tmp_path / "work/a").read_text() == "work"


def test_obstacles_to_a_commit(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "new", "new/deeper"):
        assert storage.obstacle(tmp_path / name) is None
    for name in ("file", "link"):
        assert "not a folder" in (storage.obstacle(tmp_path / name) or "")
    assert "mount point" in (storage.obstacle(Path("/").absolute()) or "")


def test_room_is_known_before_a_folder_exists(storage: Storage, tmp_path: Path) -> None:
    free = storage.free_bytes(tmp_path / "new/folder")
    assert free is None or free > 0
