"""Guards how names become folders: local paths, ids served by a small hub, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

import eutectic
from eutectic.checkpoint.hub import HubId, hub_id
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.locating import locate, resolve
from eutectic.errors import CheckpointError, MissingExtraError
from helpers.cli import invoke
from helpers.folders import load

SHA = "1" * 40
WEIGHTS = save({"a": torch.ones(2)})
BASE, TUNED = torch.eye(4), torch.ones(4, 4)
FACTOR = torch.full((1, 4), 0.5)
LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"]}
REPOSITORIES = {
    "org/base": {"model.safetensors": save({"q.weight": BASE}), "config.json": b"{}"},
    "org/tuned": {
        "README.md": b"",
        "sst2/checkpoint-5/model.safetensors": save({"q.weight": TUNED}),
        "lora/adapter_model.safetensors": save(
            {
                "base_model.model.q.lora_A.weight": FACTOR,
                "base_model.model.q.lora_B.weight": FACTOR.T.clone(),
            }
        ),
        "lora/adapter_config.json": json.dumps(LORA).encode(),
    },
    "org/new": {
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"old",
        "config.json": b"{}",
        "onnx/model.onnx": b"x",
        "onnx/config.json": b"{}",
    },
    "org/inner": {
        "README.md": b"",
        "a/adapter_config.json": b"{}",
        "a/adapter_model.safetensors": WEIGHTS,
        "b/config.json": b"{}",
        "b/model.safetensors": WEIGHTS,
        "b/optimizer.bin": b"x",
    },
    "org/modules": {
        "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"old",
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/pytorch_model.bin": b"old",
        "LICENSE.md": b"x",
    },
    "org/steps": {"README.md": b"", "checkpoint-9/model.safetensors": WEIGHTS, "runs/x.json": b""},
    "org/torch": {"model.pt": b"x", "README.md": b""},
    "org/gguf": {"README.md": b"", "q4.gguf": b"GGUF", "config.json": b"{}"},
    "org/old": {"pytorch_model.bin": b"old", "config.json": b"{}", "training_args.bin": b"x"},
}


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs."""

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            self.api("/".join(path[2:4]), path[4:])
            return
        content = REPOSITORIES.get("/".join(path[:2]), {}).get("/".join(path[4:]))
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})

    def api(self, model: str, rest: list[str]) -> None:
        codes = {"org/gated": (403, "GatedRepo"), "org/none": (404, "RepoNotFound")}
        if model in codes:
            status, code = codes[model]
            self.answer(status, b"{}", {"X-Error-Code": code})
        elif rest[-1] == "gone":
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = REPOSITORIES[model].items()
            tree = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files]
            info = {"id": model, "sha": SHA, "siblings": [{"rfilename": n} for n, _ in files]}
            self.answer(200, json.dumps(tree if rest[0] == "tree" else info).encode(), {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve REPOSITORIES, with an empty cache; yields the cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield tmp_path / "cache"
    server.shutdown()
    server.server_close()
    thread.join()


def names_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_existing_paths_are_returned_as_they_are(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "m.safetensors").write_bytes(WEIGHTS)
    assert resolve(str(tmp_path / "m.safetensors")) == tmp_path / "m.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "/no/where",
        "a/../c",
        "a/b/../c",
        "models/x.safetensors",
        "x.bin",
        "",
        "-x",
        "a b",
    ],
)
def test_what_is_neither_path_nor_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(name)


def test_download_prefers_safetensors(hub: Path) -> None:
    folder = resolve("org/new")
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert folder.is_relative_to(hub.resolve())
    # The cache's links are accepted.
    assert list(open_index(folder).entries) == ["a"]


