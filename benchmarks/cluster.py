"""Merges on a Ray cluster of three nodes on this machine, against one process with as many cores.

    python benchmarks/merge_llm.py --folder /tmp/llm --build-only
    python benchmarks/cluster.py --folder /tmp/llm --output benchmarks/results/cluster.json

The checkpoints are those of `merge_llm.py` (390 million parameters, four experts, bfloat16). The
head node has no core for tasks, the others share the machine's. Threads and Ray take turns, in this
process, and the bytes are compared. Then a node is killed in the middle, a driver is killed and
taken up by threads, and Ray's own guard of memory ends a worker.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

EXPERTS = ("a", "b", "c", "d")
METHODS = ("task_arithmetic", "ties", "iso_c", "esm")
NODE_MEMORY = 4_000_000_000


def nothing(number: int) -> int:
    """Do nothing: what a call costs."""
    return number


def fill(size: int) -> int:
    """Take memory and keep it."""
    held = bytearray(os.urandom(1 << 20)) * (size >> 20)
    time.sleep(30)
    return len(held)


def digest(folder: Path) -> str:
    """Return a hash of all weights in a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                found.update(block)
    return found.hexdigest()


def request(folder: Path, method: str) -> dict[str, Any]:
    """Return a merge's recipe."""
    experts: dict[str, Any] = {name: {"path": str(folder / name)} for name in EXPERTS}
    if method == "esm":
        for name, own in experts.items():
            own["statistics"] = str(folder / f"{name}.stats.safetensors")
    return {"base": str(folder / "base"), "experts": experts, "method": method, "scale": 1.0}


