"""Make the tasks: uint8 pictures [N, 3, 64, 64] and labels, as safetensors.

    python benchmarks/emoji/data.py --work DIR [--task hands …]

`DIR/data/<task>.safetensors` holds `train_images`, `train_labels`, `validation_…`, `test_…`. No
picture is in two splits: those of a task of kinds are of other emoji in every split, those of a
task of names are Google's for training and Twitter's else. All are distorted (turned, scaled,
moved, on backgrounds of two colours, lighter or darker, with noise), seeded by task and split.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fetch import LIST, STYLES, package
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from table.drawings import seeded, write

SIDE = 64  # as in the packages
SIZES = {"train": 2000, "validation": 200, "test": 600}
SHARES = {"train": 0.55, "validation": 0.12}  # of the emoji of each label; the rest is test
LEAST = 6  # pictures, or emoji, of a label
NAMED = ("hands", "roles", "smileys", "flags")
KINDS = {
    "symbols": "Symbols",
    "nature": "Animals & Nature",
    "travel": "Travel & Places",
    "objects": "Objects",
    "food": "Food & Drink",  # last, since its expert is no better than the base
}
TASKS = (*NAMED, *KINDS)
PEOPLE = ("person-role", "person-activity", "person-sport", "person-fantasy", "person-gesture")
GENDERS = ("2640", "2642", "1F469", "1F468", "1F9D1")  # signs, woman, man, person


@dataclass(frozen=True)
class Picture:
    """One picture of a task.

    Attributes:
        style: whose drawing it is.
        file: its name in the package.
        label: what is asked for.
        group: what stays in one split.
    """

    style: str
    file: str
    label: str
    group: str


def drawings(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an emoji in no and in every tone of skin; pairs of two tones are left out."""
    toned = entry.get("skin_variations", {})
    return [entry, *(own for tone, own in toned.items() if "-" not in tone)]


def without_gender(unified: str) -> str:
    """Return what of an emoji's code tells no gender."""
    parts = unified.split("-")
    return "-".join(p for p in parts if p not in GENDERS and p not in ("FE0F", "200D"))


def label_of(entry: dict[str, Any], task: str) -> str:
    """Return an emoji's label, empty where the task has no part in it."""
    name, kind = entry["short_name"], entry["subcategory"]
    if task in KINDS:
        return kind if entry["category"] == KINDS[task] else ""
    if task == "hands":
        mine = kind.startswith("hand") and "skin_variations" in entry
    elif task == "roles":
        mine = kind in PEOPLE and "skin_variations" in entry
        name = without_gender(entry["unified"])  # nothing is left of a person without a role
    elif task == "smileys":
        mine = kind.startswith(("face-", "cat-"))
    else:
        mine = kind == "country-flag"
    return name if mine else ""


def pictures_of(emoji: Sequence[dict[str, Any]], task: str) -> list[Picture]:
    """Return a task's pictures; labels of fewer than `LEAST` emoji are left out of kinds."""
    found: list[Picture] = []
    for entry in emoji:
        label = label_of(entry, task)
        if not label:
            continue
        for own in drawings(entry):
            found += [
                Picture(style, own["image"], label, entry["short_name"])
                for style in STYLES
                if own[f"has_img_{style}"]
            ]
    if task in NAMED:
        return found
    emoji_of = {picture.label: set[str]() for picture in found}
    for picture in found:
        emoji_of[picture.label].add(picture.group)
    return [picture for picture in found if len(emoji_of[picture.label]) >= LEAST]


