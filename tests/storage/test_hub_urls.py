"""`hf://`: models read in ranges from a hub, and written to it in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eutectic
from eutectic.errors import OutputError, RequestError
from eutectic.storage import MANIFEST, file_systems
from helpers.folders import digests, load, make_base, make_expert, save
from helpers.hub_server import Hub, hub_server

# The library's own, of versions that send large files so.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content")
TOKEN = "hf_verysecrettoken"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    file_systems._opened.clear()
    with hub_server() as server:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("EUTECTIC_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(file_systems, "_FIRST_WAIT", 0.01)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    file_systems._opened.clear()


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    base = make_base(layers=3, width=128)
    experts = {name: save(tmp_path / name, make_expert(base, i)) for i, name in enumerate("ab")}
    return {"base": save(tmp_path / "base", base), "experts": experts, "method": "task_arithmetic"}


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}


def test_models_are_read_in_ranges(tmp_path: Path, hub: Hub, inputs: dict[str, Any]) -> None:
    hub.models["org/base"] = {"main": _files(inputs["base"])}
    hub.models["org/a"] = {"main": {}, "v1": _files(inputs["experts"]["a"])}
    deep = {f"experts/b/{n}": c for n, c in _files(inputs["experts"]["b"]).items()}
    hub.models["org/more"] = {"main": deep}
    urls = {"a": "hf://org/a@v1", "b": "hf://org/more/experts/b"}
    options = {**inputs, "base": "hf://org/base", "experts": urls}
    hub.sent.clear()
    eutectic.merge(**options, output=tmp_path / "there")
    least = 3 * (tmp_path / "base" / "model.safetensors").stat().st_size
    ranged = [r for m, path, r in hub.sent if "model.safetensors" in path and m == "GET"]
    assert len(ranged) > 3
    assert None not in ranged
    bounds = [r.removeprefix("bytes=").split("-") for r in ranged if r is not None]
    assert sum(int(stop) + 1 - int(start) for start, stop in bounds) == least
    eutectic.merge(**inputs, output=tmp_path / "here")
    here = load(tmp_path / "here")
    assert all(here[name].equal(value) for name, value in load(tmp_path / "there").items())


def test_an_output_is_one_commit_with_its_card(
    tmp_path: Path, hub: Hub, inputs: dict[str, Any]
) -> None:
    eutectic.merge(**inputs, output="hf://me/merged")
    found = dict(hub.models["me/merged"]["main"])
    eutectic.merge(**inputs, output=tmp_path / "here")
    assert hub.commits == 1
    assert hub.private == {"me/merged"}
    found.pop(".gitattributes")
    told = json.loads(found.pop(MANIFEST))["files"]
    assert {name: file["sha256"] for name, file in told.items()} == digests(tmp_path / "here")
    assert {n: len(c) for n, c in found.items()} == {n: f["bytes"] for n, f in told.items()}
    assert found["README.md"] == (tmp_path / "here" / "README.md").read_bytes()
    assert found["README.md"].startswith(b"---\n")
    assert TOKEN.encode() not in b"".join(found.values())
    with pytest.raises(RequestError, match="hf://me/merged is not empty"):
        eutectic.merge(**inputs, output="hf://me/merged")


def test_a_branch_and_a_folder(hub: Hub, inputs: dict[str, Any]) -> None:
    hub.models["me/merged"] = {"main": {".gitattributes": b"", "other": b"1"}}
    eutectic.merge(**inputs, output="hf://me/merged@dev/iso")
    assert set(hub.models["me/merged"]["main"]) == {".gitattributes", "other"}
    assert "iso/model.safetensors" in hub.models["me/merged"]["dev"]


def test_an_upload_that_fails_is_sent_by_the_same_command(
    tmp_path: Path, hub: Hub, inputs: dict[str, Any]
) -> None:
    hub.refuse = "/api/models/me/merged/commit"
    with pytest.raises(OutputError, match="refuses the credentials") as caught:
        eutectic.merge(**inputs, output="hf://me/merged")
    assert TOKEN not in str(caught.value)
    assert set(hub.models["me/merged"]["main"]) == {".gitattributes"}
    hub.refuse = "/lfs"
    with pytest.raises(OutputError, match="refuses the credentials"):
        eutectic.merge(**inputs, output="hf://me/merged")
    hub.refuse = "-"
    assert eutectic.merge(**inputs, output="hf://me/merged").resumed
    assert "model.safetensors" in hub.models["me/merged"]["main"]


def test_only_models_are_written(hub: Hub, inputs: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="hf://org/model alone"):
        eutectic.merge(**inputs, output="hf://datasets/me/merged")
