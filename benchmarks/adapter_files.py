"""Adapters of a Llama of one billion parameters, from files to a file, in pairs of processes.

    python benchmarks/adapter_files.py --work DIR [--layers 16] [--targets q_proj,up_proj]

Base (random weights, bfloat16) and eighteen adapters of unequal rank (six of rank 16, twelve of
ranks 4 to 64; together 368 directions in every layer) are written once, with the statistics that
`collect --for` keeps of random tokens. Each merge is a process of its own, on one thread:

- thin: adapters in, one adapter out;
- expanded: the same command with every delta multiplied out before the method sees it, as an
  engine without thin factors would; a full checkpoint out.

Iso-A reads the same statistics in both forms: the few rows of `collect --for`, so that its expanded
form is spared the eigenproblems of the layer's width, and is faster here than with whole Grams.
The table has seconds (without the imports), peak memory of the process above what it took before
the merge began, and how far the two changes of the base are apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANKS = (16,) * 6 + (4, 8, 12, 24, 32, 64, 4, 8, 12, 24, 32, 48)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS: dict[str, dict[str, Any]] = {"iso_c": {}, "tsv_m": {}, "knots_ties": {}, "iso_a": {}}
CHANGE = 0.05  # ‖Δ_t‖ as a share of ‖W₀‖
SLACK = 8_000_000  # bytes that the allocator holds already: what is below cannot be told
TOKENS = (4, 64)  # sequences and their length, of every adapter's statistics
CONFIG: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def make(folder: Path, layers: int, targets: tuple[str, ...]) -> None:
    """Write base, adapters and statistics, unless they are there."""
    if (folder / "done").is_file():
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **CONFIG)).eval()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base")
    matrices = {
        name.removesuffix(".weight"): weight
        for name, weight in model.named_parameters()
        if name.split(".")[-2] in targets
    }
    for index, rank in enumerate(RANKS):
        write_adapter(folder / f"a{index:02}", matrices, rank, index, targets)
    (folder / "done").write_text("")


def write_adapter(
    folder: Path, matrices: dict[str, Any], rank: int, seed: int, targets: tuple[str, ...]
) -> None:
    """Write one LoRA adapter whose singular values fall off, as trained ones' do."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, weight in matrices.items():
        out, inner = weight.shape
        left = torch.randn(out, rank, generator=generator) * 0.9 ** torch.arange(rank)
        right = torch.randn(rank, inner, generator=generator)
        square = ((left.mT @ left) * (right @ right.mT)).sum()  # of ‖left·right‖
        left *= CHANGE * weight.float().norm() / square.sqrt()
        tensors[f"base_model.model.{module}.lora_A.weight"] = right
        tensors[f"base_model.model.{module}.lora_B.weight"] = left
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    config |= {"target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def collect_for_adapters(folder: Path) -> None:
    """Write, for every adapter, statistics of the base's inputs on random tokens."""
    from transformers import LlamaForCausalLM

    import eutectic
    from eutectic.statistics import core_rows

    if (folder / f"a{len(RANKS) - 1:02}.safetensors").is_file():
        return
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    adapters = {f"a{i:02}": folder / f"a{i:02}" for i in range(len(RANKS))}
    rows = core_rows(model, adapters, folder / "base")
    for index, name in enumerate(adapters):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(CONFIG["vocab_size"], TOKENS, generator=generator)
        batches = [
            {"input_ids": part[None], "attention_mask": torch.ones(1, len(part))} for part in ids
        ]
        eutectic.collect(model, batches, folder / f"{name}.safetensors", core=rows)


def recipe(folder: Path, method: str, form: str) -> dict[str, Any]:
    """Return the merge of all adapters."""
    experts: dict[str, dict[str, str]] = {}
    for index in range(len(RANKS)):
        name = f"a{index:02}"
        experts[name] = {"path": str(folder / name)}
        if method == "iso_a":
            experts[name]["statistics"] = str(folder / f"{name}.safetensors")
    asked: dict[str, Any] = {"base": str(folder / "base"), "experts": experts, "method": method}
    asked |= {"parameters": METHODS[method], "scale": 1.0, "dtype": "float32"}
    asked |= {"statistics_of": "any"}  # of the base, not of every adapter
    return asked | ({"output": "adapter"} if form == "thin" else {})


def run(form: str, method: str, folder: Path, output: Path) -> None:
    """Merge once and print what it took."""
    import eutectic
    from eutectic.execution import adapter_factors, matrix_merging
    from eutectic.execution.executors import peak_bytes
    from eutectic.methods import get_method

    torch.set_num_threads(1)
    if form == "expanded":
        matrix_merging.thin_deltas = lambda *_, **__: None
        adapter_factors.thin_deltas = lambda *_, **__: None
    # Imports are no part of it: an adapter's keys are those of transformers' own model.
    importlib.import_module("transformers.models.llama.modeling_llama")
    for room in ("tuning.entry", "statistics.core_view"):
        importlib.import_module(f"eutectic.{room}")
    get_method(method)
    before = peak_bytes()
    started, used = time.perf_counter(), time.process_time()
    eutectic.merge(recipe(folder, method, form), output=output, threads=1)
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    peak = peak_bytes()
    took |= {"peak": max(peak - before, SLACK), "process_peak": peak}
    print(json.dumps(took))


def process(form: str, method: str, folder: Path) -> tuple[dict[str, float], Path]:
    """Run one form in a process of its own; return what it took, and its output."""
    output = folder / f"out-{form}"
    for left in (output, folder / f"{output.name}.partial"):  # the latter of a killed run
        shutil.rmtree(left, ignore_errors=True)
    words = [sys.executable, __file__, "--one", form, method, str(folder), str(output)]
    started = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"process_seconds": time.perf_counter() - started}, output


