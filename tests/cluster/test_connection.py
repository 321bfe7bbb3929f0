"""What is told where there is no cluster, or no Ray; no cluster is needed for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eutectic.cluster.connection import Share, connect
from eutectic.cluster.workers import Answer, answer, versions
from eutectic.errors import MissingExtraError, RequestError
from eutectic.execution.executors import limits_of


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eutectic\[ray\]'"):
        limits_of(executor="ray")


@pytest.mark.parametrize("address", ["10.0.0.5", "host:port", ":6379", "host:70000"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(RequestError, match=r"must be HOST:PORT"):
        limits_of(executor="ray", ray_address=address)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RequestError, match=rf"nobody answers at the Ray address {address}"):
            connect(address, share=lambda: Share(1, 1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ray_address": "10.0.0.5:6379"}, "the executor is threads"),
        ({"executor": "rey"}, "executor is threads or ray, got 'rey'. Did you mean 'ray'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        limits_of(**options)


def test_a_cluster_that_starts_too_slowly_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, ended, folders = pytest.importorskip("ray"), list[int](), list[str]()

    def slow(**options: Any) -> None:
        folders.append(options["_temp_dir"])
        raise Exception("The current node timed out during startup. This could happen because …")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(1))
    with pytest.raises(RequestError, match=r"could not start .* timed out.*\n.*very busy"):
        connect(share=lambda: Share(1, 1))
    assert ended and not Path(folders[0]).exists()


def test_a_wrong_token_is_refused_before_ray_tries_it_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    raised: list[Any] = [ray.exceptions.AuthenticationError("InvalidAuthToken"), TypeError("API")]

    def refuse(**_: Any) -> None:
        raise raised[0]

    def begin(**_: Any) -> None:
        raise ConnectionError("begun")

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", begin)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray._raylet, "GcsClient", refuse)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(RequestError, match="asks for a token.*\n.*RAY_AUTH_TOKEN"):
            connect(address, share=lambda: Share(1, 1))
        raised.pop(0)  # a version of Ray that cannot be asked so
        with pytest.raises(RequestError, match="cannot be joined: begun"):
            connect(address, share=lambda: Share(1, 1))


WITHOUT_TOKEN = """
import socket
from eutectic.cluster.connection import Share, connect
from eutectic.errors import RequestError
with socket.socket() as head:
    head.bind(("127.0.0.1", 0))
    head.listen()
    try:
        connect(f"127.0.0.1:{head.getsockname()[1]}", share=lambda: Share(1, 1))
    except RequestError as error:
        print(error)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_no_token_where_one_is_asked_for_is_an_error_in_words(tmp_path: Path) -> None:
    """Ray's client would end the process."""
    pytest.importorskip("ray")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_TOKEN", None)
    words = [sys.executable, "-c", WITHOUT_TOKEN]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "RAY_AUTH_TOKEN or ~/.ray/auth_token" in done.stdout


STARTED = """
from eutectic.cluster.connection import _connection
from eutectic.cluster.where import joined
if __name__ == "__main__":
    found = joined(None, 1, 2_000_000_000)
    assert (found.cpus, found.memory, found.machines) == (1, 2_000_000_000, 1), found
    assert joined(None, 1, 2_000_000_000) == found
    print(_connection.folder)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_of_a_cluster_that_is_started_here_nothing_is_left(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "script.py").write_text(STARTED)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    words = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())  # nothing else stands on stdout
    assert folder.name.startswith("eutectic-ray-")
    assert not folder.exists()


def test_a_worker_with_other_versions_is_refused() -> None:
    assert answer(abs, -1, versions(), "10.0.0.7").value == 1
    found = answer(abs, -1, {**versions(), "torch": "0.1"}, "10.0.0.7")
    assert found.kind is RequestError
    assert "worker 10.0.0.7 has torch" in str(found.error())
    assert "this process has torch 0.1" in str(found.error())


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_memory_is_told_apart_from_other_errors(error: Any, memory: bool) -> None:
    def fail(_: object) -> None:
        raise error

    found: Answer = answer(fail, None, versions(), "n")
    assert found.out_of_memory is memory
