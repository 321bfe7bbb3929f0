"""Write tasks as folders of PNG files with a file of tasks, for `eutectic evaluate` and `collect`.

    python benchmarks/glyphs/export.py --work DIR [--task mnist …] [--count 1000]

`DIR/images/<task>/<split>/<class>/<number>.png`, with proxy images drawn from train, and
`DIR/images/tasks.yaml`, whose tasks use the suite's frozen heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from PIL import Image

from data import TASKS, load_task, seeded

SPLITS = {"proxy": "train", "validation": "validation", "test": "test"}
PROXIES = 128


def export(work: Path, task: str, count: int) -> dict:
    """Write the images of a task; return its description for the file of tasks."""
    tensors, folder = load_task(work, task), work / "images" / task
    for split, source in SPLITS.items():
        labels = tensors[f"{source}_labels"]
        size = PROXIES if split == "proxy" else count
        chosen = torch.randperm(len(labels), generator=seeded(task, "export", split))[:size]
        for index in sorted(chosen.tolist()):
            target = folder / split / f"{int(labels[index]):02d}" / f"{index:05d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tensors[f"{source}_images"][index].numpy()).save(target)
    return {
        "kind": "image-classification",
        "data": {split: f"{task}/{split}" for split in SPLITS},
        "head": f"../heads/{task}.safetensors",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--count", type=int, default=1000, help="images of validation and of test")
    arguments = parser.parse_args()
    tasks = {name: export(arguments.work, name, arguments.count) for name in arguments.task}
    file = arguments.work / "images" / "tasks.yaml"
    file.write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False))
    print(f"written {file}")
