"""Inputs and outputs in Google's and Azure's stores: local bytes, faults, kills, refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import eutectic
from eutectic.errors import EutecticError, RequestError
from eutectic.storage import MANIFEST, file_systems, uploads
from helpers.folders import digests, make_base, make_expert, save
from helpers.other_stores import WRONG, Store, azure, google

pytestmark = [
    pytest.mark.stores,
    # Of Azure's library, which gives aiohttp parts as plain bytes.
    pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning"),
]
PART = 1 << 20


@pytest.fixture(scope="module", params=["gs", "az"])
def served(request: pytest.FixtureRequest) -> Iterator[Store]:
    """One of the stores, for all tests of it."""
    for package in {"gs": ("gcsfs", "gcp_storage_emulator"), "az": ("adlfs",)}[request.param]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-stores does it")
    with pytest.MonkeyPatch.context() as patch:
        with {"gs": google, "az": azure}[request.param](patch) as store:
            yield store


@pytest.fixture
def store(served: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("EUTECTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_systems, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(uploads, "PART", PART)
    monkeypatch.setattr(uploads, "_ONE_REQUEST", PART // 4)
    file_systems._opened.clear()
    served.proxy.clear()
    yield served
    file_systems._opened.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two experts whose merge has one file of several parts and others of one request."""
    folder = tmp_path_factory.mktemp("inputs")
    base = make_base(layers=2, width=512)
    experts = {name: save(folder / name, make_expert(base, i)) for i, name in enumerate("ab")}
    return {"base": save(folder / "base", base), "experts": experts, "method": "task_arithmetic"}


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "out"
    eutectic.merge(**inputs, output=folder)
    return digests(folder)


def told(store: Store, place: str) -> dict[str, str]:
    """Return what the manifest says, having looked that it is so."""
    held = store.held(place)
    files = json.loads(held.pop(MANIFEST))["files"]
    assert {name: len(content) for name, content in held.items()} == {
        name: file["bytes"] for name, file in files.items()
    }
    return {name: file["sha256"] for name, file in files.items()}


def test_from_a_store_to_a_store(
    store: Store, inputs: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    places = {"base": inputs["base"], **inputs["experts"]}
    for name, folder in places.items():
        store.put(folder, f"in/{name}")
    request = {
        "base": store.url("in/base"),
        "experts": {name: store.url(f"in/{name}") for name in inputs["experts"]},
        "method": "task_arithmetic",
    }
    eutectic.merge(**request, output=tmp_path / "local")
    weights = sum((f / "model.safetensors").stat().st_size for f in places.values())
    assert weights <= store.proxy.bytes_down < 1.02 * weights + 100_000  # each byte once
    store.proxy.clear()
    eutectic.merge(**request, output=store.url("out"))
    found, local = told(store, "out"), digests(tmp_path / "local")
    beside = {"eutectic.json", "README.md"}  # name the inputs
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert {n: h for n, h in found.items() if n not in beside} == {
        n: h for n, h in local.items() if n not in beside
    }
    sent = [r for r in store.proxy.requests if r.sent]
    assert sum(r.sent for r in sent) < 1.02 * sum(len(c) for c in store.held("out").values())
    assert store.scheme == "gs" or MANIFEST in sent[-1].path  # there it stands in the body
    made = eutectic.plan(**{**inputs, "base": store.url("out")})
    assert made.cost["read_bytes"] > 0


def _most(store: Store) -> int:
    """Return how many faults: Azure's library waits a quarter of a minute after each."""
    return 1 if store.scheme == "az" else 3


@pytest.mark.parametrize("fault", ["503", "die"])
def test_faults_that_pass_are_waited_for(
    fault: str, store: Store, inputs: dict[str, Any], expected: dict[str, str]
) -> None:
    hit: list[int] = []

    def sometimes(number: int, request: Any) -> str | None:
        if request.method in ("PUT", "POST") and number % 3 == 0 and len(hit) < _most(store):
            hit.append(number)
            return fault
        return None

    store.proxy.fault = sometimes
    eutectic.merge(**inputs, output=store.url(f"shaky-{fault}"))
    assert hit
    assert told(store, f"shaky-{fault}") == expected


@pytest.mark.parametrize("fault", ["503", "cut", "die"])
def test_reading_goes_on_after_faults(
    fault: str, store: Store, inputs: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    store.put(inputs["base"], "shaky/base")
    hit: list[int] = []

    def sometimes(number: int, request: Any) -> str | None:
        if request.method == "GET" and number % 2 and len(hit) < _most(store):
            hit.append(number)
            return fault
        return None

    store.proxy.fault = sometimes
    eutectic.merge(**{**inputs, "base": store.url("shaky/base")}, output=tmp_path / "out")
    assert hit
    found = digests(tmp_path / "out")
    assert found["model.safetensors"] == expected["model.safetensors"]


def _merge_quietly(inputs: dict[str, Any], url: str) -> None:
    uploads.PART, uploads._ONE_REQUEST = PART, PART // 4
    eutectic.merge(**inputs, output=url)


@pytest.mark.parametrize("sent", [2, 7])
def test_a_killed_upload_leaves_nothing_finished_and_is_ended(
    sent: int, store: Store, inputs: dict[str, Any], expected: dict[str, str]
) -> None:
    place, seen = f"killed-{sent}", []
    child = multiprocessing.get_context("fork" if os.name == "posix" else "spawn").Process(
        target=_merge_quietly, args=(inputs, store.url(place))
    )

    def kill(number: int, request: Any) -> str | None:
        if request.sent:
            seen.append(number)
        if len(seen) < sent:
            return None
        os.kill(child.pid or 0, 9)
        return "die"

    store.proxy.fault = kill
    child.start()
    child.join(120)
    assert child.exitcode == -9
    store.proxy.clear()
    assert MANIFEST not in store.held(place)
    assert eutectic.merge(**inputs, output=store.url(place)).resumed
    assert told(store, place) == expected


def test_a_bucket_that_is_not_there(store: Store, inputs: dict[str, Any], tmp_path: Path) -> None:
    absent = f"{store.scheme}://not-there/x"
    with pytest.raises(RequestError, match="no bucket 'not-there'|no container 'not-there'"):
        eutectic.merge(**inputs, output=absent)
    with pytest.raises(EutecticError, match="'not-there'"):
        eutectic.merge(**{**inputs, "base": absent}, output=tmp_path / "out")


def test_credentials_that_are_refused(
    store: Store, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in store.wrong.items():
        monkeypatch.setenv(name, value)
    if not store.wrong:  # Google's emulator takes any
        store.proxy.fault = lambda number, request: "403"
    with pytest.raises(EutecticError, match="refuses the credentials") as caught:
        eutectic.merge(**inputs, output=store.url("refused"))
    assert WRONG not in str(caught.value)
    store.proxy.clear()
    assert not store.held("refused")
