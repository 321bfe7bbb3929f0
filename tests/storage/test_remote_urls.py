"""URLs: which are taken, where they are shown, and that no secret of one is repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from eutectic.errors import CheckpointError, Note, RequestError
from eutectic.storage import is_url, local_path, url_of
from eutectic.storage.remote_urls import CACHE, is_staging, root
from eutectic.words import with_urls


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a/b", "s3/bucket/a/b"),
        ("S3://bucket//a/b/", "s3/bucket/a/b"),
        ("s3a://bucket/a", "s3/bucket/a"),
        ("gcs://bucket/a", "gs/bucket/a"),
        ("abfs://container/a", "az/container/a"),
        ("hf://org/name@v1/folder", "hf/org/name@v1/folder"),
        ("s3://bucket/ä b/c=1", "s3/bucket/ä b/c=1"),
    ],
)
def test_where_a_url_is_shown_and_back(text: str, shown: str) -> None:
    path = local_path(text)
    assert path == root() / shown
    assert local_path(Path(text)) == path  # pathlib makes one slash of two
    assert url_of(path) == url_of(text)
    scheme, _, rest = shown.partition("/")
    assert str(url_of(path)) == f"{scheme}://{rest}"


def test_paths_are_themselves() -> None:
    for text in ("models/base", "C:/models", "a:b/c", "/tmp/x", "org/name@v1"):
        assert local_path(text) == Path(text)
        assert url_of(text) is None
        assert not is_url(text)
    assert local_path("file:///tmp/x y") == Path("/tmp/x y")
    assert url_of("file:///tmp/x") is None


def test_a_path_of_another_machine_names_the_same_place() -> None:
    assert str(url_of(Path("/home/other/eutectic-remote/s3/bucket/a"))) == "s3://bucket/a"


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAKEY:hunter2@bucket/a",
        "s3://hunter2@bucket/a",
        "hf://user:hunter2@org/name",
        "s3://bucket/a?X-Amz-Signature=hunter2",
        "gs://bucket/a#hunter2",
    ],
)
def test_urls_with_credentials_are_refused_and_not_repeated(text: str) -> None:
    for location in (text, Path(text)):
        with pytest.raises(RequestError) as caught:
            local_path(location)
        assert "hunter2" not in str(caught.value)
        assert "AKIAKEY" not in str(caught.value)
        assert "Credentials are taken from" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://host/a", "Known are s3://"),
        ("ftp://host/a", "Known are s3://"),
        ("s3://bucket", "name bucket and folder"),
        ("hf://org", "organisation and model"),
        ("s3://bucket/../a", "refused"),
        ("s3://bucket/a\x00b", "refused"),
    ],
)
def test_what_else_is_refused(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        local_path(text)


def test_what_a_run_writes_is_of_this_machine() -> None:
    output = local_path("s3://bucket/out")
    assert not is_staging(output)
    assert not is_staging(local_path("s3://bucket/partial/out"))
    assert is_staging(output.with_name("out.partial") / "model" / "x.safetensors")


def test_messages_have_urls_in_place_of_paths() -> None:
    path = local_path("s3://bucket/a/b") / "model.safetensors"
    assert str(CheckpointError(f"{path}: broken.")) == "s3://bucket/a/b/model.safetensors: broken."
    note = Note("one_level_down", ("the base", str(path)))
    assert "s3://bucket/a/b/model.safetensors" in str(note)
    assert str(root()) not in str(note)
    own = local_path("s3://bucket/a/out.partial") / "model"
    text = f"{own} and {path}: '{local_path('s3://b/c')}'."
    assert with_urls(text) == f"{own} and s3://bucket/a/b/model.safetensors: 's3://b/c'."
