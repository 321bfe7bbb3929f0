"""Killed, repeated and concurrent runs.

Guards: the same command again finishes a killed run with byte-identical files; a run is never
continued under another request; only one process writes into an output; the bytes do not depend on
the number of threads.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.execution.journal import JOURNAL
from helpers.cli import invoke
from helpers.folders import (
    digests,
    looks_finished,
    make_base,
    make_expert,
    save,
    save_sharded,
)
from helpers.processes import Forked, start_cli

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="looks into /proc for what a process holds open"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base and three experts with heads: about a second of work for `iso_c`."""
    folder = tmp_path_factory.mktemp("inputs")
    base = make_base(layers=10, width=96)
    names = list(base)
    shards = {
        "model-00001-of-00002.safetensors": {n: base[n] for n in names[:16]},
        "model-00002-of-00002.safetensors": {n: base[n] for n in names[16:]},
    }
    save_sharded(folder / "base", shards)
    for i, name in enumerate("abc"):
        expert = make_expert(base, i)
        expert["classifier.weight"] = torch.ones(i + 2, 96)
        save(folder / name, expert)
    return folder


def words(inputs: Path, output: Path, *more: object, method: str = "iso_c") -> list[object]:
    experts = [f"{name}={inputs / name}" for name in "abc"]
    start = ["merge", "--base", inputs / "base", "-m", method, "-o", output]
    return [*start, "--set", "precision=exact", "--fallback", "allow", *more, *experts]


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def wait_for_journal(process: Forked, output: Path) -> None:
    """Return when the process has taken the journal, or has ended."""
    journal = str(partial(output) / JOURNAL)
    while process.poll() is None:
        try:
            opened = [str(p.readlink()) for p in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue  # a descriptor was closed, or the process ended, while looking
        if journal in opened:
            return
        time.sleep(0.005)


def until_end(process: Forked, patience: float) -> float:
    """Wait for a process to end, at most so many seconds, and return how long it took."""
    began = time.perf_counter()
    while process.poll() is None and time.perf_counter() < began + patience:
        time.sleep(0.005)
    return time.perf_counter() - began


def end(process: Forked) -> int:
    _, error = process.communicate(timeout=120)
    assert "Traceback" not in error, error
    return process.returncode


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["iso_c", "esm"])
@needs_proc
def test_a_killed_run_is_finished_by_the_same_command(
    method: str, inputs: Path, tmp_path: Path
) -> None:
    kills = 3
    calm = tmp_path / "calm/merged"
    line = words(inputs, calm, method=method)
    began = start_cli(*line)
    wait_for_journal(began, calm)
    duration = until_end(began, 120)
    assert end(began) == 0
    expected = digests(calm)
    assert any(name.startswith("experts/c/") for name in expected)
    chance = random.Random(0)
    output = tmp_path / "disturbed/merged"
    line = words(inputs, output, method=method)
    while kills > 0 or partial(output).exists():
        if not partial(output).exists():
            shutil.rmtree(output, ignore_errors=True)
        process = start_cli(*line)
        wait_for_journal(process, output)
        if kills > 0:
            patience = chance.uniform(0, 1.1 * duration)
            if (taken := until_end(process, patience)) < patience:
                duration = taken  # the machine has become quicker: no kill would ever come
            process.kill()
        code = end(process)
        assert code in (0, -signal.SIGKILL)
        kills -= code != 0
        assert not looks_finished(output) or digests(output) == expected
        assert looks_finished(output) or partial(output).exists()
    assert digests(output) == expected
    assert [p.name for p in output.parent.iterdir()] == ["merged"]


