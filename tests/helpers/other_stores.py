"""Google's and Azure's stores as their emulators serve them on loopback, behind the proxy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.object_store import BUCKET, Proxy, proxied

# What Azurite's manual gives to everybody.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
WRONG = "bm90IHRoZSBrZXkgb2YgYW55Ym9keSwgYnV0IGEgc2VjcmV0IG9uZSBhbnl3YXk="
_GOOGLE = """
import sys
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()
"""


@dataclass
class Store:
    """A store with one bucket (a container), seen directly and through the proxy."""

    scheme: str
    proxy: Proxy
    direct: Any  # fsspec's file system, past the proxy
    wrong: dict[str, str]  # variables with credentials that are refused

    def url(self, place: str) -> str:
        return f"{self.scheme}://{BUCKET}/{place}"

    def put(self, folder: Path, place: str) -> None:
        for file in (p for p in folder.rglob("*") if p.is_file()):
            name = file.relative_to(folder).as_posix()
            self.direct.pipe_file(f"{BUCKET}/{place}/{name}", file.read_bytes())

    def held(self, place: str) -> dict[str, bytes]:
        self.direct.invalidate_cache()
        found = self.direct.find(f"{BUCKET}/{place}")
        return {n.split(f"{place}/", 1)[1]: self.direct.cat_file(n) for n in found}


def azurite() -> str:
    """Return the program, where it is installed."""
    local = Path(sys.prefix) / "node_modules/.bin/azurite-blob"
    found = str(local) if local.is_file() else shutil.which("azurite-blob")
    if found is None:
        pytest.skip("Azurite is not installed: make test-stores does it")
    return found


@contextmanager
def google(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    patch.setenv("NO_GCE_CHECK", "true")
    # It would ask by gRPC, which the emulator does not speak, of what kind a bucket is.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    patch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    port = _free()
    words = [sys.executable, "-c", _GOOGLE, str(port), BUCKET]
    with _served(words, port), proxied("127.0.0.1", port) as proxy:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        direct = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield Store("gs", proxy, direct, {})


@contextmanager
def azure(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    import adlfs

    def connection(url: str, key: str) -> str:
        named = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key}"
        return f"{named};BlobEndpoint={url}/{ACCOUNT};"

    for name in [name for name in os.environ if name.startswith("AZURE_STORAGE_")]:
        patch.delenv(name)
    port = _free()
    options = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    words = [azurite(), "--blobHost", "127.0.0.1", "--blobPort", str(port), *options]
    with _served(words, port), proxied("127.0.0.1", port) as proxy:
        name = "AZURE_STORAGE_CONNECTION_STRING"
        at = connection(f"http://127.0.0.1:{port}", KEY)
        direct = adlfs.AzureBlobFileSystem(connection_string=at, skip_instance_cache=True)
        direct.mkdir(BUCKET)
        patch.setenv(name, connection(proxy.url, KEY))
        yield Store("az", proxy, direct, {name: connection(proxy.url, WRONG)})


@contextmanager
def _served(words: list[str], port: int) -> Iterator[None]:
    """Run a server until the end of the block."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(words, **quiet))  # type: ignore[call-overload]
        stack.callback(server.kill)
        for _ in range(600):
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                raise RuntimeError(f"{words[0]} has ended")
            time.sleep(0.1)
        yield


def _free() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