def splits_of(pictures: Sequence[Picture], task: str) -> dict[str, list[Picture]]:
    """Return the pictures of every split; all labels are in train, and none of its pictures else.

    Tasks of names: Google's pictures, then a share of Twitter's, then the rest. All others: emoji
    by emoji, of every label the same shares.
    """
    generator = seeded("split", task)

    def shuffled(own: Iterable[str]) -> list[str]:
        names = sorted(set(own))
        return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]

    if task in NAMED:
        seen, other = ([p for p in pictures if p.style == style] for style in STYLES)
        labels = {p.label for p in seen} & {p.label for p in other}
        files = shuffled(p.file for p in other)
        early = set(files[: round(len(files) * SHARES["validation"] / (1 - SHARES["train"]))])
        kept = [p for p in other if p.label in labels]
        return {
            "train": [p for p in seen if p.label in labels],
            "validation": [p for p in kept if p.file in early],
            "test": [p for p in kept if p.file not in early],
        }
    place: dict[str, str] = {}
    for label in sorted({p.label for p in pictures}):
        groups = shuffled(p.group for p in pictures if p.label == label)
        first = max(round(len(groups) * SHARES["train"]), 1)
        second = first + max(round(len(groups) * SHARES["validation"]), 1)
        for index, group in enumerate(groups):
            place[group] = "train" if index < first else "validation" if index < second else "test"
    found = {split: [p for p in pictures if place[p.group] == split] for split in SIZES}
    labels = {p.label for p in found["train"]}
    return {split: [p for p in own if p.label in labels] for split, own in found.items()}


def balanced(pictures: Sequence[Picture], size: int, generator: torch.Generator) -> list[int]:
    """Return indices drawn with replacement: a label, then a group, then a picture."""
    cells = Counter((p.label, p.group) for p in pictures)
    groups = Counter(label for label, _ in cells)
    weights = [1 / (groups[p.label] * cells[p.label, p.group]) for p in pictures]
    drawn = torch.multinomial(torch.tensor(weights), size, replacement=True, generator=generator)
    return drawn.tolist()


def distort(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return uint8 `[n, 3, 64, 64]` of pictures `[n, 4, h, w]`, alpha last, in [0, 1]."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=generator)

    turn, size = uniform(-0.2, 0.2), torch.exp(uniform(0.0, 0.3))
    cos, sin = torch.cos(turn) * size, torch.sin(turn) * size
    top = torch.stack([cos, -sin, uniform(-0.15, 0.15)], 1)
    bottom = torch.stack([sin, cos, uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), [n, 4, SIDE, SIDE], align_corners=False)
    alpha = pictures[:, 3:]
    moved = F.grid_sample(torch.cat([pictures[:, :3] * alpha, alpha], 1), grid, align_corners=False)
    ground = F.interpolate(uniform(0, 1, 3, 2, 2), SIDE, mode="bilinear", align_corners=True)
    out = moved[:, :3] + (1 - moved[:, 3:]) * ground
    out = out * uniform(0.85, 1.1, 1, 1, 1)
    noise = torch.randn(out.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return ((out + noise).clamp_(0, 1) * 255).round().byte()


def drawing(content: bytes) -> Tensor:
    """Return a PNG file as `[4, h, w]` in [0, 1]."""
    import numpy as np
    from PIL import Image

    picture = np.array(Image.open(io.BytesIO(content)).convert("RGBA"))
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def build(work: Path, tasks: Sequence[str] = TASKS) -> None:
    """Fetch, draw and write what is missing."""
    missing = [task for task in tasks if not (work / "data" / f"{task}.safetensors").is_file()]
    if not missing:
        return
    files = {style: package(work, style) for style in STYLES}
    emoji = json.loads(files[STYLES[0]][LIST])
    for task in missing:
        splits = splits_of(pictures_of(emoji, task), task)
        labels = sorted({p.label for p in splits["train"]})
        tensors: dict[str, Tensor] = {}
        for split, size in SIZES.items():
            own, generator = splits[split], seeded(task, split)
            chosen = balanced(own, size, generator)
            drawn = {
                i: drawing(files[own[i].style][f"img/{own[i].style}/64/{own[i].file}"])
                for i in set(chosen)
            }
            stacked = torch.stack([drawn[i] for i in chosen])
            tensors[f"{split}_images"] = distort(stacked, generator)
            tensors[f"{split}_labels"] = torch.tensor([labels.index(own[i].label) for i in chosen])
        write(tensors, work / "data" / f"{task}.safetensors")


def load_split(work: Path, task: str, split: str) -> tuple[Tensor, Tensor]:
    """Return pictures and labels of a split."""
    with safe_open(work / "data" / f"{task}.safetensors", "pt") as file:
        return file.get_tensor(f"{split}_images"), file.get_tensor(f"{split}_labels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", action="append", choices=TASKS)
    asked = parser.parse_args()
    build(asked.work, asked.task or TASKS)
