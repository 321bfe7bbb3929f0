"""A disk that is full, at every moment at which it can be.

Guards: exit code 1 and words instead of a traceback; nothing that looks finished; and that the
same command goes on when there is room.
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.cli import invoke
from helpers.folders import digests, looks_finished, make_base, make_expert, save
from helpers.processes import run_cli

PAGE = 4096


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of about 100 kB and two experts with heads."""
    folder = tmp_path_factory.mktemp("inputs")
    base = make_base(layers=6, width=40)
    save(folder / "base", base)
    (folder / "base/tokenizer.json").write_text("x" * 9000)
    for i, name in enumerate("ab"):
        save(folder / name, {**make_expert(base, i), "classifier.weight": torch.ones(i + 2, 40)})
    return folder


def words(inputs: Path, output: Path, method: str = "average") -> list[object]:
    experts = [f"{name}={inputs / name}" for name in "ab"]
    return [
        "merge",
        "--base",
        inputs / "base",
        "-m",
        method,
        "--fallback",
        "allow",
        "-o",
        output,
        *experts,
    ]


def resize(folder: Path, size: int) -> None:
    options = ["-o", f"remount,size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={PAGE}", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("may not mount; the limit on file sizes below stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("method", ["average", "esm"])
def test_a_disk_that_fills_at_any_moment(
    method: str, inputs: Path, disk: Path, tmp_path: Path
) -> None:
    # The bytes name no folder, so a run elsewhere says what this one must end with.
    assert invoke(*words(inputs, tmp_path / "calm/merged", method)).code == 0
    expected = digests(tmp_path / "calm/merged")
    output = disk / "merged"
    stages: set[str] = set()
    # From a disk that holds nothing up to one that suffices; each run continues the one before.
    for pages in range(1, 400, 2):
        resize(disk, pages * PAGE)
        answer = invoke(*words(inputs, output, method))
        if answer.code == 0:
            break
        assert answer.code == 1, answer
        assert "disk is full" in answer.err or "No space left" in answer.err, answer
        assert str(disk) in answer.err
        assert not looks_finished(output)
        stages.add(answer.err)
    assert len(stages) > 2  # it failed in several places
    assert digests(output) == expected
    assert [p.name for p in disk.iterdir()] == ["merged"]


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_limit_on_file_sizes(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    result = run_cli(*words(inputs, output), before=_limit)
    assert result.returncode == 1
    assert "files of 50,000 bytes at most (ulimit -f)" in result.stderr
    assert "Traceback" not in result.stderr
    assert not looks_finished(output)
    assert run_cli(*words(inputs, output)).returncode == 0
    assert looks_finished(output)
