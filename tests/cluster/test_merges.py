"""Merges on a real cluster of three nodes: the bytes of threads, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from cluster.conftest import MEMORY, STORE
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile
from eutectic.execution import ray_executor
from eutectic.execution.ray_executor import batches
from eutectic.execution.tasks import Task
from helpers import ray_calls
from helpers.folders import digests, make_base, make_expert, save, save_sharded

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CASES: dict[str, dict[str, Any]] = {
    "stages": {"method": "esm", "fallback": "allow"},
    "state": {"method": "ties", "parameters": {"scope": "model"}},
    "late": {"method": "iso_c", "scale": "norm"},
    "adapter": {"method": "iso_c", "adapter": {"rank": 4, "others": "drop"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    base = make_base(width=32, layers=4)
    shards = {"one.safetensors": dict(list(base.items())[:8])}
    shards["two.safetensors"] = dict(list(base.items())[8:])
    experts = {n: save(folder / n, make_expert(base, s)) for s, n in enumerate("abc", start=1)}
    return {"base": save_sharded(folder / "base", shards), "experts": experts}


def bytes_of(folder: Path) -> dict[str, str]:
    return digests(folder)


@pytest.mark.parametrize("case", CASES)
def test_workers_write_the_bytes_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, world: Any, case: str
) -> None:
    monkeypatch.chdir(world["base"].parent)
    near = {
        "base": "base",
        "experts": {name: path.name for name, path in world["experts"].items()},
    }
    request = {**near, **CASES[case]}
    eutectic.merge(request, output=tmp_path / "threads")
    told: list[tuple[float, float]] = []
    eutectic.merge(
        request,
        output=tmp_path / "ray",
        executor="ray",
        ray_address=address,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "threads")
    assert told == sorted(told)
    assert told[-1][0] == pytest.approx(told[-1][1], rel=0.01)  # an adapter drops some


@pytest.mark.parametrize("case", CASES)
def test_what_only_the_driver_can_write_is_sent_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, world: Any, case: str
) -> None:
    request = {**world, **CASES[case]}
    eutectic.merge(request, output=tmp_path / "threads")
    # As where the output is a URL, whose files lie on the driver's machine until they are sent.
    monkeypatch.setattr(CheckpointWriter, "reopening", None)
    seen: list[str] = []

    def interrupt(done: float, total: float, tensor: str) -> None:
        seen.append(tensor)
        if len(seen) == 7:
            raise KeyboardInterrupt

    where: dict[str, Any] = {"executor": "ray", "ray_address": address}
    with pytest.raises(KeyboardInterrupt):
        eutectic.merge(request, output=tmp_path / "ray", progress=interrupt, **where)
    assert eutectic.merge(request, output=tmp_path / "ray", **where).resumed
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "threads")


def test_a_node_that_is_killed_in_the_middle_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: Any, address: str, world: Any
) -> None:
    import ray

    nodes.add_node(num_cpus=1, memory=MEMORY, object_store_memory=STORE)
    nodes.wait_for_nodes()
    where: dict[str, Any] = {"executor": "ray", "ray_address": address}
    request = {**world, "method": "iso_c"}
    eutectic.merge(request, output=tmp_path / "threads")
    marker = tmp_path / "lost"
    spared = ray.get_runtime_context().get_node_id()
    losing = partial(ray_calls.lose_machine_once, str(marker), spared)
    monkeypatch.setattr(ray_executor, "carry_out_batch", losing)
    monkeypatch.setattr(ray_executor, "_BATCH_TASKS", 1)
    lost: list[str] = []
    spread: Callable[..., Any] = ray_executor.spread
    monkeypatch.setattr(
        ray_executor, "spread", lambda c, b: spread(c, b, lambda _, why: lost.append(why))
    )
    eutectic.merge(request, output=tmp_path / "ray", threads=4, **where)
    gone = marker.read_text()
    for _ in range(300):  # Ray takes its time to be sure
        if gone not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the node lives on")
    assert len(lost) == 1
    assert lost[0] in ("its machine was lost", "its process died")
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "threads")
    for node in nodes.list_all_nodes():
        if node.node_id == gone:
            nodes.remove_node(node)


def test_an_interrupted_merge_goes_on_with_the_other_executor(
    tmp_path: Path, address: str, world: Any
) -> None:
    request = {**world, "method": "esm", "fallback": "allow"}
    eutectic.merge(request, output=tmp_path / "undisturbed")
    for first, then in (("ray", "threads"), ("threads", "ray")):
        where = {
            "ray": {"executor": "ray", "ray_address": address},
            "threads": {"executor": "threads"},
        }
        seen: list[str] = []

        def interrupt(done: float, total: float, tensor: str, seen: list[str] = seen) -> None:
            seen.append(tensor)
            if len(seen) == 5:
                raise KeyboardInterrupt

        output = tmp_path / first
        with pytest.raises(KeyboardInterrupt):
            eutectic.merge(request, output=output, progress=interrupt, threads=1, **where[first])
        assert not output.exists()
        report = eutectic.merge(request, output=output, **where[then])
        assert report.resumed
        assert bytes_of(output) == bytes_of(tmp_path / "undisturbed")


DRIVER = """
import os, signal, sys, json
import eutectic

