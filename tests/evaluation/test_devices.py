"""Models on an accelerator: the figures of the CPU, float64 where there is none, and words.

The device is pretended (`helpers/pretended_device.py`): a real one is for `benchmarks/gpu.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.cluster import devices
from eutectic.cluster.devices import Device
from eutectic.errors import RequestError
from eutectic.evaluation import pairs, run
from evaluation import world
from helpers.cli import invoke
from helpers.pretended_device import DEVICE, pretended

LABELS = ("no", "maybe", "yes")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note on which kind of device each pair's model ran."""
    seen: list[str] = []
    outputs = pairs.outputs

    def noting(model: Any, *given: Any, **how: Any) -> Any:
        seen.append(next(model.parameters()).device.type)
        return outputs(model, *given, **how)

    monkeypatch.setattr(pairs, "outputs", noting)
    return seen


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let "cuda" and "mps" be the pretended device; as mps it has no float64."""

    def there(text: str) -> Device:
        return Device() if text == "cpu" else Device(str(DEVICE), f"pretended {text}")

    monkeypatch.setattr(run, "models_here", there)
    yield


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """A task of every kind that runs a model in its own way, and the models."""
    texts = world.sentences(12)
    rows = [{"text": t, "label": LABELS[i % 3]} for i, t in enumerate(texts)]
    world.jsonl(tmp_path / "labels.jsonl", rows)
    world.jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in texts])
    pairs_ = [
        {"text": a, "text_pair": b, "label": float(i)}
        for i, (a, b) in enumerate(zip(texts[:6], texts[6:], strict=True))
    ]
    world.jsonl(tmp_path / "pairs.jsonl", pairs_)
    kinds = {
        "bert": ("text-classification", "labels.jsonl"),
        "gpt2": ("language-model", "texts.jsonl"),
        "encoder": ("sentence-similarity", "pairs.jsonl"),
    }
    found: dict[str, Any] = {}
    for model, (kind, data) in kinds.items():
        world.save(world.make(model), tmp_path / model)
        tasks = world.tasks(tmp_path / f"{model}.yaml", **{model: {"kind": kind, "data": data}})
        found[model] = {"tasks": tasks, "models": {"m": tmp_path / model}}
    return found


@pytest.mark.parametrize(
    ("kind", "device"), [("bert", "cuda"), ("encoder", "mps"), ("gpt2", "cuda"), ("gpt2", "mps")]
)
def test_models_give_there_what_they_give_here(
    kind: str,
    device: str,
    asked: Any,
    accelerator: None,
    places: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = eutectic.evaluate(**asked[kind])
    if device == "mps":
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {DEVICE.type})
    with pretended(float64=device != "mps"):
        there = eutectic.evaluate(**asked[kind], device=device)
    assert places == ["cpu", DEVICE.type]
    for one, other in zip(there.results, here.results, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5)


def test_a_device_that_lacks_float64_says_so_here() -> None:
    with pretended(float64=False), pytest.raises(TypeError, match="float64"):
        torch.ones(2).to(DEVICE).double()


def test_outcomes_of_another_device_are_not_taken(
    tmp_path: Path, asked: Any, accelerator: None, places: list[str]
) -> None:
    wanted = {**asked["bert"], "output": tmp_path / "results.json"}
    with pretended():
        eutectic.evaluate(**wanted)
        eutectic.evaluate(**wanted, device="cuda")
        eutectic.evaluate(**wanted, device="mps")  # another model of a device
        for device in ("cpu", "cuda", "mps"):
            eutectic.evaluate(**wanted, device=device)  # each is known by now
    assert places == ["cpu", DEVICE.type, DEVICE.type]
    lines = (tmp_path / "results.json.outcomes.jsonl").read_text().splitlines()
    assert len({json.loads(line)["pair"] for line in lines}) == 3


def test_the_command_hands_the_device_on(asked: Any, accelerator: None, places: list[str]) -> None:
    line = ["evaluate", f"m={asked['bert']['models']['m']}", "-t", asked["bert"]["tasks"]]
    with pretended():
        assert invoke(*line, "--device", "cuda").code == 0
    assert places == [DEVICE.type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device cuda: torch .* no CUDA here"),
        ("cuda:3", "device cuda:3: torch"),
        ("mps", "finds no GPU of Apple's here"),
        ("mars", "--device mars cannot be used here"),
        ("meta", "holds no values"),
    ],
)
def test_a_device_that_is_not_there(
    device: str, message: str, tmp_path: Path, asked: Any, places: list[str]
) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one here")
    with pytest.raises(RequestError, match=message):
        eutectic.evaluate(**asked["bert"], device=device, output=tmp_path / "results.json")
    assert not places and not list(tmp_path.glob("results.json*"))


def test_full_memory_of_a_device_is_told_in_words() -> None:
    with pytest.raises(devices.DeviceFullError, match="cuda:0 ran out of memory"):
        with devices.running_on("cuda:0"):
            raise torch.OutOfMemoryError("CUDA out of memory")
