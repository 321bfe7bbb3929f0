"""Make the tasks and the pre-training set: uint8 images [N, 32, 32] and labels, as safetensors.

    python benchmarks/glyphs/data.py --work DIR

`DIR/data/<task>.safetensors` holds `train_images`, `train_labels`, `validation_…`, `test_…`;
`DIR/pretraining.safetensors` clean glyphs of other scripts. The three splits of a glyph task use
different fonts; its images are distorted (affine, contrast, noise, a hole), seeded by task and
split.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
from fetch import fetch
from render import MARKS, SCRIPTS, SIDE, SPLITS, render
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from table.drawings import seeded, write

SIZES = {"train": 6000, "validation": 600, "test": 1500}
REAL = ("mnist", "silhouettes", "digits")
TASKS = (  # the first eight, which tables use by default, are of eight different kinds
    *("mnist", "silhouettes", "style", "accents", "hangul", "arabic", "thai", "katakana"),
    *("hebrew", "georgian", "devanagari", "ethiopic", "digits"),
)
PRETRAINING = (
    *("latin", "greek", "cyrillic", "hiragana", "kanji", "armenian", "bengali", "gurmukhi"),
    *("gujarati", "tamil", "malayalam", "myanmar", "tibetan"),
)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images [n, 32, 32] in [0, 1], turned, sheared, scaled, moved, faded and noisy."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    turn, shear = uniform(-0.26, 0.26), uniform(-0.2, 0.2)
    wide, high = torch.exp(uniform(-0.2, 0.2)), torch.exp(uniform(-0.2, 0.2))
    cos, sin = torch.cos(turn), torch.sin(turn)
    top = torch.stack([cos * wide, -sin * high + shear, uniform(-0.12, 0.12)], 1)
    bottom = torch.stack([sin * wide, cos * high, uniform(-0.12, 0.12)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), [n, 1, SIDE, SIDE], align_corners=False)
    out = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    place, line = torch.arange(SIDE), uniform(0.5, 1)[:, None, None]
    x, y = uniform(-10, SIDE)[:, None], uniform(-10, SIDE)[:, None]  # the corner of a hole of 8×8
    inside_x, inside_y = (place >= x) & (place < x + 8), (place >= y) & (place < y + 8)
    out = out * line * ~(inside_y[:, :, None] & inside_x[:, None, :])
    noise = torch.randn(out.shape, generator=generator) * uniform(0, 0.15)[:, None, None]
    return (out + noise).clamp_(0, 1)


def _padded(images: np.ndarray) -> Tensor:
    """Return square images of at most 32 pixels in the middle of 32×32."""
    margin = (SIDE - images.shape[-1]) // 2
    return F.pad(torch.from_numpy(np.ascontiguousarray(images)), (margin,) * 4)


def _mnist(sources: Path) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for digit in range(10):
        text = (sources / "mnist" / "src" / "digits" / f"{digit}.json").read_text()
        pixels = np.array(json.loads(text)["data"], dtype=np.float64).reshape(-1, 28, 28)
        images.append((pixels * 255).round().astype(np.uint8))
        labels += [digit] * len(pixels)
    return _padded(np.concatenate(images)), torch.tensor(labels)


def _silhouettes(sources: Path) -> tuple[Tensor, Tensor]:
    """Slice the arrays' bytes out of the pickles, which are never unpickled."""
    (wheel,) = sources.glob("animal_mnist-*.whl")
    arrays = []
    with zipfile.ZipFile(wheel) as archive:
        for kind, head in (("data", b"B\x00\xa1w\x00"), ("label", b"B\x808\x01\x00")):
            name = f"animal_mnist/data/Animal_MNIST/animal_{kind}_version_3.gz"
            raw = gzip.decompress(archive.read(name))
            start = raw.index(head) + 5  # BINBYTES and its little-endian length
            arrays.append(raw[start : start + int.from_bytes(head[1:], "little")])
    images = np.frombuffer(arrays[0], np.uint8).reshape(-1, 28, 28)
    labels = np.frombuffer(arrays[1], "<i8").copy()
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first.sort()
    return _padded(images[first]), torch.from_numpy(labels[first])


def _digits(_: Path) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # pyright: ignore

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float() * (255 / 16)
    large = F.interpolate(small, scale_factor=3, mode="bilinear")[:, 0].round().byte()
    return _padded(large.numpy()), torch.from_numpy(labels)