@pytest.fixture(scope="module")
def unfinished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.partial` folder of a run that was killed when some of its tensors were finished."""
    output = tmp_path_factory.mktemp("unfinished") / "merged"
    process = start_cli(*words(inputs, output))
    journal = partial(output) / JOURNAL
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 3:
            process.kill()
    assert end(process) == -signal.SIGKILL
    return partial(output)


@pytest.fixture
def interrupted(unfinished: Path, tmp_path: Path) -> Path:
    """The name of an output whose unfinished folder stands beside it."""
    shutil.copytree(unfinished, tmp_path / "merged.partial")
    return tmp_path / "merged"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ["--scale", "0.5"],
        ["--set", "seed=1"],
        ["-p", "support=full"],
        ["--set", "dtype=bfloat16"],
        ["--set", "heads=base"],
    ],
)
def test_a_changed_request_is_not_continued(
    change: list[str], inputs: Path, interrupted: Path
) -> None:
    before = digests(partial(interrupted))
    answer = invoke(*words(inputs, interrupted, *change))
    assert answer.code == 2
    assert "another request" in answer.err
    assert "--restart" in answer.err
    assert digests(partial(interrupted)) == before
    assert not interrupted.exists()


@pytest.mark.slow
def test_a_changed_expert_is_not_continued_with(
    inputs: Path, interrupted: Path, tmp_path: Path
) -> None:
    file = inputs / "b/model.safetensors"
    content, status = file.read_bytes(), file.stat()
    changed = bytearray(content)
    changed[-5] ^= 1
    file.write_bytes(changed)
    try:
        # Same size and same time of change: the content alone tells.
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        before = digests(partial(interrupted))
        answer = invoke(*words(inputs, interrupted))
        assert answer.code == 2
        assert "another request" in answer.err
        assert digests(partial(interrupted)) == before
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.slow
def test_an_unfinished_run_is_continued_or_discarded(
    inputs: Path, interrupted: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy/merged"
    shutil.copytree(partial(interrupted), partial(copy))
    report = eutectic.merge(**options(inputs), output=interrupted)
    assert report.resumed
    assert not eutectic.merge(**options(inputs), output=copy, restart=True).resumed
    assert digests(copy) == digests(interrupted)
    assert not partial(copy).exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["journal's end", "a tensor", "a file"])
def test_damage_to_an_unfinished_run_is_repaired_or_refused(
    damage: str, inputs: Path, interrupted: Path, tmp_path: Path
) -> None:
    work = partial(interrupted)
    if damage == "journal's end":
        with (work / JOURNAL).open("ab") as file:
            file.write(b'{"stage": "merge", "tens')
    elif damage == "a tensor":
        for file in (work / "model").glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            header = 8 + int.from_bytes(content[:8], "little")
            file.write_bytes(content[:header] + bytes(len(content) - header))
    else:
        (work / "model/model-00002-of-00002.safetensors").unlink()
    eutectic.merge(**options(inputs), output=interrupted)
    eutectic.merge(**options(inputs), output=tmp_path / "calm")
    assert digests(interrupted) == digests(tmp_path / "calm")


@pytest.mark.slow
@needs_proc
def test_a_second_process_is_refused_and_the_first_is_not_disturbed(
    inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    first = start_cli(*words(inputs, output))
    wait_for_journal(first, output)
    first.send_signal(signal.SIGSTOP)
    try:
        for more in ([], ["--restart"]):
            answer = invoke(*words(inputs, output, *more))
            assert answer.code == 2
            assert "another process" in answer.err
    finally:
        first.send_signal(signal.SIGCONT)
    assert end(first) == 0
    assert looks_finished(output)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "iso_cts", "ties", "dare_ties", "esm"])
def test_the_number_of_threads_changes_no_byte(method: str, inputs: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"scope": "model"} if method == "ties" else {}
    found = []
    for threads in (1, 2, 4):
        output = tmp_path / f"{threads}/merged"
        request: dict[str, Any] = {**options(inputs), "precision": "fast", "method": method, **more}
        eutectic.merge(**request, output=output, threads=threads)
        found.append(digests(output))
    assert found[0] == found[1] == found[2]


def options(inputs: Path) -> dict[str, Any]:
    """Return the request of `words` in Python."""
    return {
        "base": str(inputs / "base"),
        "experts": {name: str(inputs / name) for name in "abc"},
        "method": "iso_c",
        "precision": "exact",
        "fallback": "allow",
    }
