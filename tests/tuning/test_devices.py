"""Searches whose models run on an accelerator, which is pretended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.cluster import devices
from eutectic.cluster.devices import ON_CPU, Device
from eutectic.errors import RequestError
from eutectic.execution import executors, tasks
from eutectic.tuning import search_tasks
from helpers.pretended_device import DEVICE, pretended
from tuning import world

THERE = Device(str(DEVICE), "pretended", 1 << 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Let "cuda" be the pretended device for matrices and models, and "mps" for models alone."""
    seen: set[str] = set()
    run, outputs = tasks._run, search_tasks.outputs

    def noting(model: Any, *given: Any) -> Any:
        seen.add(next(model.parameters()).device.type)
        return outputs(model, *given)

    def run_there(*given: Any) -> Any:  # a mode is of one thread
        with pretended():
            return run(*given)

    def matrices(text: str) -> Device:
        return THERE if text == "cuda" else ON_CPU

    monkeypatch.setattr(executors, "device_here", matrices)
    monkeypatch.setattr(executors, "models_here", lambda t: ON_CPU if t == "cpu" else THERE)
    monkeypatch.setattr(search_tasks, "outputs", noting)
    monkeypatch.setattr(tasks, "_run", run_there)
    return seen


def request(folder: Path, search: str) -> dict[str, Any]:
    return {
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in world.CLASSES},
        "method": "task_arithmetic",
        "scale": {"search": search, "tasks": str(folder / "tasks.yaml"), "points": 3},
    }


@pytest.mark.parametrize(("search", "device"), [("divergence", "cuda"), ("validation", "mps")])
def test_a_search_runs_its_models_there(
    search: str, device: str, folder: Path, places: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = eutectic.tune(request(folder, search))
    assert places == {"cpu"}
    places.clear()
    if device == "mps":
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {DEVICE.type})
    with pretended(float64=device != "mps"):
        there = eutectic.tune(request(folder, search), device=device)
    assert places == {DEVICE.type}
    assert there.search["device"] == "pretended"
    assert "device" not in here.search
    assert there.scale == here.scale
    for one, other in zip(there.search["points"], here.search["points"], strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)


def test_what_was_measured_elsewhere_is_measured_again(
    tmp_path: Path, folder: Path, places: set[str]
) -> None:
    asked = request(folder, "validation")
    eutectic.tune(asked, work=tmp_path / "work")
    places.clear()
    eutectic.tune(asked, work=tmp_path / "work")
    assert places == set()  # all of it was known
    with pretended():
        eutectic.tune(asked, work=tmp_path / "work", device="mps")
    assert places == {DEVICE.type}


def test_a_comparison_and_a_merge_run_theirs_there(
    tmp_path: Path, folder: Path, places: set[str]
) -> None:
    with pretended():
        merged = eutectic.merge(
            request(folder, "divergence"), output=tmp_path / "merged", device="mps"
        )
        assert places == {DEVICE.type}
        compared = eutectic.compare(
            {k: v for k, v in request(folder, "divergence").items() if k != "scale"},
            tasks=folder / "tasks.yaml",
            output=tmp_path / "compared",
            methods=["task_arithmetic"],
            searches=["divergence"],
            search={"points": 3},
            split="validation",
            device="mps",
        )
    assert places == {DEVICE.type}
    assert compared.rows[0].scale == merged.scale


def test_apples_gpus_are_refused_where_no_model_runs(tmp_path: Path, folder: Path) -> None:
    asked = {**request(folder, "norm"), "scale": "norm"}
    for call in (
        lambda: eutectic.merge(asked, output=tmp_path / "out", device="mps"),
        lambda: eutectic.tune(asked, device="mps"),
        lambda: eutectic.plan({**asked, "scale": 1.0}, device="mps"),
    ):
        with pytest.raises(RequestError, match="no float64"):
            call()
    assert not (tmp_path / "out").exists()
    if not torch.backends.mps.is_available():
        with pytest.raises(RequestError, match="finds no GPU of Apple's"):
            eutectic.tune(request(folder, "divergence"), device="mps")