def apart(folder: Path, thin: Path, expanded: Path) -> float:
    """Return the largest relative distance of the two changes of a matrix."""
    base = load_file(folder / "base" / "model.safetensors")
    factors = load_file(thin / "adapter_model.safetensors")
    merged = load_file(expanded / "model.safetensors")
    worst = 0.0
    for key, left in factors.items():
        if ".lora_B." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".lora_B", "")
        own = left.double() @ factors[key.replace("lora_B", "lora_A")].double()
        other = merged[name].double() - base[name].double()
        worst = max(worst, float((own - other).norm() / other.norm()))
    return worst


def measure(arguments: argparse.Namespace, method: str, folder: Path) -> dict[str, Any]:
    """Return one row: both forms in turn, or the thin one alone."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in arguments.forms}
    outputs: dict[str, Path] = {}
    for _ in range(arguments.pairs):
        for form, own in found.items():
            took, outputs[form] = process(form, method, folder)
            own.append(took)
    row: dict[str, Any] = {
        "method": method,
        "layers": arguments.layers,
        "targets": list(arguments.targets),
        "pairs": arguments.pairs,
        **found,
    }
    if len(found) == 2:
        both = list(zip(found["thin"], found["expanded"], strict=True))
        for key in ("seconds", "cpu_seconds", "process_seconds", "peak", "process_peak"):
            row[f"{key}_ratio"] = statistics.median(b[key] / a[key] for a, b in both)
        row["apart"] = apart(folder, outputs["thin"], outputs["expanded"])
    for output in outputs.values():
        shutil.rmtree(output)
    return row


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as Markdown."""
    thin = row["thin"][0]
    cells = [row["method"], f"{row['layers']} × {len(row['targets'])}", f"{thin['seconds']:.1f} s"]
    cells += [f"{thin['peak'] / 1e6:.0f} MB"]
    if "apart" in row:
        other = row["expanded"][0]
        cells += [f"{other['seconds']:.1f} s", f"{other['peak'] / 1e6:.0f} MB"]
        cells += [f"{row['seconds_ratio']:.1f}", f"{row['cpu_seconds_ratio']:.1f}"]
        cells += [f"{row['peak_ratio']:.1f}", f"{row['apart']:.1e}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of base, adapters and outputs")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--forms", nargs="*", default=["thin", "expanded"])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file that rows are added to")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        form, method, folder, output = arguments.one
        run(form, method, Path(folder), Path(output))
        return
    torch.set_num_threads(1)
    arguments.targets = tuple(arguments.targets.split(","))
    short = "".join(target[0] for target in arguments.targets)
    folder = arguments.work / f"{arguments.layers}-{short}"
    make(folder, arguments.layers, arguments.targets)
    for method in arguments.methods.split(","):
        if method == "iso_a":
            collect_for_adapters(folder)
        row = measure(arguments, method, folder)
        print(line(row), flush=True)
        if arguments.output:
            known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
            arguments.output.write_text(json.dumps([*known, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
