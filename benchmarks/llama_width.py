"""Spectral merges of layers as wide as a Llama 3 8B's, from files to files, beside physical limits.

    python benchmarks/llama_width.py --work DIR [--methods iso_c,iso_cts,…] [--output FILE.json]
    python benchmarks/llama_width.py --work DIR --layers 1 --kinds q_proj,k_proj,gate_proj --part 2

Base and four experts of two layers (hidden 4096, inner 14336, keys and values 1024; random
bfloat16, 4.6 GB) are written once, with statistics of 64 directions and a diagonal for each expert
(spectra that fall off). Each method is a process of its own on one thread. Where only some kinds of
matrices are measured, one counts for the others of its shape, either way up. With `--part 2` all
sides are half as long, for an eighth of the work. The table has processor seconds a layer, the peak
of the process above what it took before the merge, and

- the bytes that were read and written, at the disk's measured rate;
- the floating-point operations of all products and decompositions (counted at each call of torch
  by the textbook's formula, float32 and float64 apart), at the measured rate of products: what the
  same algorithm would take if everything in it ran like a product.

Random experts are the worst case for leading directions: their spectrum has no gaps. Tables of
tokens are left out: a model has one, whatever its depth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN, INNER, KEYS, WHOLE_LAYERS = 4096, 14336, 1024, 32
EXPERTS = ("a", "b", "c", "d")
CHANGE = 0.05  # ‖Δ_t‖ as a share of ‖W₀‖
RANK, DECAY, REST, TOKENS = 64, 0.93, 0.2, 100_000  # of the statistics; a share on the diagonal
METHODS: dict[str, dict[str, Any]] = {
    "iso_c": {},
    "iso_cts": {},
    "tsv_m": {},
    "iso_a": {},
    "esm": {"preset": "roberta"},
    "regmean": {},
}
THIN = ("regmean",)  # from statistics in few rows it decomposes nothing as wide as a layer
WITH_STATISTICS = ("iso_a", "esm", "regmean")
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # see the same rows
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def matrices(layers: int, kinds: Sequence[str], part: int) -> dict[str, tuple[int, int]]:
    """Return every linear map of the model, its sides divided by `part`."""
    return {
        f"model.layers.{layer}.{name}.weight": (SHAPES[name][0] // part, SHAPES[name][1] // part)
        for layer in range(layers)
        for name in kinds
    }


def stands_for(kinds: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each kind that is measured, those of a layer that it stands for."""
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, shape in SHAPES.items():
        alike = [k for k in kinds if sorted(SHAPES[k]) == sorted(shape)]
        near = [k for k in alike if SHAPES[k] == shape]
        if not alike:
            raise SystemExit(f"{name} {shape}: no measured matrix has this shape")
        found[name if name in kinds else (near or alike)[0]].append(name)
    return found


def make(folder: Path, layers: int, kinds: Sequence[str], part: int) -> None:
    """Write base, experts and statistics, unless they are there."""
    if (folder / "done").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    shapes, hidden = matrices(layers, kinds, part), HIDDEN // part
    for number, name in enumerate(("base", *EXPERTS)):
        own = torch.Generator().manual_seed(number)
        shared = torch.Generator().manual_seed(0)
        tensors: dict[str, Tensor] = {}
        for key, (out, width) in shapes.items():
            value = torch.randn(out, width, generator=shared)
            if number:
                value.add_(torch.randn(out, width, generator=own), alpha=CHANGE)
            tensors[key] = value.mul_(width**-0.5).bfloat16()
        tensors["model.embed_tokens.weight"] = torch.randn(
            CONFIG["vocab_size"], hidden, generator=shared
        ).bfloat16()
        norms = [f"model.layers.{n}.{own}" for n in range(layers) for own in NORMS]
        for key in (*norms, "model.norm"):
            tensors[f"{key}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        config = {**CONFIG, "num_hidden_layers": layers, "hidden_size": hidden}
        config["intermediate_size"] = INNER // part
        (folder / name / "config.json").write_text(json.dumps(config))
        if number:
            write_statistics(folder / f"{name}.safetensors", shapes, number)
    (folder / "done").write_text("")


NORMS = ("input_layernorm", "post_attention_layernorm")


def write_statistics(path: Path, shapes: Mapping[str, tuple[int, int]], seed: int) -> None:
    """Write one expert's statistics, as `collect --rank 64` would."""
    from eutectic.statistics.statistics_file import FORMAT, StatisticsFile

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        owner = name.replace(part, INPUTS.get(part, part))
        owner = owner if owner in shapes else name
        entries[name] = {"count": TOKENS, "sample_count": 0, "inputs": owner, "same_as": name}
        entries[name] |= {"shape": [*shape], "parameter": [*shape], "kind": "linear"}
        if owner != name:
            continue
        rows = torch.randn(RANK, shape[1], generator=generator)
        rows *= (DECAY ** torch.arange(RANK)[:, None]) * TOKENS**0.5
        rest = torch.rand(shape[1], generator=generator) + 0.5
        rest *= REST * float(rows.square().sum()) / float(rest.sum())
        tensors |= {f"{name}/gram_factor": rows, f"{name}/gram_diagonal": rest}
    record: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": {"fingerprint": f"drawn at random, {seed}"},
        "data": {"examples": 0},
        "settings": {},
        "layers": entries,
    }
    StatisticsFile(record, tensors).save(path)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and decompositions, by dtype.

    Of an eigenproblem with vectors 9n³, of a thin QR with Q 4mn² − 4n³/3, of a Cholesky factor
    n³/3, of the inverse by it 2n³/3, of a triangular solve n²m, of a thin SVD 14mn² + 8n³
    (Golub and Van Loan).
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count one call and make it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FORMULAS:
            seen = [a for a in args if isinstance(a, Tensor)]
            dtype = str(seen[0].dtype).removeprefix("torch.")
            self.counted[dtype] += FORMULAS[name](*(tuple(t.shape) for t in seen))
        return result


