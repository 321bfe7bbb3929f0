"""Merges on an accelerator: what goes there, what it may take, and words for one that is not there.

The device is pretended (`helpers/pretended_device.py`): a real one is for `benchmarks/gpu.py`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eutectic
from eutectic.cluster import devices
from eutectic.cluster.devices import Device
from eutectic.errors import RequestError, ResumeError
from eutectic.execution import executors, output_folder, tasks
from eutectic.execution.executors import Room, run_jobs
from eutectic.statistics.recorder import _sum_device
from helpers.cli import invoke
from helpers.pretended_device import DEVICE, pretended

NAME = str(DEVICE)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (24, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 24),
        "model.layers.0.input_layernorm.weight": (16,),
    }
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        moved = {
            n: t + 0.1 * (name != "base") * torch.randn(t.shape, generator=generator)
            for n, t in base.items()
        }
        save_file(moved, tmp_path / name / "model.safetensors")
    return tmp_path


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Let "cuda" be the pretended device, with as many bytes as the test says."""
    size = {"bytes": 1 << 30}

    def there(text: str) -> Device:
        return Device(NAME, f"pretended {NAME}", size["bytes"]) if text == "cuda" else Device()

    monkeypatch.setattr(executors, "device_here", there)
    run = tasks._run

    def run_there(*given: object) -> object:  # a mode is of one thread
        with pretended():
            return run(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks, "_run", run_there)
    yield size


def merge(world: Path, output: str, method: str = "iso_c", **options: object) -> Path:
    experts = {name: str(world / name) for name in "ab"}
    base = str(world / "base")
    eutectic.merge(base=base, experts=experts, method=method, output=world / output, **options)
    return world / output


def seen_places(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    places: dict[str, str] = {}
    carried = executors.carry_out

    def noting(task, *rest):
        places[task.name] = task.device
        return carried(task, *rest)

    monkeypatch.setattr(executors, "carry_out", noting)
    return places


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_matrices_are_merged_there_and_the_rest_here(method, world, accelerator, monkeypatch):
    places = seen_places(monkeypatch)
    here = load_file(merge(world, "here", method) / "model.safetensors")
    assert set(places.values()) == {"cpu"}
    made = merge(world, "there", method, device="cuda")
    assert places == {
        "model.layers.0.mlp.up_proj.weight": NAME,
        "model.layers.0.mlp.down_proj.weight": NAME,
        "model.layers.0.input_layernorm.weight": "cpu",
    }
    found = load_file(made / "model.safetensors")
    for name, tensor in here.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert json.loads((made / "eutectic.json").read_text())["device"] == f"pretended {NAME}"
    assert "device" not in json.loads((world / "here/eutectic.json").read_text())


def test_element_wise_methods_stay_here(world, accelerator, monkeypatch):
    places = seen_places(monkeypatch)
    merge(world, "there", "ties", device="cuda")
    assert set(places.values()) == {"cpu"}


def test_what_is_too_large_for_the_device_stays_here(world, accelerator, monkeypatch):
    accelerator["bytes"] = 1000
    places = seen_places(monkeypatch)
    merge(world, "there", device="cuda")
    assert set(places.values()) == {"cpu"}


def test_a_killed_merge_is_not_finished_on_another_device(world, accelerator, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_commit", killed)
        with pytest.raises(Killed):
            merge(world, "out")
    with pytest.raises(ResumeError, match="another request"):
        merge(world, "out", device="cuda")
    merge(world, "out")


def test_the_plan_says_where(world, accelerator):
    plan = eutectic.plan(
        base=str(world / "base"),
        experts={"a": str(world / "a")},
        method="iso_c",
        device="cuda",
    )
    assert (plan.device, plan.device_memory_bytes) == (NAME, 1 << 30)
    line = ["plan", "--base", world / "base", "-m", "iso_c", f"a={world / 'a'}"]
    assert f"matrices on {NAME}" in " ".join(invoke(*line, "--device", "cuda").out.split())
    assert "matrices on" not in invoke(*line).out


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is cpu, cuda, cuda:N or auto, got 'gpu'"),
        ("cuda:x", "cuda:N or auto, got 'cuda:x'"),
        ("mps", "no float64"),
        ("meta", "got 'meta'"),
        ("cuda:7", "cuda:7"),
    ],
)
def test_a_device_that_is_not_there(device, message, world):
    with pytest.raises(RequestError, match=message):
        merge(world, "out", device=device)
    assert not (world / "out").exists() and not (world / "out.partial").exists()


@pytest.mark.parametrize(("cuda", "mps", "found"), [(1, 1, "cuda:0"), (0, 1, "mps"), (0, 0, "cpu")])
def test_models_run_on_apples_gpus_too(cuda, mps, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert devices.device_of_models("auto") == found
    if mps:
        assert devices.device_of_models("mps") == "mps"
    else:
        with pytest.raises(RequestError, match="finds no GPU of Apple's here"):
            devices.device_of_models("mps")
    # Their sums are in float64, which that device lacks.
    assert _sum_device(SimpleNamespace(device=torch.device("mps"))) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_auto_is_the_cpu_where_there_is_nothing_else(world, monkeypatch):
    places = seen_places(monkeypatch)
    merge(world, "out", device="auto")
    assert set(places.values()) == {"cpu"}
    with pytest.raises(RequestError, match="no CUDA"):
        devices.device_named("cuda")


def test_memory_refused_by_the_device_is_an_error_in_words(monkeypatch):
    class Context:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    for name in ("Stream", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, Context)
    with pytest.raises(RequestError, match="cuda:0 ran out of memory"):
        with devices.computing_on("cuda:0"):
            raise torch.cuda.OutOfMemoryError("out")


@dataclass(frozen=True)
class Job:
    name: str
    peak_bytes: int = 1
    seconds: float = 1.0


def test_jobs_share_the_room_of_the_device():
    lock, now, most = threading.Lock(), [0], [0]

    def work(job: Job, _: object) -> str:
        with lock:
            now[0] += 40 if job.name.startswith("there") else 0
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 40 if job.name.startswith("there") else 0
        return job.name

    jobs = [Job(f"{place} {i}") for place in ("there", "here") for i in range(6)]
    held = {job.name: 40 for job in jobs if job.name.startswith("there")}
    done = run_jobs(jobs, work, threads=6, memory=1000, beside=Room(held, 100))
    assert sorted(done) == sorted(job.name for job in jobs)
    assert most[0] == 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_a_real_device_merges_like_the_cpu_and_the_same_again(method, world):
    here = load_file(merge(world, "here", method) / "model.safetensors")
    first = merge(world, "first", method, device="cuda") / "model.safetensors"
    again = merge(world, "again", method, device="cuda") / "model.safetensors"
    assert first.read_bytes() == again.read_bytes()
    for name, tensor in load_file(first).items():
        torch.testing.assert_close(tensor, here[name], rtol=1e-4, atol=1e-5)
