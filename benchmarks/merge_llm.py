"""Time a peer's command line against ours on a language model of 390 million parameters.

    python benchmarks/merge_llm.py --peer /path/to/mergekit-yaml --folder /tmp/llm

Builds a Qwen2-shaped base of 24 layers and four experts in bfloat16 (random, deterministic), then
runs both command lines in turns, interpreter start included, and prints medians, their ratio and
the peak resident memory of either. Without `--peer`, ours alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, LAYERS, INTER, VOCABULARY, HEADS, KV_HEADS = 896, 24, 4864, 32000, 14, 2
EXPERTS = ("a", "b", "c", "d")
METHODS = {
    "linear": {"ours": {}, "peer": {}},
    "task_arithmetic": {"ours": {}, "peer": {}},
    "ties": {"ours": {"density": 0.2}, "peer": {"density": 0.2}},
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model, as Qwen2 names them."""
    head = HIDDEN // HEADS
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            table[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            table[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        table[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        table[f"{prefix}mlp.gate_proj.weight"] = (INTER, HIDDEN)
        table[f"{prefix}mlp.up_proj.weight"] = (INTER, HIDDEN)
        table[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INTER)
        table[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        table[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    return {**table, "model.norm.weight": (HIDDEN,)}


def build(folder: Path) -> None:
    """Write the base and the experts, unless they are there."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    import torch
    from safetensors.torch import save_file

    for number, name in enumerate(("base", *EXPERTS)):
        target = folder / name
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
        tensors = {}
        for key, shape in shapes().items():
            value = 0.02 * torch.randn(shape, generator=base)
            if number:
                value += 0.002 * torch.randn(shape, generator=own)
            tensors[key] = value.bfloat16()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
        count = sum(t.numel() for t in tensors.values())
        print(f"{name}: {count / 1e6:.0f} M parameters", file=sys.stderr)


def our_command(folder: Path, method: str, output: Path) -> list[str]:
    """Return our command line."""
    words = [str(Path(sys.executable).with_name("eutectic")), "merge"]
    words += ["--base", str(folder / "base"), "-m", method, "--scale", "1", "-o", str(output)]
    for name, value in METHODS[method]["ours"].items():
        words += ["-p", f"{name}={value}"]
    return [*words, *(f"{name}={folder / name}" for name in EXPERTS)]


def peer_command(folder: Path, method: str, output: Path, peer: str) -> list[str]:
    """Write the peer's recipe and return its command line."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": 1.0, **METHODS[method]["peer"]}}
        for name in EXPERTS
    ]
    recipe: dict = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
    path = folder / f"{method}.json"
    path.write_text(json.dumps(recipe))
    return [peer, str(path), str(output), "--quiet"]


def run(words: list[str], output: Path) -> tuple[float, float]:
    """Return wall-clock seconds and peak resident bytes of one process."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{message.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    """Build, run in turns, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models and outputs (6 GB)")
    parser.add_argument("--peer", help="path of mergekit-yaml in an environment of its own")
    parser.add_argument("--build-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    if arguments.build_only:
        build(arguments.folder)
        return
    # In a process of its own: a child's peak memory starts at its parent's.
    words = [sys.executable, __file__, "--folder", str(arguments.folder), "--build-only"]
    subprocess.run(words, check=True)
    print("| method | ours s | peer s | ours / peer (median of pairs) | ours peak | peer peak |")
    print("|---|---|---|---|---|---|")
    for method in arguments.methods:
        ours, theirs, peaks = [], [], [0.0, 0.0]
        output = arguments.folder / "out"
        for _ in range(arguments.repeats):
            seconds, peak = run(our_command(arguments.folder, method, output), output)
            ours.append(seconds)
            peaks[0] = max(peaks[0], peak)
            if arguments.peer:
                words = peer_command(arguments.folder, method, output, arguments.peer)
                seconds, peak = run(words, output)
                theirs.append(seconds)
                peaks[1] = max(peaks[1], peak)
        ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
        cells = [
            method,
            f"{statistics.median(ours):.1f}",
            f"{statistics.median(theirs):.1f}" if theirs else "",
            f"{statistics.median(ratios):.2f}" if ratios else "",
            f"{peaks[0] / 1e9:.2f} GB",
            f"{peaks[1] / 1e9:.2f} GB" if theirs else "",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