def _product(a: Any, b: Any) -> float:
    return 2.0 * torch.Size(a).numel() * b[-1]


def _side(a: Any) -> tuple[int, int]:
    return max(a[-2:]), min(a[-2:])


FORMULAS: dict[str, Any] = {
    "mm": _product,
    "bmm": _product,
    "mv": lambda a, b: 2.0 * a[0] * a[1],
    "addmm": lambda c, a, b: _product(a, b),
    "addmm_": lambda c, a, b: _product(a, b),
    "baddbmm": lambda c, a, b: _product(a, b),
    "_linalg_eigh": lambda a: 9.0 * a[-1] ** 3,
    "linalg_qr": lambda a: 4.0 * _side(a)[0] * _side(a)[1] ** 2 - 4 / 3 * _side(a)[1] ** 3,
    "linalg_cholesky_ex": lambda a: a[-1] ** 3 / 3,
    "cholesky_inverse": lambda a: 2 * a[-1] ** 3 / 3,
    "cholesky_solve": lambda b, a: 2.0 * b[-1] * a[-1] ** 2,
    "linalg_solve_triangular": lambda a, b: 1.0 * a[-1] ** 2 * b[-1],
    "_linalg_svd": lambda a: 14.0 * _side(a)[0] * _side(a)[1] ** 2 + 8.0 * _side(a)[1] ** 3,
}


