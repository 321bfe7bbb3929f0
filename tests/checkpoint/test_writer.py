"""Guards that written files are what safetensors reads in any order, and never half believed."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.writer import (
    CheckpointWriter,
    OutputFile,
    check_replaced,
    write_atomically,
)
from eutectic.errors import CheckpointError, OutputError, RequestError, ResumeError
from helpers.processes import run_code

from .helpers import same_bytes

FILE = OutputFile("model.safetensors", (("a", torch.float32, (1000,)),), {"format": "pt"})


def layout_of(tensors: dict[str, Tensor]) -> list[OutputFile]:
    entries = tuple((k, v.dtype, tuple(v.shape)) for k, v in tensors.items())
    return [OutputFile("model.safetensors", entries, {"format": "pt"})]


def write_all(folder: Path, tensors: dict[str, Tensor], seed: int, pieces: int) -> bytes:
    """Write in a random order and in random pieces."""
    chooser = random.Random(seed)
    jobs: list[tuple[str, int, Tensor]] = []
    for name, value in tensors.items():
        size = max(1, -(-value.numel() // pieces))
        flat = value.reshape(-1)
        jobs += [(name, i, flat[i : i + size]) for i in range(0, value.numel(), size)]
    chooser.shuffle(jobs)
    with CheckpointWriter(folder, layout_of(tensors)) as writer:
        for job in jobs:
            writer.write(*job)
        writer.sync()
    return (folder / "model.safetensors").read_bytes()


def test_safetensors_reads_every_kind_of_tensor(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_all(tmp_path / "out", tensors, seed=0, pieces=1)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].shape == value.shape
        assert same_bytes(loaded[name], value), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    pieces=st.integers(1, 7),
)
def test_bytes_do_not_depend_on_the_order_of_writing(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], seed: int, pieces: int
) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    tensors = {f"t{i}": torch.randint(0, 2, s).to(kinds[i % 4]) for i, s in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("order")
    first = write_all(folder / "a", tensors, seed=0, pieces=1)
    assert write_all(folder / "b", tensors, seed, pieces) == first
    loaded = load_file(folder / "a" / "model.safetensors")
    assert all(same_bytes(loaded[k], v) for k, v in tensors.items())


def test_threads_write_at_once(tmp_path: Path) -> None:
    values = torch.randn(40_000)
    with CheckpointWriter(tmp_path, layout_of({"a": values})) as writer:

        def work(part: int) -> None:
            for start in range(part * 10_000, (part + 1) * 10_000, 100):
                writer.write("a", start, values[start : start + 100])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(writer.read_back("a"), values)
        assert torch.equal(writer.read_back("a", 5, 9), values[5:9])


def test_files_have_their_final_size_at_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [FILE]) as writer:
        size = (tmp_path / FILE.name).stat().st_size
        writer.write("a", 0, torch.ones(1000))
        assert (tmp_path / FILE.name).stat().st_size == size
    assert open_index(tmp_path).entries["a"].nbytes == 4000


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: whole(d, data[:13], at))
    values = torch.randn(1000)
    with CheckpointWriter(tmp_path, [FILE]) as writer:
        writer.write("a", 0, values)
    assert torch.equal(load_file(tmp_path / FILE.name)["a"], values)


def test_values_of_another_type_or_range_are_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [FILE]) as writer:
        with pytest.raises(ValueError, match="laid out as"):
            writer.write("a", 0, torch.ones(3).half())
        for start, count in [(-1, 2), (999, 2), (1000, 1)]:
            with pytest.raises(ValueError, match="lie outside"):
                writer.write("a", start, torch.ones(count))


def test_strided_values(tmp_path: Path) -> None:
    values = torch.randn(40, 25).T
    with CheckpointWriter(tmp_path, [FILE]) as writer:
        writer.write("a", 0, values)
        assert torch.equal(writer.read_back("a"), values.reshape(-1))


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / FILE.name).write_text("precious")
    with pytest.raises(OutputError):
        CheckpointWriter(tmp_path, [FILE])
    assert (tmp_path / FILE.name).read_text() == "precious"


def test_output_names_stay_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a plain name"):
        CheckpointWriter(tmp_path / "out", [OutputFile("../x.safetensors", FILE.entries)])
    assert not (tmp_path / "x.safetensors").exists()


# --- resuming --------------------------------------------------------------------------------


def two_files() -> list[OutputFile]:
    return [
        OutputFile("one.safetensors", (("a", torch.float32, (50,)),)),
        OutputFile("two.safetensors", (("b", torch.bfloat16, (50,)),)),
    ]


def test_resume_keeps_what_was_written(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, two_files()) as writer:
        assert writer.laid_out == ("one.safetensors", "two.safetensors")
        writer.write("a", 0, torch.ones(50))
    with CheckpointWriter(tmp_path, two_files(), resume=True) as writer:
        assert writer.laid_out == ()
        assert writer.read_back("a").sum() == 50
        writer.write("b", 0, torch.ones(50).bfloat16())
    assert load_file(tmp_path / "two.safetensors")["b"].sum() == 50


def test_a_worker_takes_up_the_files_from_a_description(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, two_files()) as writer:
        stored = writer.write("a", 0, torch.ones(50))
        description = pickle.dumps(writer.reopening)
        assert bytes(stored.numpy().data) == torch.ones(50).numpy().tobytes()
    with pickle.loads(description)() as again:
        assert again.laid_out == ()
        assert again.read_back("a").sum() == 50


@pytest.mark.parametrize("left", ["nothing", "empty file", "zeros", "half a header"])
def test_resume_after_a_kill_during_the_layout(tmp_path: Path, left: str) -> None:
    with CheckpointWriter(tmp_path, two_files()[:1]) as writer:
        writer.write("a", 0, torch.ones(50))
    if left == "half a header":
        whole = CheckpointWriter(tmp_path / "whole", two_files())
        whole.close()
        content = (tmp_path / "whole/two.safetensors").read_bytes()
        (tmp_path / "two.safetensors").write_bytes(content[:20].ljust(len(content), b"\0"))
    elif left != "nothing":
        (tmp_path / "two.safetensors").write_bytes(b"" if left == "empty file" else b"\0" * 500)
    with CheckpointWriter(tmp_path, two_files(), resume=True) as writer:
        assert writer.laid_out == ("two.safetensors",)
        assert writer.read_back("a").sum() == 50
        writer.write("b", 0, torch.ones(50).bfloat16())
    assert load_file(tmp_path / "two.safetensors")["b"].sum() == 50


def test_resume_refuses_another_request(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, two_files()).close()
    other = [OutputFile("one.safetensors", (("a", torch.float16, (100,)),)), two_files()[1]]
    with pytest.raises(ResumeError, match="another header"):
        CheckpointWriter(tmp_path, other, resume=True)


def test_resume_refuses_a_truncated_file(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, two_files()).close()
    os.truncate(tmp_path / "one.safetensors", 200)
    with pytest.raises(ResumeError, match="bytes instead of"):
        CheckpointWriter(tmp_path, two_files(), resume=True)


def test_resume_does_not_follow_links(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "elsewhere", two_files()).close()
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(OutputError):
        CheckpointWriter(folder, two_files(), resume=True)


# --- failing disks ---------------------------------------------------------------------------


def failing(code: int) -> Any:
    def fail(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def test_full_disk_is_noticed_before_any_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"disk is full[^$]*Needed: 4,\d+ bytes; free: [\d,]+"):
        CheckpointWriter(tmp_path, [FILE])
    with pytest.raises(CheckpointError):
        open_index(tmp_path)


def test_too_little_room_is_noticed_before_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=4000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match=r"Needed: 4,\d+ bytes; free: 4,000 bytes"):
        CheckpointWriter(tmp_path, [FILE])
    assert list(tmp_path.iterdir()) == []


def test_space_is_given_back_when_only_some_files_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.posix_fallocate

    def small_disk(descriptor: int, offset: int, size: int) -> None:
        if size > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(descriptor, offset, size)

    CheckpointWriter(tmp_path, two_files()[:1]).close()
    large = OutputFile("zzz.safetensors", (("c", torch.float32, (1000,)),))
    monkeypatch.setattr(os, "posix_fallocate", small_disk)
    with pytest.raises(OutputError, match="disk is full"):
        CheckpointWriter(tmp_path, [*two_files(), large], resume=True)
    # What a previous run had finished stays.
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    program = (
        f"folder = {str(tmp_path)!r}\n"
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from eutectic.checkpoint.writer import OutputFile\n"
        "from eutectic.checkpoint.writer import CheckpointWriter\n"
        "from eutectic.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "file = OutputFile('model.safetensors', (('a', torch.float32, (1000,)),))\n"
        "try:\n"
        "    CheckpointWriter(Path(folder), [file])\n"
        "except OutputError as error:\n"
        "    sys.exit(7 if 'disk is full' in str(error) else 8)\n"
    )
    done = run_code(program)
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    with CheckpointWriter(tmp_path, [FILE]) as writer:
        writer.write("a", 0, torch.ones(1000))
    assert load_file(tmp_path / FILE.name)["a"].sum() == 1000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_failing_write_and_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with CheckpointWriter(tmp_path, [FILE]) as writer:
        monkeypatch.setattr(os, "pwrite", failing(code))
        with pytest.raises(OutputError, match=os.strerror(code)):
            writer.write("a", 0, torch.ones(10))
        monkeypatch.setattr(os, "fsync", failing(code))
        with pytest.raises(OutputError, match=os.strerror(code)):
            writer.sync()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", [FILE])


# --- small files ---------------------------------------------------------------------------


def test_atomic_write_leaves_the_old_file_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OutputError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_json_is_written_over_its_own_kind_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    check_replaced(path, {"a"}, "the record")
    for content in ("", '{"a": 1, "b": 2}'):
        path.write_text(content)
        check_replaced(path, {"a"}, "the record")
    path.write_text('{"b": 2}')
    with pytest.raises(RequestError, match="the record would be written there, and it holds"):
        check_replaced(path, {"a"}, "the record")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="is a pipe or a device"):
        check_replaced(tmp_path / "pipe", {"a"}, "the record")
    with pytest.raises(RequestError, match="is a folder"):
        check_replaced(tmp_path, {"a"}, "the record")
