"""What Iso-A costs over Iso-C, from files to files: CPU time of whole commands, in pairs.

    python benchmarks/iso_a_cost.py --base BASE [--pairs 3] [--set KEY=VALUE …]
        NAME=EXPERT,STATISTICS …

Every expert is a folder and a statistics file (`benchmarks/low_rank.py` leaves both under its
`--work`). Each pair is Iso-C, Iso-A, Iso-A, Iso-C, each in a process of its own, so that a busy
machine troubles both; imports and planning count. The median of the ratios and their range.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COMMAND = "from eutectic.cli.main import main; main()"


def cpu_seconds(recipe: dict[str, Any]) -> float:
    """Return user and system time of `eutectic merge`, imports included."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(json.dumps(recipe), "utf-8")
        words = ["merge", str(path), "-o", str(Path(folder) / "out"), "--threads", "2"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experts", nargs="+", metavar="NAME=EXPERT,STATISTICS")
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    with_statistics: dict[str, dict[str, str]] = {}
    for word in options.experts:
        name, _, rest = word.partition("=")
        folder, _, file = rest.rpartition(",")
        paths = {"path": folder, "statistics": file}
        with_statistics[name] = {key: str(Path(path).resolve()) for key, path in paths.items()}
    plain = {name: {"path": own["path"]} for name, own in with_statistics.items()}
    shared = {"base": str(Path(options.base).resolve()), "scale": 1.0}
    values = {key: json.loads(value) for key, _, value in (s.partition("=") for s in options.set)}
    cheap = {**shared, "experts": plain, "method": "iso_c"}
    dear = {**shared, "experts": with_statistics, "method": "iso_a", "parameters": values}
    ratios: list[float] = []
    for _ in range(options.pairs):
        first, *middle, last = (cpu_seconds(r) for r in (cheap, dear, dear, cheap))
        ratios += [middle[0] / first, middle[1] / last]
        print(f"iso_c {first:.2f} s, iso_a {middle[0]:.2f} s, {middle[1]:.2f} s, iso_c {last:.2f}")
    print(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
