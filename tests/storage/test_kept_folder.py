"""Folders that grow from run to run, in a store: sent whole, taken up, kept by a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eutectic.errors import OutputError, RequestError
from eutectic.storage import MANIFEST, kept_folder, local_path, names_kept, uploads, view
from helpers.object_store import BUCKET, Proxy, client, names, upload


def content(store: Any, prefix: str) -> dict[str, str]:
    return {
        key.removeprefix(prefix): store.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()
        for key in names(store, prefix)
        if not key.endswith(MANIFEST)
    }


def test_a_folder_is_sent_and_taken_up_elsewhere(
    tmp_path: Path, store: Any, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_path(f"s3://{BUCKET}/kept/table")
    assert names_kept(folder) == []
    with kept_folder(folder, ".lock") as work:
        (work / "sub").mkdir()
        (work / "sub/b").write_text("1")
        (work / "a").write_text("1")
        (work / "a.lock").touch()
        assert not names(store, "kept/")
    assert content(store, "kept/table/") == {"a": "1", "sub/b": "1"}
    assert not work.exists()
    assert (view(folder) / "a").read_text() == "1"

    monkeypatch.setenv("EUTECTIC_CACHE", str(tmp_path / "another machine"))
    folder = local_path(f"s3://{BUCKET}/kept/table")
    seen: list[list[str]] = []
    direct = client(s3)

    def look(number: int, request: Any) -> None:
        if request.method == "PUT" and "kept/table" in request.path:
            seen.append([request.path, *names(direct, "kept/")])

    with kept_folder(folder, ".lock") as work:
        assert sorted(p.name for p in work.iterdir()) == ["a", "sub"]
        (work / "a").write_text("two")
        (work / "c").write_text("1")
        s3.fault = look
    assert content(store, "kept/table/") == {"a": "two", "c": "1", "sub/b": "1"}
    told = json.loads(store.get_object(Bucket=BUCKET, Key=f"kept/table/{MANIFEST}")["Body"].read())
    assert set(told["files"]) == {"a", "c", "sub/b"}
    assert len(seen) == 4
    assert not any(name.endswith(MANIFEST) for now in seen for name in now[1:])
    assert MANIFEST in seen[-1][0]
    assert names_kept(folder) == ["a", "c", "sub"]


def test_what_a_failed_run_made_is_kept_for_the_next(
    store: Any, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_path(f"s3://{BUCKET}/failed/table")
    with kept_folder(folder, ".lock") as work:
        (work / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), kept_folder(folder, ".lock") as work:
        (work / "a").write_text("2")
        raise KeyboardInterrupt
    assert content(store, "failed/table/") == {"a": "1"}
    monkeypatch.setenv("EUTECTIC_REMOTE_TRIES", "1")
    monkeypatch.setattr(uploads, "PART", 5 << 20)
    s3.fault = lambda _, request: "503" if request.method == "PUT" else None
    with (
        pytest.raises(OutputError, match="kept for the same command"),
        kept_folder(folder, ".lock") as work,
    ):
        assert (work / "a").read_text() == "2"
    s3.clear()
    with kept_folder(folder, ".lock") as work:
        assert (work / "a").read_text() == "2"
    assert content(store, "failed/table/") == {"a": "2"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("hf://me/table", "the hub keeps models"),
        ("s3://nobucket/table", "no bucket 'nobucket'"),
        (f"s3://{BUCKET}/there/file", "is a file"),
    ],
)
def test_a_folder_that_cannot_be(url: str, says: str, tmp_path: Path, store: Any) -> None:
    (tmp_path / "file").write_text("x")
    upload(store, tmp_path / "file", "there/file")
    with pytest.raises(RequestError, match=says):
        names_kept(local_path(url))
    with pytest.raises(RequestError, match=says), kept_folder(local_path(url), ".lock"):
        raise AssertionError
