"""Locks between processes.

Guards: one writer at a time; a killed one blocks nobody; the lock's file goes with the lock.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from eutectic.storage import storage_of

HOLD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from eutectic.storage import storage_of

    lock = storage_of(Path()).lock(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
    sys.stdin.readline()
    """
)


def test_a_lock_file_that_cannot_be_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(self: Path, missing_ok: bool = False) -> None:
        if not refused:
            refused.append(self)
            raise OSError(5, "Input/output error", str(self))
        remove(self, missing_ok)

    remove, refused = Path.unlink, list[Path]()
    lock = storage_of(tmp_path).lock(tmp_path / "a")
    monkeypatch.setattr(Path, "unlink", unlink)
    lock.release()
    assert refused and not list(tmp_path.iterdir())


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `a` and releases it when it gets a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_kept_out_until_the_release(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    storage = storage_of(tmp_path)
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            storage.lock(tmp_path / "a")
    storage.lock(tmp_path / "b").release()
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "released\n"
    assert list(tmp_path.iterdir()) == []
    storage.lock(tmp_path / "a").release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_blocks_nobody(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    storage_of(tmp_path).lock(tmp_path / "a").release()
    assert list(tmp_path.iterdir()) == []


def test_one_writer_inside_a_process_too(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    held = storage.lock(tmp_path / "a")
    with pytest.raises(BlockingIOError):
        storage.lock(tmp_path / "a")
    held.release()
    held.release()  # a second release takes nothing from whoever holds it now
    other = storage.lock(tmp_path / "a")
    held.release()
    with pytest.raises(BlockingIOError):
        storage.lock(tmp_path / "a")
    other.release()


COUNT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from eutectic.storage import storage_of

    path = Path(sys.argv[1])
    done = 0
    while done < 200:
        try:
            lock = storage_of(path).lock(path)
        except BlockingIOError:
            continue
        path.write_text(str(int(path.read_text()) + 1))
        lock.release()
        done += 1
    """
)


@pytest.mark.timeout(120)
def test_no_two_hold_it_while_its_file_comes_and_goes(tmp_path: Path) -> None:
    counter = tmp_path / "a"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(counter)]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "600"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_lock_that_leaves_nothing_does_not_take_the_next_ones_file(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    first = storage.lock(tmp_path / "a")
    first.leave_nothing()
    assert list(tmp_path.iterdir()) == []
    second = storage.lock(tmp_path / "a")
    first.release()
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    second.release()
    assert list(tmp_path.iterdir()) == []
