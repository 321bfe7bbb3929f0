"""GPUs of a cluster: who is given which, how much of it, and words for what is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eutectic
from cluster.conftest import MEMORY, STORE
from eutectic.cluster import gpus
from eutectic.cluster.connection import size_of_cluster
from eutectic.cluster.devices import Device, DeviceFullError
from eutectic.cluster.gpus import CONTEXT_BYTES, Gpu, device_of_workers, own_share, share_of
from eutectic.cluster.spread import Call, _again, _Attempt
from eutectic.cluster.workers import Answer
from eutectic.errors import EutecticError, RequestError
from eutectic.evaluation import spread_pairs
from eutectic.execution import executors, ray_executor, tasks
from eutectic.statistics import sharded_pass
from evaluation import world
from helpers import ray_calls
from helpers.folders import digests, make_base, make_expert, save
from helpers.pretended_device import DEVICE, pretended

KIND = "a pretended GPU"


def test_a_share_holds_a_task_with_its_process() -> None:
    device = Device("cuda", KIND, 9 * CONTEXT_BYTES)
    assert share_of(device, 9 * CONTEXT_BYTES) == 1.0
    assert share_of(device, 4 * CONTEXT_BYTES) == 0.5
    assert share_of(device, 1 + 4 * CONTEXT_BYTES) == 0.501
    assert share_of(device, 1) == 1 / 8  # more processes at a time are no faster
    assert share_of(device, 10**12) == 1.0


@pytest.mark.parametrize(
    ("visible", "given", "name"),
    [(None, 1, "cuda:1"), ("2,5", "5", "cuda:1"), ("GPU-ab, GPU-cd", "GPU-cd", "cuda:1")],
)
def test_the_given_gpu_is_named_as_torch_counts_those_that_it_sees(
    visible: str | None, given: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "import_ray", lambda: SimpleNamespace(get_gpu_ids=lambda: [given]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.given_gpu() == name


def test_a_process_keeps_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0, "GPU": 0.25})
    ray = SimpleNamespace(get_runtime_context=lambda: context)
    seen: list[Any] = []
    monkeypatch.setattr(gpus, "import_ray", lambda: ray)
    monkeypatch.setattr(gpus, "device_model", lambda _: KIND)
    properties = SimpleNamespace(total_memory=20 * CONTEXT_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: seen.append(given)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    with own_share("cuda:3", Device("cuda", KIND, 15 * CONTEXT_BYTES)):
        assert seen == [(pytest.approx((16 * 0.25 - 1) / 20), "cuda:3")]
    assert seen[-1] == "emptied"
    with pytest.raises(RequestError, match=rf"cuda:3 is {KIND}, and this run began on another"):
        with own_share("cuda:3", Device("cuda", "another", 15 * CONTEXT_BYTES)):
            raise AssertionError


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Gpu]]:
    """Machines with GPUs of a cluster that is none."""
    found = {"10.0.0.5": [Gpu(KIND, 10 * CONTEXT_BYTES), Gpu(KIND, 4 * CONTEXT_BYTES)]}
    monkeypatch.setattr(gpus, "machines_with_gpus", lambda: list(found))
    monkeypatch.setattr(gpus, "_asked", lambda _: found)
    return found


def test_the_smallest_gpu_decides_what_a_task_may_take(machines: Any) -> None:
    for name in ("cuda", "auto", " CUDA "):
        assert device_of_workers(name) == Device("cuda", KIND, 3 * CONTEXT_BYTES)
    assert device_of_workers("cpu") == Device()
    machines.clear()
    assert device_of_workers("auto") == Device()
    machines["10.0.0.6"] = []  # of a torch without CUDA
    assert device_of_workers("auto") == Device()


@pytest.mark.parametrize(
    ("device", "found", "message"),
    [
        ("cuda:1", None, r"Ray chooses which GPU .*\n.*CUDA_VISIBLE_DEVICES"),
        ("cuda", {}, r"no machine of the cluster has a GPU .*\n.*--num-gpus"),
        ("mps", None, "Ray knows of no GPUs of Apple's"),
        ("gpu", None, "device is cpu, cuda, cuda:N or auto, got 'gpu'"),
        ("cuda", {"10.0.0.6": []}, r"worker 10.0.0.6: .*torch finds none"),
        (
            "cuda",
            {"10.0.0.6": [Gpu("another", 1)]},
            rf"several kinds of GPUs \({KIND} on 10.0.0.5, another on 10.0.0.6\)",
        ),
    ],
)
def test_a_device_that_workers_do_not_have(
    device: str, found: Any, message: str, machines: Any
) -> None:
    if found == {}:
        machines.clear()
    machines.update(found or {})
    with pytest.raises(RequestError, match=message):
        device_of_workers(device)


def test_a_call_whose_gpu_was_full_asks_for_twice_as_much() -> None:
    full = Answer(None, DeviceFullError, "device cuda:0 ran out of memory", node="10.0.0.5")
    attempt = _Attempt(Call("w", len, None, 10, gpus=0.3))
    shares = []
    with pytest.raises(EutecticError, match=r"4 attempts: it ran out of memory of its GPU") as told:
        while True:
            attempt = _again(attempt, full, "memory of its GPU")
            shares.append(attempt.call.gpus)
            assert attempt.call.memory == 10
    assert shares == [0.6, 1.0, 1.0]
    assert "100.0% of a GPU" in str(told.value)


@pytest.fixture(scope="module")
def gpu_nodes(nodes: Any) -> Iterator[str]:
    """Add two nodes with a GPU each, as Ray is told; the driver's has none."""
    address = str(nodes.address)
    executors.limits_of(executor="ray", ray_address=address)  # joins it
    own: dict[str, Any] = {"num_cpus": 2, "memory": MEMORY, "object_store_memory": STORE}
    added = [nodes.add_node(num_gpus=1, wait=False, **own) for _ in range(2)]
    nodes.wait_for_nodes()
    yield address
    for node in added:
        nodes.remove_node(node)


