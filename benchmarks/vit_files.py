"""Merge a ViT-B/32-shaped model, files to file, paired against the textbook SVD in the same engine.

    python benchmarks/vit_files.py --folder vit [--pairs 3] [--layers 12]

Builds a base and eight experts (88 million parameters each, float32, deterministic; power-law task
matrices), then merges them by Iso-C, Iso-CTS and TSV-M with our kernels and with plain
`torch.linalg.svd` registered as methods of the same engine, in turns and in fresh processes. Prints
medians, ratios, peak memory, and the share of thread time spent reading, computing and writing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH, LAYERS, TASKS = 768, 12, 8
METHODS = ("iso_c", "iso_cts", "tsv_m")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of OpenCLIP's ViT-B/32 image encoder."""
    table: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (50, WIDTH),
        "visual.proj": (WIDTH, 512),
        "visual.conv1.weight": (WIDTH, 3, 32, 32),
        "visual.ln_pre.weight": (WIDTH,),
        "visual.ln_pre.bias": (WIDTH,),
        "visual.ln_post.weight": (WIDTH,),
        "visual.ln_post.bias": (WIDTH,),
    }
    for layer in range(layers):
        prefix = f"visual.transformer.resblocks.{layer}."
        table[f"{prefix}attn.in_proj_weight"] = (3 * WIDTH, WIDTH)
        table[f"{prefix}attn.in_proj_bias"] = (3 * WIDTH,)
        table[f"{prefix}attn.out_proj.weight"] = (WIDTH, WIDTH)
        table[f"{prefix}mlp.c_fc.weight"] = (4 * WIDTH, WIDTH)
        table[f"{prefix}mlp.c_fc.bias"] = (4 * WIDTH,)
        table[f"{prefix}mlp.c_proj.weight"] = (WIDTH, 4 * WIDTH)
        for name in ("attn.out_proj.bias", "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias"):
            table[prefix + name] = (WIDTH,)
        table[f"{prefix}ln_2.weight"] = table[f"{prefix}ln_2.bias"] = (WIDTH,)
    return table


def build(folder: Path, layers: int) -> None:
    """Write the base and the experts, unless they are there."""
    for number in range(TASKS + 1):
        target = folder / ("base" if number == 0 else f"e{number}")
        if (target / "model.safetensors").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
        tensors = {}
        for key, shape in shapes(layers).items():
            value = 0.03 * torch.randn(shape, generator=base)
            if number:
                delta = torch.randn(shape, generator=own)
                if len(shape) == 2:  # columns of falling scale: a power-law spectrum
                    delta *= torch.arange(1, shape[1] + 1) ** -0.7
                value += 0.003 * delta
            tensors[key] = value
        save_file(tensors, target / "model.safetensors", {"format": "pt"})


def register_textbook() -> None:
    """Register `torch.linalg.svd` versions of the methods, as their papers print them."""
    from eutectic.methods.registry import Context, Cost, Parameters, always, register

    def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return torch.linalg.svd(x, full_matrices=False)
        except torch.linalg.LinAlgError:
            # LAPACK gives up on some of the projected matrices of Iso-CTS in float32.
            u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
            return u.float(), s.float(), vh.float()

    def polar(x: Tensor) -> Tensor:
        u, _, vh = svd(x)
        return u @ vh

    def iso_c(deltas: Tensor, parameters: Parameters, context: Context) -> Tensor:
        u, s, vh = svd(deltas.sum(0))
        return s.mean() * (u @ vh)

    def iso_cts(deltas: Tensor, parameters: Parameters, context: Context) -> Tensor:
        count, rank = len(deltas), min(deltas.shape[1:])
        each = round((rank - int(rank * 0.8)) / count)
        common = rank - each * count
        u, s, vh = (x for x in svd(deltas.sum(0)))
        u, s, vh = u[:, :common], s[:common], vh[:common]
        left, values, right = [], [], []
        for delta in deltas:
            a, b, c = svd(delta - u @ (u.T @ delta))
            left.append(a[:, :each])
            values.append(b[:each])
            right.append(c[:each])
        spectrum = torch.cat([*values, s])
        return spectrum.mean() * polar(torch.cat([*left, u], 1)) @ polar(torch.cat([*right, vh]))

    def tsv_m(deltas: Tensor, parameters: Parameters, context: Context) -> Tensor:
        each = min(deltas.shape[1:]) // len(deltas)
        parts = [svd(delta) for delta in deltas]
        left = polar(torch.cat([u[:, :each] for u, _, _ in parts], 1))
        right = polar(torch.cat([vh[:each] for _, _, vh in parts]))
        return (left * torch.cat([s[:each] for _, s, _ in parts])) @ right

    for function in (iso_c, iso_cts, tsv_m):
        name = f"textbook_{function.__name__}"
        register(name, summary="full SVD", cost=Cost(workspace=always(4.0)))(function)