def product_rates() -> dict[str, float]:
    """Return the rate of products of this core, by dtype, in operations a processor second."""
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(2048, 2048, dtype=dtype)
        torch.mm(a, a)
        took: list[float] = []
        for _ in range(3):
            start = time.process_time()
            torch.mm(a, a)
            took.append(time.process_time() - start)
        rates[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / min(took)
    return rates


def disk_rates(folder: Path, size: int = 1 << 29) -> dict[str, float]:
    """Return bytes a second of one stream to and from the disk that holds the folder."""
    path = folder / "rate"
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while file.read(1 << 24):
            pass
        read = time.perf_counter() - start
    path.unlink()
    return {"read": size / read, "write": size / written}


def moved_bytes() -> dict[str, int]:
    """Return what this process has read and written by system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    table = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
    return {"read": table["rchar"], "write": table["wchar"]}


def run(method: str, folder: Path, layers: int, output: Path) -> None:
    """Merge once and print what it took."""
    import eutectic
    from eutectic.execution import matrix_merging
    from eutectic.execution.executors import peak_bytes
    from eutectic.methods import get_method

    torch.set_num_threads(1)
    get_method(method)
    counts: dict[str, dict[str, float]] = {}
    checked = matrix_merging.run_checked

    def counted(planned: Any, deltas: Any, context: Any) -> Any:
        operations, start = Operations(), time.thread_time()
        with operations:
            result = checked(planned, deltas, context)
        counts[planned.name] = {"seconds": time.thread_time() - start, **operations.counted}
        return result

    matrix_merging.run_checked = counted
    recipe: dict[str, Any] = {
        "base": str(folder / "base"),
        "experts": {name: {"path": str(folder / name)} for name in EXPERTS},
        "method": method,
        "parameters": METHODS[method],
        "scale": 1.0,
        "dtype": "bfloat16",
        "statistics_of": "any",
    }
    if method in WITH_STATISTICS:
        for name, own in recipe["experts"].items():
            own["statistics"] = str(folder / f"{name}.safetensors")
    before, moved = peak_bytes(), moved_bytes()
    started, used = time.perf_counter(), time.process_time()
    eutectic.merge(recipe, output=output, threads=1, memory="64 GB")
    took: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak": peak_bytes() - before,
        "bytes": {key: value - moved[key] for key, value in moved_bytes().items()},
        "layers": layers,
        "matrices": {
            kind: {key: sum(c.get(key, 0.0) for c in own) / layers for key in keys_of(own)}
            for kind in SHAPES
            if (own := [c for name, c in counts.items() if kind in name])
        },
    }
    print(json.dumps(took))


def keys_of(counts: list[dict[str, float]]) -> list[str]:
    """Return what was counted."""
    return sorted({key for count in counts for key in count})


def measure(
    method: str,
    folder: Path,
    layers: int,
    kinds: Sequence[str],
    part: int,
    rates: Mapping[str, Any],
) -> dict[str, Any]:
    """Merge in a process of its own and put limits beside what it took, all for one layer."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    words = [sys.executable, __file__, "--one", method, str(folder), str(layers), str(output)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(output)
    took = json.loads(done.stdout.splitlines()[-1])
    counted: dict[str, dict[str, float]] = took["matrices"]
    for own in counted.values():
        own["limit"] = sum(own.get(dtype, 0.0) / rate for dtype, rate in rates["products"].items())
    times = {kind: len(own) for kind, own in stands_for(kinds).items()}
    # Reading, writing and all else goes by the number of entries.
    entries = {kind: math.prod(SHAPES[kind]) for kind in SHAPES}
    all_of_it = sum(entries.values()) / sum(entries[kind] for kind in kinds) / layers
    within = sum(own["seconds"] for own in counted.values())
    method_seconds = sum(n * counted[kind]["seconds"] for kind, n in times.items())
    moved = {key: value * all_of_it for key, value in took["bytes"].items()}
    rest = (took["cpu_seconds"] - within * layers) * all_of_it
    layer = {
        "cpu_seconds": rest + method_seconds,
        "method_seconds": method_seconds,
        "product_limit": sum(n * counted[kind]["limit"] for kind, n in times.items()),
        "operations": sum(
            n * counted[kind].get(dtype, 0.0) for kind, n in times.items() for dtype in DTYPES
        ),
        **moved,
        "disk_limit": sum(moved[key] / rates["disk"][key] for key in moved),
    }
    layer["share"] = layer["product_limit"] / layer["cpu_seconds"]
    found = {"method": method, "layers": layers, "stands_for": stands_for(kinds), "part": part}
    found |= {"peak": took["peak"], "layer": layer, "matrices": counted, "rates": rates}
    # Decompositions go by the cube of a side; thin products, like all the rest, by its square.
    whole = method_seconds * part ** (2 if method in THIN else 3) + rest * part**2
    return found | {"whole_model_hours": whole * WHOLE_LAYERS / 3600}


DTYPES = ("float32", "float64")


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as Markdown."""
    layer = row["layer"]
    cells = [row["method"], f"{layer['cpu_seconds']:.0f} s", f"{row['peak'] / 1e9:.1f} GB"]
    cells += [f"{layer['operations'] / 1e12:.2f} T", f"{layer['product_limit']:.0f} s"]
    cells += [f"{100 * layer['share']:.0f} %", f"{(layer['read'] + layer['write']) / 1e9:.1f} GB"]
    cells += [f"{layer['disk_limit']:.1f} s", f"{60 * row['whole_model_hours']:.0f} min"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of models and outputs (6 GB)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kinds", help="matrices of a layer that are measured (all)")
    parser.add_argument("--part", type=int, default=1, help="divides all sides")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--output", type=Path, help="JSON file that rows are added to")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, folder, layers, output = arguments.one
        run(method, Path(folder), int(layers), Path(output))
        return
    torch.set_num_threads(1)
    wanted = (arguments.kinds or ",".join(SHAPES)).split(",")
    kinds = [name for name in SHAPES if name in wanted or name.rpartition(".")[2] in wanted]
    named = "-".join(k.rpartition(".")[2] for k in kinds)
    folder = arguments.work / f"{arguments.layers}-{arguments.part}-{named}"
    make(folder, arguments.layers, kinds, arguments.part)
    rates = {"products": product_rates(), "disk": disk_rates(arguments.work)}
    print("| method | a layer | peak | operations | as products | share | bytes | disk | model |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method in arguments.methods.split(","):
        row = measure(method, folder, arguments.layers, kinds, arguments.part, rates)
        print(line(row), flush=True)
        if arguments.output:
            known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
            like = ("method", "part")
            known = [old for old in known if [old[k] for k in like] != [row[k] for k in like]]
            arguments.output.write_text(json.dumps([*known, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