@pytest.mark.ray
@pytest.mark.slow
def test_matrices_are_merged_on_the_gpus_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_nodes: str
) -> None:
    assert sys.platform == "linux"
    full = "layers.0.proj.weight"  # its GPU is full when it is tried first
    assert size_of_cluster().gpus == 2
    base = {name: t for name, t in make_base(width=16, layers=2).items()}
    request: dict[str, Any] = {
        "base": save(tmp_path / "base", base),
        "experts": {n: save(tmp_path / n, make_expert(base, s)) for s, n in enumerate("ab", 1)},
        "method": "iso_c",
    }
    here = Device(str(DEVICE), KIND, CONTEXT_BYTES)
    run = tasks._run

    def run_there(*given: Any) -> Any:
        with pretended():
            return run(*given)

    with monkeypatch.context() as patch:
        patch.setattr(executors, "device_here", lambda _: here)
        patch.setattr(tasks, "_run", run_there)
        eutectic.merge(request, output=tmp_path / "threads", device="cuda")

    monkeypatch.setattr(gpus, "gpus_here", ray_calls.pretended_gpus)
    log = tmp_path / "log"
    carried = partial(ray_calls.on_pretended_gpu, str(log), full)
    monkeypatch.setattr(ray_executor, "carry_out_batch", carried)
    monkeypatch.setattr(ray_executor, "_BATCH_TASKS", 1)
    where: dict[str, Any] = {"executor": "ray", "ray_address": gpu_nodes, "device": "cuda"}
    planned = eutectic.plan(request, **where)
    assert (planned.device, planned.device_memory_bytes) == ("cuda", CONTEXT_BYTES)
    eutectic.merge(request, output=tmp_path / "ray", **where)
    assert digests(tmp_path / "ray") == digests(tmp_path / "threads")
    assert json.loads((tmp_path / "ray/eutectic.json").read_text())["device"] == KIND

    noted = [json.loads(line) for line in log.read_text().splitlines()]
    matrices = [r["name"] for r in planned.tensors if r["treatment"] == "matrix"]
    tried = sorted(name for note in noted for name in note["tasks"])
    assert tried == sorted([*matrices, full])
    assert {note["gpu"] for note in noted} == {"cuda:0"}
    shares = [(full in note["tasks"], note["share"]) for note in noted]
    assert {share for again, share in shares if not again} == {0.501}
    assert [share for again, share in shares if again] == [0.501, 1.0]
    for one in noted:  # on each GPU, what runs at a time holds one GPU at most
        beside = [
            other["share"]
            for other in noted
            if other["node"] == one["node"] and other["start"] <= one["start"] < other["stop"]
        ]
        assert sum(beside) <= 1