def progress(*_, seen=[]):
    seen.append(1)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    eutectic.merge(request, output=sys.argv[2], progress=progress, executor="ray",
                   ray_address=sys.argv[3], threads=2)
"""


def test_a_killed_driver_is_taken_up_by_threads(tmp_path: Path, address: str, world: Any) -> None:
    request = {**world, "method": "iso_c"}
    plain = json.loads(json.dumps(request, default=str))
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    words = [sys.executable, str(script), json.dumps(plain), str(tmp_path / "out"), address]
    done = subprocess.run(words, capture_output=True, timeout=120, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert 4 <= len(lines) < 20
    report = eutectic.merge(plain, output=tmp_path / "out")
    assert report.resumed
    eutectic.merge(plain, output=tmp_path / "undisturbed")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_what_another_machine_wrote_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, world: Any
) -> None:
    request = {**world, "method": "average"}
    where: dict[str, Any] = {"executor": "ray", "ray_address": address}
    monkeypatch.setattr(ray_executor, "this_machine", lambda: "the driver's")
    eutectic.merge(request, output=tmp_path / "ray", **where)
    eutectic.merge(request, output=tmp_path / "threads")
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "threads")
    monkeypatch.setattr(ray_executor, "stored_hash", lambda *_: "another")
    with pytest.raises(eutectic.EutecticError, match="is not what this machine reads"):
        eutectic.merge(request, output=tmp_path / "unseen", **where)


def test_a_worker_does_not_lay_out_a_file_that_it_does_not_see(tmp_path: Path) -> None:
    layout = OutputFile("model.safetensors", (("w", torch.float32, (2,)),))
    with CheckpointWriter(tmp_path / "here", [layout]) as writer:
        reopening = writer.reopening
        reopening().close()
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    with pytest.raises(eutectic.EutecticError, match="must see the output's folder under the same"):
        reopening()
    assert not (tmp_path / "here").exists()


def test_an_input_that_a_worker_does_not_see_is_named_with_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, world: Any
) -> None:
    from eutectic.planning.inputs import InputPaths

    absolute = InputPaths.absolute

    def elsewhere(paths: InputPaths) -> InputPaths:
        found = absolute(paths)
        return type(found)(Path("/of/another/machine"), found.experts, {})

    monkeypatch.setattr(InputPaths, "absolute", elsewhere)
    with pytest.raises(eutectic.EutecticError, match=r"/of/another.* \(on worker [0-9.]+\)"):
        eutectic.merge(
            {**world, "method": "average"},
            output=tmp_path / "out",
            executor="ray",
            ray_address=address,
        )


def test_small_tasks_go_together_and_large_ones_alone() -> None:
    from types import SimpleNamespace

    def task(name: str, seconds: float) -> Task:
        return Task(SimpleNamespace(name=name), "merge", 1, seconds)  # pyright: ignore

    tasks = [task(f"small.{i:03}", 1e-6) for i in range(200)] + [task("large", 3.0)]
    found = batches(tasks, 2)
    assert [t.name for t in found[0]] == ["large"]
    assert [len(batch) for batch in found[1:]] == [64, 64, 64, 8]
    assert sorted(t.name for batch in found for t in batch) == sorted(t.name for t in tasks)
    even = batches([task(str(i), 1.0) for i in range(9)], 3)
    assert [len(batch) for batch in even] == [1] * 9
    assert batches([], 2) == []
