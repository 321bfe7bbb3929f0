"""What a collection may write over, who may write, and what a killed one leaves behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eutectic.errors import OutputError, RequestError, ResumeError
from eutectic.statistics import add_statistics, collect, load_statistics
from eutectic.statistics.statistics_file import lock_output
from eutectic.storage.local_disk import LocalDisk


class Killed(BaseException):
    """The end of a process."""


def data(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("content", [b"text", b"\x08\0\0\0\0\0\0\0{}      ", b"{}"])
def test_only_statistics_are_written_over(content: bytes, tmp_path: Path) -> None:
    part, output = tmp_path / "part.safetensors", tmp_path / "out.safetensors"
    collect(model(), data(), part)
    output.write_bytes(content)
    for write in (
        lambda: collect(model(), data(), output),
        lambda: add_statistics([part], output),
        lambda: load_statistics(part).save(output),
    ):
        with pytest.raises(RequestError, match="holds something else"):
            write()
    assert output.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "part.safetensors"]
    output.write_bytes(part.read_bytes())
    collect(model(), data(seed=9), output)
    assert output.read_bytes() != part.read_bytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="holds something else"):
        collect(model(), data(), tmp_path / "pipe")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    part, output = tmp_path / "part.safetensors", tmp_path / "out.safetensors"
    collect(model(), data(), part)
    lock = lock_output(output)
    for write in (lambda: collect(model(), data(), output), lambda: add_statistics([part], output)):
        with pytest.raises(RequestError, match="another process is collecting into"):
            write()
    lock.release()

    def meanwhile(_: int, __: int | None) -> None:
        with pytest.raises(RequestError, match="another process is collecting into"):
            add_statistics([part], output)

    collect(model(), data(), output, progress=meanwhile)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "part.safetensors"]


@pytest.mark.parametrize("adding", [False, True])
def test_what_a_killed_run_was_writing_is_removed_by_the_next(
    adding: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, output = tmp_path / "part.safetensors", tmp_path / "out.safetensors"
    collect(model(), data(), part)

    def run() -> Any:
        return add_statistics([part], output) if adding else collect(model(), data(), output)

    # As after a kill: the number may be of a process that runs, in a container it often is.
    (tmp_path / f".out.safetensors.{os.getppid()}.unfinished").write_bytes(b"half")
    (tmp_path / ".out.safetensors.99999999.unfinished").write_bytes(b"half")
    (tmp_path / ".out.safetensors.mine.unfinished").write_bytes(b"mine")
    (tmp_path / "out.safetensors.lock").touch()
    run()
    expected = [".out.safetensors.mine.unfinished", "out.safetensors", "part.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == expected


@pytest.mark.parametrize("name", ["notes.txt", "pass-notes.txt", "pass-0001.safetensors.txt"])
def test_a_strangers_file_is_not_deleted(name: str, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    work = tmp_path / "out.safetensors.partial"
    work.mkdir()
    (work / name).write_text("mine")
    with pytest.raises(ResumeError, match=name):
        collect(model(), data(), output)
    (work / name).unlink()

    def arrives(_: int, __: int | None) -> None:
        (work / name).write_text("mine")

    collect(model(), data(), output, progress=arrives)
    assert (work / name).read_text() == "mine" and output.exists()


def test_missing_folders_above_are_made(tmp_path: Path) -> None:
    part = collect(model(), data(), tmp_path / "a/b/out.safetensors")
    add_statistics([part], tmp_path / "c/d/out.safetensors")
    assert len(load_statistics(tmp_path / "c/d/out.safetensors")) == len(part)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        collect(model(), data(), tmp_path / "file/out.safetensors")


def test_a_full_disk_at_any_call_leaves_a_run_that_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OutputError, match="full"):
            collect(model(), data(), output)
    assert not list(tmp_path.iterdir())
    collect(model(), data(), output)
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_file_of_a_process_that_runs_is_not_swept(tmp_path: Path) -> None:
    """Without a lock, only what the dead have left is."""
    running = tmp_path / f".x.json.{os.getppid()}.unfinished"
    dead = tmp_path / ".x.json.99999999.unfinished"
    running.touch()
    dead.touch()
    with LocalDisk().replacing(tmp_path / "x.json") as file:
        file.write(b"{}")
    assert running.exists() and not dead.exists()
