"""Make the glyph suite from nothing: sources, tasks, base, heads and experts (no table).

    python benchmarks/glyphs/run.py --work DIR

Every step is resumable, so the same command continues a killed run and repeats nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from pretrain import STEPS, pretrain

from data import TASKS, build


def run(work: Path, steps: int) -> None:
    """Make everything; experts by two processes of one thread each where there are two cores."""
    build(work)
    torch.set_num_threads(1)
    pretrain(work, steps)
    script = Path(__file__).with_name("experts.py")
    command = [sys.executable, str(script), "--work", str(work)]
    count = min(2, os.cpu_count() or 1)
    running = []
    for first in range(count):
        mine = [part for task in TASKS[first::count] for part in ("--task", task)]
        running.append(subprocess.Popen([*command, *mine]))
    if any([process.wait() for process in running]):
        raise SystemExit("Not every expert was made; the same command continues.")
    rows = [json.loads((work / "experts" / t / "accuracy.json").read_text()) for t in TASKS]
    for key in ("base", "expert"):
        print(f"mean {key} {sum(row[key] for row in rows) / len(rows):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training")
    arguments = parser.parse_args()
    run(arguments.work, arguments.steps)