def one_run(folder: Path, method: str, threads: int) -> None:
    """Merge once in this process and print seconds, peak bytes and time shares as JSON."""
    from eutectic.checkpoint.reader import CheckpointReader
    from eutectic.checkpoint.writer import CheckpointWriter
    from eutectic.execution import merge

    spent: dict[str, float] = defaultdict(float)

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    CheckpointReader.read = timed(CheckpointReader.read, "reading")  # type: ignore[method-assign]
    CheckpointWriter.write = timed(CheckpointWriter.write, "writing")  # type: ignore[method-assign]
    register_textbook()
    output = folder / "out" / method
    shutil.rmtree(output, ignore_errors=True)
    experts = {f"e{t}": str(folder / f"e{t}") for t in range(1, TASKS + 1)}
    report = merge(
        base=str(folder / "base"),
        experts=experts,
        method=method,
        parameters={"support": "full"} if method in ("iso_c", "iso_cts") else {},  # as theirs
        scale=1.0,
        restart=True,
        output=output,
        threads=threads,
    )
    total = report.seconds * threads
    shares = {name: seconds / total for name, seconds in spent.items()}
    shares["computing"] = 1 - sum(shares.values())
    result = {"seconds": report.seconds, "peak_bytes": report.peak_bytes, "shares": shares}
    sys.stdout.write(json.dumps(result) + "\n")


def spawn(folder: Path, method: str, threads: int) -> dict[str, Any]:
    """Run `one_run` in a fresh process."""
    words = [sys.executable, __file__, "--folder", str(folder), "--run", method]
    words += ["--threads", str(threads)]
    done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{method}: its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def difference(folder: Path, method: str) -> float:
    """Return the relative distance between the matrices merged by ours and by the textbook."""
    total = reference = 0.0
    files = [folder / "base", folder / "out" / method, folder / "out" / f"textbook_{method}"]
    base, ours, textbook = (load_file(path / "model.safetensors") for path in files)
    for name, start in base.items():
        if start.ndim == 2:
            total += float((ours[name] - textbook[name]).double().square().sum())
            reference += float((textbook[name] - start).double().square().sum())
    return (total / reference) ** 0.5


def main() -> None:
    """Build, run in turns, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models (4 GB)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        one_run(arguments.folder, arguments.run, arguments.threads)
        return
    # Models of another depth are another folder: what is there is used again.
    folder = arguments.folder / f"layers-{arguments.layers}"
    build(folder, arguments.layers)
    print(
        "| method | ours s | textbook s | textbook / ours | peak | read / compute / write "
        "| difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for method in arguments.methods:
        pairs = [
            (
                spawn(folder, method, arguments.threads),
                spawn(folder, f"textbook_{method}", arguments.threads),
            )
            for _ in range(arguments.pairs)
        ]
        ratios = sorted(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs)
        shares = pairs[0][0]["shares"]
        cells = [
            method,
            f"{statistics.median(o['seconds'] for o, _ in pairs):.1f}",
            f"{statistics.median(t['seconds'] for _, t in pairs):.1f}",
            f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f})",
            f"{max(o['peak_bytes'] for o, _ in pairs) / 1e9:.2f} GB",
            " / ".join(f"{100 * shares[k]:.0f} %" for k in ("reading", "computing", "writing")),
            f"{difference(folder, method):.0e}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
