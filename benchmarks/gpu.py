"""Merges on an accelerator against the CPU: the same results, the same bytes again, and the time.

    python benchmarks/gpu.py --output gpu.json            # what is there, in under four minutes
    python benchmarks/gpu.py --device cpu --sides 256     # a dry run

1. Parity: every method on matrices, experts of full and of low rank, float32 and float64, against
   the CPU; the largest relative error of each.
2. Determinism: the same merge twice on the device, bit by bit.
3. Time: seconds of a merge of four experts on the device and on all cores of the CPU, at sides as
   language models have them; the first run warms up and is not counted.
4. Whole files: `eutectic merge --device` of a small checkpoint against the CPU's.
5. Models: `eutectic evaluate --device` of a small random language model against the CPU's losses,
   the same again, and the seconds of both; on Apple's GPUs (`--device mps`) this step alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.cluster.devices import device_model, device_of_models
from eutectic.methods import all_methods
from eutectic.methods.matrices import merge_matrices
from eutectic.types import LayerStatistics

METHODS = [name for name, method in all_methods().items() if not method.elementwise]
TIMED = ("iso_c", "iso_cts", "tsv_m", "iso_a", "regmean", "esm")
EXPERTS = 4


def inputs(side: int, rank: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return deltas, base and statistics of a matrix `[side, 3·side/4]`."""
    generator = torch.Generator().manual_seed(side)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = 3 * side // 4
    deltas = randn(EXPERTS, side, rank or wide) @ randn(EXPERTS, rank or wide, wide) / side
    statistics: list[LayerStatistics] = []
    for _ in range(EXPERTS):
        x, y = randn(2 * wide, wide), randn(2 * side, side)
        statistics.append(
            LayerStatistics(
                gram=(x.T @ x).to(dtype),
                count=len(x),
                output_gradient_gram=(y.T @ y).to(dtype),
                fisher_diagonal=randn(side, wide).square().to(dtype),
                sample_count=2,
            )
        )
    base = randn(side, wide).to(dtype)
    return {"deltas": deltas.to(dtype), "base": base, "statistics": statistics}


def placed(given: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the same on a device."""
    return {
        "deltas": given["deltas"].to(device),
        "base": given["base"].to(device),
        "statistics": [entry.to(device) for entry in given["statistics"]],
    }


def run(name: str, given: dict[str, Any]) -> Tensor:
    """Return the merge of a method by its defaults."""
    experts = 2 if all_methods()[name].experts[1] == 2 else EXPERTS
    return merge_matrices(
        name,
        given["deltas"][:experts],
        base=given["base"],
        statistics=given["statistics"][:experts],
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖/‖expected‖."""
    expected = expected.double()
    return float((found.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30))


def seconds(call: Callable[[], Any], device: str) -> float:
    """Return how long a call takes, with what it left to do on the device."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def files(device: str) -> dict[str, float]:
    """Merge checkpoints on the device and on the CPU; return the largest error of each method."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.proj.weight": (384, 256) for i in range(4)} | {"norm.weight": (256,)}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for expert in ("base", "a", "b", "c"):
            moved = {
                name: tensor
                + 0.1 * (expert != "base") * torch.randn(tensor.shape, generator=generator)
                for name, tensor in base.items()
            }
            (root / expert).mkdir()
            save_file(moved, root / expert / "model.safetensors")
        experts = {name: str(root / name) for name in "abc"}
        for method in ("iso_c", "iso_cts", "tsv_m", "ties"):
            made: list[dict[str, Tensor]] = []
            for place in ("cpu", device):
                output = root / f"{method}-{len(made)}"
                how = {"base": str(root / "base"), "experts": experts, "method": method}
                eutectic.merge(**how, output=output, device=place)
                made.append(load_file(output / "model.safetensors"))
            found[method] = max(
                relative(made[1][name], expected) for name, expected in made[0].items()
            )
    return found


def models(device: str) -> dict[str, Any]:
    """Evaluate a random language model there and here: the largest relative error of its losses."""
    import transformers as hf
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<unk>", *map(str, range(999))])}
    config = hf.GPT2Config(
        vocab_size=1000,
        n_positions=256,
        n_embd=512,
        n_layer=8,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        hf.GPT2LMHeadModel(config).save_pretrained(root / "model")
        hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<unk>").save_pretrained(
            root / "model"
        )
        rows = [" ".join(map(str, row)) for row in torch.randint(0, 999, (32, 128)).tolist()]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (root / "rows.jsonl").write_text(text)
        (root / "tasks.yaml").write_text(
            "tasks: {lm: {kind: language-model, data: {test: rows.jsonl}, metric: loss}}"
        )
        took: dict[str, float] = {}
        values: list[float] = []
        for place in (device, "cpu", device):  # the first run there warms up
            started = time.perf_counter()
            found = eutectic.evaluate(
                root / "tasks.yaml", models={"m": root / "model"}, device=place, resamples=0
            )
            took[place] = time.perf_counter() - started
            values.append(float(found.results[0].value or 0.0))
    error = abs(values[2] - values[1]) / abs(values[1])
    return {"loss": values[1], "error": error, "same_again": values[0] == values[2], "took": took}


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", default="auto", help="cuda, cuda:1, mps, cpu; default: what is there"
    )
    parser.add_argument("--sides", default="1024,4096", help="of the matrices that are timed")
    parser.add_argument("--limit", type=float, default=220.0, help="seconds; later steps are left")
    parser.add_argument("--output", type=Path, help="a JSON file")
    asked = parser.parse_args()
    device, started = device_of_models(asked.device), time.perf_counter()
    report: dict[str, Any] = {
        "device": device_model(device) or "cpu",
        "torch": torch.__version__,
        "parity": {},
        "same_again": {},
        "seconds": {},
    }
    report["models"] = models(device)
    print("evaluate:", report["models"])
    for name in METHODS if device != "mps" else ():
        errors: dict[str, float] = {}
        for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
            for rank in (None, 8):
                given = inputs(96, rank, dtype)
                there = placed(given, device)
                found = run(name, there)
                error = relative(found, run(name, given))
                kind = f"{str(dtype)[6:]}, {'full rank' if rank is None else f'rank {rank}'}"
                errors[kind] = error
                if error > bound:
                    print(f"{name}, {kind}: {error:.1e} from the CPU, {bound:g} was expected")
                if dtype == torch.float32 and rank is None:
                    report["same_again"][name] = bool(torch.equal(found, run(name, there)))
        report["parity"][name] = errors
        print(f"{name:20} {max(errors.values()):.1e}  same again: {report['same_again'][name]}")
    if device != "mps":
        report["files"] = files(device)
        print("whole files:", {name: f"{error:.1e}" for name, error in report["files"].items()})
    for side in (int(side) for side in asked.sides.split(",") if device != "mps"):
        for name in TIMED:
            if time.perf_counter() - started > asked.limit:
                print(f"{name} at {side}: left out, {asked.limit:g} seconds are over")
                continue
            given = inputs(side, None, torch.float32)
            there = placed(given, device)
            run(name, there)
            took = {device: seconds(lambda n=name, g=there: run(n, g), device)}
            if device != "cpu" and time.perf_counter() - started < asked.limit / 2:
                took["cpu"] = seconds(lambda n=name, g=given: run(n, g), "cpu")
            report["seconds"][f"{name} at {side}"] = took
            print(f"{name} at {side}: " + ", ".join(f"{d} {s:.3f} s" for d, s in took.items()))
    if asked.output is not None:
        asked.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