@pytest.mark.ray
@pytest.mark.slow
def test_models_run_on_the_gpus_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_nodes: str
) -> None:
    labels = ("no", "maybe", "yes")
    for name in ("one", "two"):
        rows = [{"text": t, "label": labels[i % 3]} for i, t in enumerate(world.sentences(8))]
        world.jsonl(tmp_path / f"{name}.jsonl", rows)
    kinds = {
        name: {"kind": "text-classification", "data": str(tmp_path / f"{name}.jsonl")}
        for name in ("one", "two")
    }
    world.save(world.make("bert"), tmp_path / "m")
    asked: dict[str, Any] = {
        "tasks": world.tasks(tmp_path / "tasks.yaml", **kinds),
        "models": {"m": tmp_path / "m"},
    }
    alone = eutectic.evaluate(**asked)
    monkeypatch.setattr(gpus, "gpus_here", ray_calls.pretended_gpus)
    log = tmp_path / "log"
    there = partial(ray_calls.measured_on_pretended_gpu, str(log))
    monkeypatch.setattr(spread_pairs, "measured", there)
    where: dict[str, Any] = {"executor": "ray", "ray_address": gpu_nodes, "device": "cuda"}
    found = eutectic.evaluate(**asked, **where)
    for one, other in zip(found.results, alone.results, strict=True):
        assert one.value == pytest.approx(other.value)
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(note["pair"] for note in noted) == [["m", "one"], ["m", "two"]]
    for note in noted:
        assert note["ran"] == [DEVICE.type]
        assert note["waits"] == ["cpu"]  # the GPU is another's by now
        assert 0.9 < note["share"] < 1  # of this GPU: a batch, the process, the model


@pytest.mark.ray
@pytest.mark.slow
def test_statistics_are_added_up_on_the_gpus_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_nodes: str
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [torch.randn(4, 6) for _ in range(5)]
    alone = eutectic.collect(model, batches)
    monkeypatch.setattr(gpus, "gpus_here", ray_calls.pretended_gpus)
    log = tmp_path / "log"
    adder = partial(ray_calls.adder_on_pretended_gpu, str(log))
    monkeypatch.setattr(sharded_pass, "_Adder", adder)
    where: dict[str, Any] = {"executor": "ray", "ray_address": gpu_nodes, "device": "cuda"}
    found = eutectic.collect(model, batches, **where)
    for name in alone:
        gram = found[name].dense_gram()
        assert type(gram) is torch.Tensor  # of this process, which has no GPU
        torch.testing.assert_close(gram, alone[name].dense_gram(), atol=1e-4, rtol=1e-5)
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    assert noted == [[1.0, DEVICE.type]] * 2
    with pytest.raises(RequestError, match="3 shards need a GPU each, and the cluster has 2"):
        eutectic.collect(model, batches, **where, shards=3)
    with pytest.raises(RequestError, match="device are for the workers of a cluster"):
        eutectic.collect(model, batches, device="cuda")