def draw_statistics(folder: Path) -> None:
    """Write statistics of rank 64 of every expert, drawn at random, where they are missing."""
    from llama_width import write_statistics
    from safetensors import safe_open

    for seed, name in enumerate(EXPERTS):
        path = folder / f"{name}.stats.safetensors"
        if path.is_file():
            continue
        shapes: dict[str, tuple[int, int]] = {}
        for part in (folder / name).glob("*.safetensors"):
            with safe_open(part, "pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            shapes |= {key: own for key, own in found.items() if key.endswith("proj.weight")}
        write_statistics(path, shapes, seed)


def merged(recipe: dict[str, Any], output: Path, **options: Any) -> tuple[float, str]:
    """Return the seconds of a merge, and the hash of its weights."""
    import eutectic

    for folder in (output, output.with_name(f"{output.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    eutectic.merge(recipe, output=output, **options)
    return time.perf_counter() - began, digest(output)


def overhead(calls: int) -> float:
    """Return the seconds that a call costs beside its work, one after the other."""
    from eutectic.cluster.spread import Bounds, Call, spread

    asked = [Call(str(n), nothing, n, 1_000_000) for n in range(calls)]
    list(spread(asked[:8], Bounds(2, 1 << 40)))  # workers are there
    began = time.perf_counter()
    list(spread(asked, Bounds(1, 1 << 40)))
    return (time.perf_counter() - began) / calls


def paired(folder: Path, work: Path, methods: list[str], repeats: int, cores: int, address: str):
    """Yield a row per method: seconds of both, their ratio, and whether the bytes are the same."""
    where = {"executor": "ray", "ray_address": address}
    warm = request(folder, "task_arithmetic")
    merged(warm, work / "ray", **where)  # workers have imported what they need
    for method in methods:
        recipe = request(folder, method)
        times: list[tuple[float, float]] = []
        same = True
        for turn in range(repeats):
            took: dict[str, tuple[float, str]] = {}
            for kind in ("threads", "ray") if turn % 2 == 0 else ("ray", "threads"):
                own = where if kind == "ray" else {}
                took[kind] = merged(recipe, work / kind, threads=cores, **own)
                print(f"{method}, {kind}: {took[kind][0]:.1f} s", flush=True)
            (alone, first), (spread, second) = took["threads"], took["ray"]
            times.append((alone, spread))
            same = same and first == second
        yield {
            "method": method,
            "threads_seconds": statistics.median(t for t, _ in times),
            "ray_seconds": statistics.median(r for _, r in times),
            "ratio": statistics.median(r / t for t, r in times),
            "ratios": [r / t for t, r in times],
            "load": os.getloadavg()[1],  # mean number of processes that wanted a core, 5 minutes
            "same_bytes": same,
            "digest": first,
        }


def node_killed(cluster: Any, node: Any, recipe: Any, work: Path, address: str) -> dict[str, Any]:
    """Kill a node after the fifth tensor of a merge."""
    from eutectic.execution import ray_executor

    lost: list[str] = []
    seen: list[str] = []
    spread = ray_executor.spread
    ray_executor.spread = lambda calls, bounds: spread(  # type: ignore[assignment]
        calls, bounds, lambda _, why: lost.append(why)
    )

    def progress(done: float, total: float, tensor: str) -> None:
        seen.append(tensor)
        if len(seen) == 5:
            for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children():
                process.kill()
            cluster.remove_node(node, allow_graceful=False)

    try:
        seconds, found = merged(
            recipe, work / "killed", progress=progress, executor="ray", ray_address=address
        )
    finally:
        ray_executor.spread = spread
    return {"seconds": seconds, "calls_done_again": len(lost), "why": lost, "digest": found}


DRIVER = """
import json, os, signal, sys
import eutectic
seen = []
def progress(*_):
    seen.append(1)
    if len(seen) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
eutectic.merge(json.loads(sys.argv[1]), output=sys.argv[2], progress=progress, executor="ray",
               ray_address=sys.argv[3])
"""


def driver_killed(recipe: Any, work: Path, address: str) -> dict[str, Any]:
    """Kill the process that keeps the journal after 40 tensors; threads go on."""
    import eutectic

    output = work / "driver"
    for folder in (output, work / "driver.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    words = [sys.executable, "-c", DRIVER, json.dumps(recipe), str(output), address]
    code = subprocess.run(words, stderr=subprocess.DEVNULL).returncode
    assert code == -signal.SIGKILL, code
    lines = (work / "driver.partial" / "journal.jsonl").read_text().count("\n") - 1
    report = eutectic.merge(recipe, output=output)
    return {"finished_before": lines, "resumed": report.resumed, "digest": digest(output)}


def out_of_memory() -> dict[str, Any]:
    """Let a worker take more than Ray's guard allows."""
    from eutectic.cluster.spread import Bounds, Call, spread
    from eutectic.errors import EutecticError

    asked = Call("a greedy call", fill, 3 << 30, 500_000_000)
    lost: list[str] = []
    try:
        list(spread([asked], Bounds(1, 1 << 40), lambda _, why: lost.append(why)))
    except EutecticError as error:
        return {"lost": lost, "told": str(error)}
    return {"lost": lost, "told": "it lived"}


def start(cores: int, threshold: float | None = None) -> tuple[Any, list[Any], str]:
    """Start three nodes, of which two share the cores."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # else whatever else runs goes before the workers
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), here])
    if threshold is not None:
        os.environ["RAY_memory_usage_threshold"] = f"{threshold:.3f}"
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="eu-", dir="/tmp")
    own = {"memory": NODE_MEMORY, "object_store_memory": 80_000_000}
    head = {**own, "num_cpus": 0, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    shares = [cores // 2, cores - cores // 2]
    nodes = [cluster.add_node(wait=False, num_cpus=share, **own) for share in shares]
    cluster.wait_for_nodes()
    return cluster, nodes, folder


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of merge_llm.py's models")
    parser.add_argument("--work", type=Path, help="for outputs (4 GB; default: --folder)")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--skip-kills", action="store_true", help="kill neither node nor driver")
    parser.add_argument("--skip-memory", action="store_true", help="leave Ray's guard alone")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    work = (arguments.work or folder / "cluster").resolve()
    work.mkdir(parents=True, exist_ok=True)
    if "esm" in arguments.methods:
        draw_statistics(folder)
    from eutectic.cluster.connection import Share, connect, disconnect

    cores = len(os.sched_getaffinity(0))
    began = time.perf_counter()
    cluster, nodes, place = start(cores)
    connect(cluster.address, share=lambda: Share(1, 1))
    found: dict[str, Any] = {"cores": cores, "start_seconds": time.perf_counter() - began}
    try:
        found["seconds_per_call"] = overhead(300)
        found["rows"] = []
        for row in paired(
            folder, work, arguments.methods, arguments.repeats, cores, cluster.address
        ):
            print(json.dumps(row), flush=True)
            found["rows"].append(row)
        if not arguments.skip_kills:
            recipe, known = request(folder, arguments.methods[0]), found["rows"][0]["digest"]
            found["driver_killed"] = driver_killed(recipe, work, cluster.address)
            found["node_killed"] = node_killed(cluster, nodes[1], recipe, work, cluster.address)
            for name in ("driver_killed", "node_killed"):
                found[name]["same_bytes"] = found[name].pop("digest") == known
                print(name, json.dumps(found[name]), flush=True)
    finally:
        disconnect()
        cluster.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    if not arguments.skip_memory:
        memory = psutil.virtual_memory()
        cluster, nodes, place = start(
            cores, (memory.total - memory.available + (2 << 30)) / memory.total
        )
        try:
            connect(cluster.address, share=lambda: Share(1, 1))
            found["out_of_memory"] = out_of_memory()
            print("out_of_memory", json.dumps(found["out_of_memory"]), flush=True)
        finally:
            disconnect()
            cluster.shutdown()
            shutil.rmtree(place, ignore_errors=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
