"""Outputs in an S3 store: the local bytes, nothing seen before all is there, kills and faults."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

import eutectic
from eutectic.errors import CheckpointError, OutputError, RequestError
from eutectic.storage import MANIFEST, file_systems, local_path, storage_of, uploads, view
from eutectic.storage.remote_urls import Url, root
from helpers.cli import invoke
from helpers.folders import digests, make_base, make_expert, save
from helpers.object_store import BUCKET, SECRET, Proxy, client, names, unfinished_uploads, upload


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two experts whose merge has one file of four parts and others of one request."""
    tmp_path = tmp_path_factory.mktemp("inputs")
    base = make_base(layers=2, width=1024)
    experts = {name: save(tmp_path / name, make_expert(base, i)) for i, name in enumerate("ab")}
    return {"base": save(tmp_path / "base", base), "experts": experts, "method": "task_arithmetic"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as S3 takes them."""
    monkeypatch.setattr(uploads, "PART", 5 << 20)
    monkeypatch.setattr(uploads, "_ONE_REQUEST", 1 << 20)


def _held(store: Any, prefix: str) -> dict[str, str]:
    """Return name -> SHA-256 of what lies below a prefix."""
    found: dict[str, str] = {}
    for key in names(store, f"{prefix}/"):
        content = store.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        found[key.removeprefix(f"{prefix}/")] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the same merge on a disk."""
    folder = tmp_path_factory.mktemp("local")
    eutectic.merge(**inputs, output=folder / "local")
    return digests(folder / "local")


def _staged() -> list[str]:
    return sorted(p.name for p in root().rglob("*") if p.name.endswith((".partial", ".lock")))


def test_the_same_bytes_with_a_manifest_that_is_last(
    tmp_path: Path, store: Any, s3: Proxy, inputs: dict[str, Any], expected: dict[str, str]
) -> None:
    report = eutectic.merge(**inputs, output=f"s3://{BUCKET}/out/one")
    made = [r for r in s3.requests if r.method in ("PUT", "POST")]
    found = _held(store, "out/one")
    manifest = store.get_object(Bucket=BUCKET, Key=f"out/one/{MANIFEST}")["Body"].read()
    told = json.loads(manifest)["files"]
    assert {name: file["sha256"] for name, file in told.items()} == expected
    assert found.pop(MANIFEST)
    assert found == {name: file["sha256"] for name, file in told.items()}
    # A file of n parts takes n + 2 requests, any other one; none is sent twice.
    parts = -(-told["model.safetensors"]["bytes"] // (5 << 20))
    assert len(made) == parts + 2 + len(told)
    assert made[-1].path.startswith(f"/{BUCKET}/out/one/{MANIFEST}")
    assert "complete" not in made[-1].path
    assert sum(r.sent for r in made) < 1.01 * sum(f["bytes"] for f in told.values())
    assert not unfinished_uploads(store)
    assert not _staged()
    assert f"s3://{BUCKET}/out/one" in repr(report)
    assert str(root()) not in repr(report)
    # It is an input as any other; the manifest is no file of the model.
    again = {**inputs, "base": f"s3://{BUCKET}/out/one"}
    eutectic.merge(**again, output=tmp_path / "again")
    assert not (tmp_path / "again" / MANIFEST).exists()


def test_nothing_is_seen_before_all_is_there(store: Any, s3: Proxy, inputs: dict[str, Any]) -> None:
    seen: list[list[str]] = []
    direct = client(s3)

    def look(number: int, request: Any) -> None:
        if request.method in ("PUT", "POST") and "looked" in request.path:
            seen.append([request.path, *names(direct, "looked/")])

    s3.fault = look
    eutectic.merge(**inputs, output=f"s3://{BUCKET}/looked/out")
    begun = [now for now in seen if "partNumber" in now[0] or "uploads" in now[0]]
    assert begun
    assert all(len(now) == 1 for now in begun)
    held = [set(now[1:]) for now in seen]
    assert all(MANIFEST not in name for now in held for name in now)


def test_a_folder_that_holds_something_is_refused(
    tmp_path: Path, store: Any, inputs: dict[str, Any]
) -> None:
    upload(store, inputs["base"], "taken/out")
    before = _held(store, "taken/out")
    with pytest.raises(RequestError, match=r"s3://models/taken/out is not empty"):
        eutectic.merge(**inputs, output=f"s3://{BUCKET}/taken/out")
    assert _held(store, "taken/out") == before


@pytest.mark.parametrize(
    ("url", "says"),
    [("s3://nobucket/out", "no bucket 'nobucket'"), ("s3://k:hunter2@b/out", "before '@'")],
)
def test_outputs_that_cannot_be(store: Any, inputs: dict[str, Any], url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        eutectic.merge(**inputs, output=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("fault", ["503", "die", "cut"])
def test_faults_that_pass_are_waited_for(
    tmp_path: Path,
    store: Any,
    s3: Proxy,
    inputs: dict[str, Any],
    fault: str,
    expected: dict[str, str],
) -> None:
    hit: list[int] = []

    def sometimes(number: int, request: Any) -> str | None:
        if request.method in ("PUT", "POST") and number % 3 == 0 and len(hit) < 5:
            hit.append(number)
            return fault
        return None

    s3.fault = sometimes
    eutectic.merge(**inputs, output=f"s3://{BUCKET}/shaky-{fault}/out")
    assert hit
    found = _held(store, f"shaky-{fault}/out")
    found.pop(MANIFEST)
    assert found == expected


def test_a_store_that_refuses_leaves_nothing_and_the_same_command_sends_again(
    tmp_path: Path,
    store: Any,
    s3: Proxy,
    inputs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, str],
) -> None:
    url = f"s3://{BUCKET}/refused/out"
    text = f"<Error><Code>AccessDenied</Code><Message>{SECRET}</Message></Error>".encode()
    monkeypatch.setattr("helpers.object_store._SLOW_DOWN", text)
    s3.fault = lambda number, request: "403" if "partNumber=3" in request.path else None
    with pytest.raises(OutputError, match=r"refuses the credentials \(AccessDenied\)") as caught:
        eutectic.merge(**inputs, output=url)
    assert SECRET not in str(caught.value)
    assert str(root()) not in str(caught.value)
    assert not names(store, "refused/")
    assert not unfinished_uploads(store)
    s3.clear()
    report = eutectic.merge(**inputs, output=url)
    assert report.resumed
    found = _held(store, "refused/out")
    found.pop(MANIFEST)
    assert found == expected


def _killed(inputs: dict[str, Any], url: str, proxy: Proxy, matches: str) -> None:
    """Merge in another process, which is killed when a request of a kind comes through."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_merge_quietly, args=(inputs, url))
    proxy.fault = lambda number, request: _kill(child.pid, matches, request)
    child.start()
    child.join(60)
    proxy.clear()
    assert child.exitcode == -9


def _kill(process: int | None, matches: str, request: Any) -> str | None:
    if matches not in f"{request.method} {request.path}":
        return None
    assert process is not None
    os.kill(process, 9)
    return "die"


def _merge_quietly(inputs: dict[str, Any], url: str) -> None:
    file_systems._opened.clear()
    eutectic.merge(**inputs, output=url)


@pytest.mark.parametrize(
    ("moment", "seen"),
    [
        ("POST /models/{}/model.safetensors?uploads", False),
        ("partNumber=3", False),
        ("PUT /models/{}/config.json", True),
        ("POST /models/{}/model.safetensors?uploadId", True),
        ("PUT /models/{}/eutectic.manifest.json", True),
    ],
)
def test_a_killed_upload_is_not_seen_as_finished_and_the_same_command_ends_it(
    tmp_path: Path,
    store: Any,
    s3: Proxy,
    inputs: dict[str, Any],
    moment: str,
    seen: bool,
    expected: dict[str, str],
) -> None:
    prefix = f"killed-{hashlib.sha256(moment.encode()).hexdigest()[:6]}/out"
    url = f"s3://{BUCKET}/{prefix}"
    _killed(inputs, url, s3, moment.format(prefix))
    left = names(store, f"{prefix}/")
    assert not any(MANIFEST in key for key in left)
    if not seen:
        assert not left
    report = eutectic.merge(**inputs, output=url)
    assert report.resumed
    found = _held(store, prefix)
    found.pop(MANIFEST)
    assert found == expected
    assert not [key for key in unfinished_uploads(store) if key.startswith(prefix)]
    assert not _staged()


def test_another_machine_refuses_what_a_killed_upload_has_left(
    tmp_path: Path,
    store: Any,
    s3: Proxy,
    inputs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"s3://{BUCKET}/elsewhere/out"
    _killed(inputs, url, s3, f"PUT /models/elsewhere/out/{MANIFEST}")
    monkeypatch.setenv("EUTECTIC_CACHE", str(tmp_path / "other"))
    with pytest.raises(RequestError, match="is not empty"):
        eutectic.merge(**inputs, output=url)


def test_single_files_are_sent_when_they_are_complete(tmp_path: Path, store: Any) -> None:
    base = make_base()
    experts = [f"{name}={save(tmp_path / name, make_expert(base, 1))}" for name in "ab"]
    target = f"s3://{BUCKET}/files/inspection.json"
    words = ["inspect", "--base", save(tmp_path / "base", base), *experts]
    told = invoke(*words, "-o", target)
    assert told.code == 0, told.err
    assert target in told.out
    assert str(tmp_path / "cache") not in told.out
    told = invoke(*words, "-o", tmp_path / "inspection.json")
    assert told.code == 0, told.err
    sent = store.get_object(Bucket=BUCKET, Key="files/inspection.json")["Body"].read()
    assert (
        json.loads(sent)["layers"]
        == json.loads((tmp_path / "inspection.json").read_bytes())["layers"]
    )
    store.put_object(Bucket=BUCKET, Key="files/other.json", Body=b"[1]")
    told = invoke(*words, "-o", f"s3://{BUCKET}/files/other.json")
    assert told.code == 2
    assert "holds something else" in told.err


def test_a_large_single_file_is_seen_at_once(store: Any, s3: Proxy) -> None:
    path = local_path(f"s3://{BUCKET}/large/file.safetensors")
    with storage_of(path).replacing(path) as file:
        for _ in range(12):
            file.write(bytes(1 << 20))
        assert not names(store, "large/")
    assert s3.count("PUT", "partNumber") == 3
    assert storage_of(path).open(view(path)).size == 12 << 20
    with pytest.raises(KeyError), storage_of(path).replacing(path) as file:
        file.write(b"half")
        raise KeyError
    found = store.head_object(Bucket=BUCKET, Key="large/file.safetensors")
    assert found["ContentLength"] == 12 << 20


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(tmp_path: Path, store: Any) -> None:
    folder = save(tmp_path / "base", make_base())
    sizes = {p.name: {"bytes": p.stat().st_size, "sha256": ""} for p in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": sizes}))
    upload(store, folder, "mixed/out")
    url = f"s3://{BUCKET}/mixed/out"
    assert view(url).is_dir()
    store.put_object(Bucket=BUCKET, Key="mixed/out/config.json", Body=b"{}")
    with pytest.raises(CheckpointError, match=r"'config.json' has 2 bytes, by eutectic.manifest"):
        view(url)
    store.delete_object(Bucket=BUCKET, Key="mixed/out/config.json")
    with pytest.raises(CheckpointError, match=r"mixed/out: lacks 'config.json'"):
        view(url)
    store.put_object(Bucket=BUCKET, Key=f"mixed/out/{MANIFEST}", Body=b"[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        view(url)


class _Blob:
    """A file of Azure's as adlfs writes one: closing it is what makes it seen."""

    def __init__(self, seen: list[str], path: str) -> None:
        self.seen, self.path, self.closed = seen, path, False

    def write(self, block: bytes) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True
        self.seen.append(self.path)


def test_files_of_azure_are_not_closed_before_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    opened: list[dict[str, Any]] = []

    class Store:
        def open(self, path: str, mode: str, **options: Any) -> _Blob:
            opened.append(options)
            return _Blob(seen, path)

        def pipe_file(self, path: str, content: bytes) -> None:
            seen.append(path)

    monkeypatch.setattr(uploads, "file_system", lambda url, writing: Store())
    files = ["a.index.json", "a.safetensors", "b.safetensors"]
    for name in files:
        (tmp_path / name).write_bytes(bytes(10 if "index" in name else 3 << 20))
    url = Url("az", ("container", "out"))
    uploads.send_folder(tmp_path, files, url, lambda: seen.append("begin"))
    order = (*files[1:], files[0], MANIFEST)
    assert seen == ["begin", *(f"container/out/{name}" for name in order)]
    assert all("autocommit" not in options for options in opened)
