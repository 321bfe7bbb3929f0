"""The same recipes timed by mergekit and by this package, on the checkpoints of `merge_llm.py`.

    python benchmarks/mergekit_parity/speed.py FOLDER [--repeats 3] [-o results.json]
    python benchmarks/mergekit_parity/speed.py FOLDER --tensors 2000 4000 8000 [--repeats 1]

Run in an environment that has both. The two run in turns, interpreter start included. What counts
is the median ratio of a pair, of wall-clock and of processor time; on a busy machine the latter.
With `--tensors` the checkpoints have so many small tensors (hidden 64, twelve a layer): what a
tensor costs besides its numbers, which the last column has, by the difference to the line above.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMALL = {"HIDDEN": 64, "INTER": 128, "HEADS": 4, "KV_HEADS": 2, "VOCABULARY": 512}
LAYER = 12  # tensors
RECIPES = {
    "linear": """\
models:
  - {model: M/a, parameters: {weight: 0.4}}
  - {model: M/b, parameters: {weight: 0.3}}
  - {model: M/c, parameters: {weight: 0.2}}
  - {model: M/d, parameters: {weight: 0.1}}
merge_method: linear
dtype: bfloat16
""",
    "task_arithmetic": """\
models:
  - {model: M/a, parameters: {weight: 0.4}}
  - {model: M/b, parameters: {weight: 0.3}}
  - {model: M/c, parameters: {weight: 0.2}}
  - {model: M/d, parameters: {weight: 0.1}}
merge_method: task_arithmetic
base_model: M/base
dtype: bfloat16
""",
    "ties": """\
models:
  - {model: M/a, parameters: {weight: 1.0, density: 0.2}}
  - {model: M/b, parameters: {weight: 1.0, density: 0.2}}
  - {model: M/c, parameters: {weight: 1.0, density: 0.2}}
  - {model: M/d, parameters: {weight: 1.0, density: 0.2}}
merge_method: ties
base_model: M/base
dtype: bfloat16
""",
    "slerp": """\
slices:
  - sources:
      - {model: M/a, layer_range: [0, 24]}
      - {model: M/b, layer_range: [0, 24]}
merge_method: slerp
base_model: M/a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: bfloat16
""",
}


def run(words: list[str], output: Path) -> dict[str, float]:
    """Return seconds of wall clock and processor, and peak resident bytes, of one process."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{message.decode()[-2000:]}")
    return {
        "wall": wall,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024.0,
    }


def pairs(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Return medians and ratios of one recipe."""
    recipe = folder / f"{name}.yml"
    recipe.write_text(RECIPES[name].replace("M/", f"{folder}/"))
    output = folder / "out"
    scripts = Path(sys.executable).parent
    commands = {
        "ours": [str(scripts / "eutectic"), "merge", str(recipe), "-o", str(output)],
        "mergekit": [str(scripts / "mergekit-yaml"), str(recipe), str(output), "--quiet"],
    }
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in commands}
    for number in range(repeats):
        for who in sorted(commands, reverse=bool(number % 2)):
            runs[who].append(run(commands[who], output))
    shutil.rmtree(output, ignore_errors=True)
    found: dict[str, Any] = {"recipe": name, "pairs": repeats}
    for what in ("wall", "processor"):
        both = zip(runs["ours"], runs["mergekit"], strict=True)
        found[f"{what}_ratio"] = statistics.median(a[what] / b[what] for a, b in both)
        found[what] = {w: statistics.median(r[what] for r in own) for w, own in runs.items()}
    found["peak"] = {w: max(r["peak"] for r in own) for w, own in runs.items()}
    return found


def build_small(folder: Path, tensors: int) -> None:
    """Write base and experts of many small tensors, unless they are there."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    merge_llm = importlib.import_module("merge_llm")
    for name, value in {**SMALL, "LAYERS": tensors // LAYER}.items():
        setattr(merge_llm, name, value)
    merge_llm.build(folder)


def small(given: argparse.Namespace, folder: Path, name: str) -> list[dict[str, Any]]:
    """Time one recipe on checkpoints of many small tensors, and print a line for each."""
    results: list[dict[str, Any]] = []
    for count in given.tensors:
        own = folder / f"small-{count}"
        words = [sys.executable, __file__, str(own), "--build-small", str(count)]
        subprocess.run(words, check=True)
        row = {**pairs(name, own, given.repeats), "tensors": count}
        before = results[-1] if results else None
        results.append(row)
        cells = [name, f"{count}", f"{row['wall_ratio']:.2f}", f"{row['processor_ratio']:.2f}"]
        for who in ("ours", "mergekit"):
            cells += [f"{row['processor'][who]:.1f}", f"{row['peak'][who] / 1e9:.2f} GB"]
        if before is not None:
            took = row["processor"]["ours"] - before["processor"]["ours"]
            row["milliseconds_a_tensor"] = 1e3 * took / (count - before["tensors"])
        cells.append(f"{row['milliseconds_a_tensor']:.2f} ms" if before else "")
        print(f"| {' | '.join(cells)} |", flush=True)
    return results


def main() -> None:
    """Time every recipe and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-k", default="", help="only recipes whose name has this part")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tensors", type=int, nargs="*", help="numbers of small tensors")
    parser.add_argument("--build-small", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.absolute()
    if given.build_small:
        build_small(folder, given.build_small)
        return
    chosen = [n for n in RECIPES if given.k in n]
    if given.tensors:
        print("| recipe | tensors | time | processor time | ours | peak | mergekit | peak | each |")
        print("|---|---|---|---|---|---|---|---|---|")
        found = [row for name in chosen for row in small(given, folder, name)]
        if given.output:
            given.output.write_text(json.dumps(found, indent=1) + "\n")
        return
    builder = Path(__file__).parents[1] / "merge_llm.py"
    subprocess.run(
        [sys.executable, str(builder), "--folder", str(folder), "--build-only"], check=True
    )
    print("| recipe | time | processor time | seconds | mergekit's | peak | mergekit's |")
    print("|---|---|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    for name in chosen:
        row = pairs(name, folder, given.repeats)
        results.append(row)
        peak = {who: f"{size / 1e9:.2f} GB" for who, size in row["peak"].items()}
        cells = [row["recipe"], f"{row['wall_ratio']:.2f}", f"{row['processor_ratio']:.2f}"]
        cells += [f"{row['wall'][who]:.1f}" for who in ("ours", "mergekit")]
        print(f"| {' | '.join([*cells, peak['ours'], peak['mergekit']])} |", flush=True)
    if given.output:
        given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