def _real_task(task: str, sources: Path) -> dict[str, Tensor]:
    read = {"mnist": _mnist, "silhouettes": _silhouettes, "digits": _digits}[task]
    images, labels = read(sources)
    order = torch.randperm(len(labels), generator=seeded(task))
    shares = {"train": 0.55, "validation": 0.1, "test": 0.35}
    sizes = {k: min(v, int(len(labels) * shares[k])) for k, v in SIZES.items()}
    tensors, start = {}, 0
    for split, size in sizes.items():
        chosen = order[start : start + size]
        tensors[f"{split}_images"], tensors[f"{split}_labels"] = images[chosen], labels[chosen]
        start += size
    return tensors


def _labels(script: str, rows: Tensor) -> Tensor:
    """Return the label of each glyph of a task, dense from 0."""
    if script == "style":
        return rows[:, 2].long()
    if script == "hangul":
        table = [(ord(c) - 0xAC00) // 588 for c in SCRIPTS[script]]  # the initial consonant
    elif script == "accents":
        marks = [unicodedata.normalize("NFD", c)[1] for c in SCRIPTS[script]]
        table = [MARKS.index(m) for m in marks]
    else:
        return rows[:, 1].long()
    return torch.unique(torch.tensor(table)[rows[:, 1].long()], return_inverse=True)[1]


def _balanced(labels: Tensor, groups: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return indices drawn with replacement: a label, then a font family, then a glyph."""
    pair = torch.stack([labels, groups], 1)
    _, cell, count = torch.unique(pair, dim=0, return_inverse=True, return_counts=True)
    families = torch.zeros(int(labels.max()) + 1)
    families.index_add_(0, labels, 1 / count[cell].float())
    weight = 1 / (families[labels] * count[cell])
    return torch.multinomial(weight, size, replacement=True, generator=generator)


def _glyph_task(task: str, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
    mine = rows[:, 0] == list(SCRIPTS).index(task)
    images, rows = images[mine], rows[mine]
    labels, tensors = _labels(task, rows), {}
    for number, (split, size) in enumerate(SIZES.items()):
        here, generator = (rows[:, 4] == number).nonzero()[:, 0], seeded(task, split)
        chosen = here[_balanced(labels[here], rows[here, 3], size, generator)]
        pictures = distort(images[chosen].float() / 255, generator)
        tensors[f"{split}_images"] = (pictures * 255).round().byte()
        tensors[f"{split}_labels"] = labels[chosen]
    return tensors


def _pretraining(images: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Return the clean glyphs of the pre-training scripts in fonts of train, and of validation."""
    scripts = torch.tensor([list(SCRIPTS).index(s) for s in PRETRAINING])
    mine = torch.isin(rows[:, 0], scripts)
    images, rows = images[mine], rows[mine]
    train = rows[:, 4] == list(SPLITS).index("train")
    codes = rows[:, 0] * 1000 + rows[:, 1]
    classes, labels = torch.unique(codes[train], return_inverse=True)
    later = (rows[:, 4] == list(SPLITS).index("validation")) & torch.isin(codes, classes)
    return {
        "train_images": images[train],
        "train_labels": labels,
        "train_groups": rows[train, 3],
        "validation_images": images[later],
        "validation_labels": torch.searchsorted(classes, codes[later]),
    }


def build(work: Path) -> None:
    """Fetch, render and write what is missing."""
    wanted = [work / "data" / f"{task}.safetensors" for task in TASKS]
    if all(p.exists() for p in [*wanted, work / "pretraining.safetensors"]):
        return
    sources = fetch(work)
    cache = work / "glyphs.safetensors"
    if not cache.exists():
        drawn = render(sources / "fonts")
        write({k: torch.from_numpy(drawn[k]) for k in ("images", "rows")}, cache)
    glyphs = load_file(cache)
    images, rows = glyphs["images"], glyphs["rows"]
    for task, path in zip(TASKS, wanted, strict=True):
        if not path.exists():
            real = task in REAL
            write(_real_task(task, sources) if real else _glyph_task(task, images, rows), path)
    write(_pretraining(images, rows), work / "pretraining.safetensors")


def load_task(work: Path, task: str) -> dict[str, Tensor]:
    """Return the six tensors of a task."""
    return load_file(work / "data" / f"{task}.safetensors")


def classes(work: Path, task: str) -> int:
    """Return the number of classes of a task."""
    with safe_open(work / "data" / f"{task}.safetensors", "pt") as file:
        return int(file.get_tensor("train_labels").max()) + 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    build(parser.parse_args().work)
