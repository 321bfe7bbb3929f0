"""An S3 server for the tests of object stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.object_store import BUCKET, KEY, SECRET, Proxy, client, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[Proxy]:
    """The server with its one bucket, for all tests of a process."""
    pytest.importorskip("moto", reason="the server of the tests is moto's")
    with s3_server() as proxy:
        client(proxy).create_bucket(Bucket=BUCKET)
        yield proxy


@pytest.fixture
def store(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, where eutectic looks for the store too."""
    from eutectic.storage import file_systems

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("EUTECTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_systems, "_FIRST_WAIT", 0.01)
    file_systems._opened.clear()
    s3.clear()
    yield client(s3)
    file_systems._opened.clear()
