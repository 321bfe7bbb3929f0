"""A suite from nothing to its table: data, base, experts, statistics, merges, accuracies.

    python benchmarks/run.py text --work DIR --regime hard --tasks 8
    python benchmarks/run.py glyphs --work DIR --tasks 8 --seeds 3

Every step is resumable, so the same command continues a killed run and repeats nothing. Options
that are not named below go to `table/run.py`; by default every row is measured on one proxy sample
and 500 test examples a task (`--test-texts 1000` for all that a text task has), except MaTS at a
hundred steps, which takes as long as all the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from table.merging import ROWS


def python(script: str, *words: str) -> list[str]:
    """Return the command that runs a script of this folder."""
    return [sys.executable, str(HERE / script), *words]


def make_texts(work: Path, regime: str, tasks: int) -> None:
    """Train the experts of the text suite, in two processes where there are two cores."""
    sys.path[:0] = [str(HERE / "text")]
    from sources import SIX, TASKS

    names = SIX if tasks == len(SIX) else tuple(TASKS)[:tasks]
    count = min(2, os.cpu_count() or 1)
    running = []
    for first in range(count):
        own = [word for name in names[first::count] for word in ("--task", name)]
        words = ("--work", str(work), "--regime", regime, *own)
        running.append(subprocess.Popen(python("text/experts.py", *words)))
    if any([process.wait() for process in running]):
        raise SystemExit("Not every expert was made; the same command continues.")


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=["text", "glyphs"])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--regime", default="hard", help="of texts: kind, hard or lora")
    parser.add_argument("--tasks", type=int, default=8, help="the first so many")
    arguments, others = parser.parse_known_args()
    if arguments.suite == "text":
        make_texts(arguments.work, arguments.regime, arguments.tasks)
    else:
        subprocess.run(python("glyphs/run.py", "--work", str(arguments.work)), check=True)
    words = [arguments.suite, "--work", str(arguments.work), "--regime", arguments.regime]
    words += ["--tasks", str(arguments.tasks)]
    if "--seeds" not in others:
        others += ["--seeds", "1"]
    if "--test-texts" not in others:
        others += ["--test-texts", "500"]
    if "--rows" not in others:
        others += ["--rows", *(name for name in ROWS if not name.endswith("_100")), "routed"]
    raise SystemExit(
        subprocess.run(python("table/run.py", *words, *others), check=False).returncode
    )


if __name__ == "__main__":
    main()