def test_download_takes_pickles_where_there_is_nothing_else(hub: Path) -> None:
    assert names_in(resolve("org/old")) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/gated", None, "access on the hub is restricted"),
        ("org/none", None, "neither a local path nor a model on the hub"),
        ("org/new", "gone", "no revision 'gone'"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_refusals_of_the_hub(name: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(name, revision=revision)


@pytest.mark.usefixtures("hub")
def test_modules_without_safetensors_have_their_pickles() -> None:
    assert names_in(resolve("org/modules")) == sorted(
        {*REPOSITORIES["org/modules"]} - {"pytorch_model.bin"}
    )


@pytest.mark.parametrize(
    ("name", "model", "revision", "folder"),
    [
        ("gpt2", "gpt2", None, None),
        ("gpt2@main", "gpt2", "main", None),
        ("gpt2@main/onnx", "gpt2", "main", "onnx"),
        ("org/name", "org/name", None, None),
        ("org/name@v1.0", "org/name", "v1.0", None),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3", None),
        ("org/name@refs/pr/3/sub", "org/name", "refs/pr/3", "sub"),
        ("org/name/sub/further", "org/name", None, "sub/further"),
        ("org/name@0123abc/checkpoint-500", "org/name", "0123abc", "checkpoint-500"),
    ],
)
def test_what_an_id_means(name: str, model: str, revision: str | None, folder: str | None) -> None:
    assert hub_id(name) == HubId(model, revision, folder)
    assert str(hub_id(name)) == name


@pytest.mark.usefixtures("hub")
def test_revisions_reach_the_hub() -> None:
    assert resolve("org/new@main") == resolve("org/new")
    with pytest.raises(CheckpointError, match="no revision 'gone'"):
        resolve("org/new@gone")


def test_a_folder_in_a_repository_is_fetched_alone(hub: Path) -> None:
    folder = resolve("org/inner/b")
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert names_in(folder.parent) == ["b/config.json", "b/model.safetensors"]
    assert list(open_index(resolve("org/inner@main/b")).entries) == ["a"]
    # Named, a folder is fetched that is left out where the whole model is asked for.
    assert names_in(resolve("org/steps/checkpoint-9")) == ["model.safetensors"]


@pytest.mark.usefixtures("hub")
def test_what_lies_one_level_down_on_the_hub() -> None:
    with pytest.raises(CheckpointError, match="2 folders below") as caught:
        resolve("org/inner")
    assert "org/inner/a  (adapter)" in str(caught.value)
    assert "org/inner/b  (checkpoint)" in str(caught.value)
    assert locate("org/inner@main", full=True).below == "org/inner@main/b"
    found = locate("org/steps")
    assert found.below == "org/steps/checkpoint-9"
    assert names_in(found.path) == ["model.safetensors"]
    with pytest.raises(CheckpointError, match="no folder 'c'.\nFolders with files there: a, b"):
        resolve("org/inner/c")
    with pytest.raises(CheckpointError, match="GGUF"):
        resolve("org/gguf")
    with pytest.raises(CheckpointError, match=r"model.pt.*\n.*hf download org/torch model.pt"):
        resolve("org/torch")


@pytest.mark.usefixtures("hub")
def test_merges_of_models_on_the_hub(tmp_path: Path) -> None:
    """Full checkpoint and adapter, a revision, a folder, and one below it, in all three ways."""
    experts = {"a": "org/tuned/sst2", "b": "org/tuned@main/lora"}
    eutectic.merge(
        base="org/base@main", experts=experts, method="average", output=tmp_path / "python"
    )
    words = [f"{name}={path}" for name, path in experts.items()]
    options = ["--base", "org/base@main", "-m", "average", "-o", tmp_path / "words"]
    assert invoke("merge", *options, *words).code == 0
    recipe = tmp_path / "recipe.json"
    stated = {"base": "org/base@main", "experts": experts, "method": "average"}
    recipe.write_text(json.dumps(stated))
    answer = invoke("merge", recipe, "-o", tmp_path / "recipe")
    assert answer.code == 0, answer
    assert "taken is what lies below: org/tuned/sst2/checkpoint-5" in answer.out + answer.err
    wanted = (TUNED + (BASE + 2 * FACTOR.T @ FACTOR)) / 2
    for name in ("python", "words", "recipe"):
        assert torch.allclose(load(tmp_path / name)["q.weight"], wanted)
    card = (tmp_path / "recipe/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["org/base"]
    assert "org/tuned@main/lora" in card


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org/new@main"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert resolve("org/new@main") == Path("org/new@main")


def test_offline_uses_the_cache_or_says_so(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = resolve("org/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/new") == folder
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("org/old")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"eutectic\[hf\]"):
        resolve("org/new")
