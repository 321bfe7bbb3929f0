"""Make the experts of the Gemma suite: Gemma 3 270M fine-tuned on each task, fully or by LoRA.

    python benchmarks/gemma/experts.py --work DIR --regime hard --task movie     # resumable

The answer is one token; the loss is its negative log-likelihood among the whole vocabulary. The
table of embeddings, which is the output layer too, is frozen: base, experts and merges score with
the same. Heads are rows of it, so that an accuracy is that of the label words' likelihoods.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from model import HUB_NAME, Body, find_base, last_states, save_expert
from tasks import TASKS, Splits, label_tokens, prompts, splits_of
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "text"), str(ROOT / "benchmarks")]
from make_experts import learning_rate_share, write_jsonl, write_whole
from precision import fast_products
from sources import digest

logger = logging.getLogger("experts")
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GENERAL_TEXTS = 64
MEASURED = 150  # validation texts, after training


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an expert, beside its texts."""

    learning_rate: float
    lora_rank: int = 0
    steps: int = 200
    warm_up_steps: int = 20
    batch_size: int = 16
    max_train_texts: int = 6_000
    seed: int = 0


REGIMES = {
    "hard": Recipe(1e-4),
    "kind": Recipe(2e-5),
    "lora": Recipe(1e-3, lora_rank=16),
}


def padded(rows: Sequence[Sequence[int]], fill: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def prepare_task(name: str, work: Path, tokenizer: Any) -> dict[str, Any]:
    """Write the task's prompts with their answers, unless they are there; return its record."""
    splits: Splits = splits_of(name, work / "cache", tokenizer)
    open_answers = TASKS[name].open
    words = [] if open_answers else label_tokens(name, splits.labels, tokenizer)
    record = {"labels": splits.labels, "tokens": words, "sha256": digest(splits)}
    folder = work / "tasks" / name
    done = folder / "task.json"
    if done.is_file() and json.loads(done.read_text("utf-8")) == record:
        return record
    for side in ("train", "validation", "test"):
        examples = getattr(splits, side)[: Recipe(0).max_train_texts]
        ids = prompts(name, [e.text for e in examples], tokenizer)
        write_jsonl(
            folder / f"{side}.jsonl",
            [{"ids": own, "label": e.label} for own, e in zip(ids, examples, strict=True)],
        )
    write_whole(done, json.dumps(record, ensure_ascii=False) + "\n")
    return record


def prepare_general(work: Path, tokenizer: Any) -> None:
    """Write held-out general text, passages of State of the Union addresses, for perplexity."""
    file = work / "tasks" / "general.jsonl"
    if file.is_file():
        return
    passages = splits_of("sotu", work / "cache", tokenizer).test[:GENERAL_TEXTS]
    ids = tokenizer([p.text for p in passages], truncation=True, max_length=64)["input_ids"]
    write_jsonl(file, [{"ids": own} for own in ids])


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read what `prepare_task` wrote."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def batches(rows: Sequence[dict[str, Any]], size: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of like length without end."""
    generator = random.Random(seed)
    while True:
        shuffled = generator.sample(list(rows), len(rows))
        pool = size * 16
        chunks = [
            sorted(shuffled[start : start + pool], key=lambda row: len(row["ids"]))
            for start in range(0, len(shuffled), pool)
        ]
        epoch = [c[start : start + size] for c in chunks for start in range(0, len(c), size)]
        generator.shuffle(epoch)
        yield from epoch


def fine_tune(
    body: Body, rows: Sequence[dict[str, Any]], answers: Sequence[int] | None, recipe: Recipe
) -> Any:
    """Train the layers, or an adapter on them; return the trained module."""
    torch.manual_seed(recipe.seed)
    trained: Any = body
    if recipe.lora_rank:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=ADAPTED
        )
        trained = get_peft_model(body, settings)  # pyright: ignore[reportArgumentType]
    else:
        body.model.embed_tokens.requires_grad_(False)
    trained.train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_share(step, recipe.steps, recipe.warm_up_steps)
    )
    table = body.table
    source = batches(rows, recipe.batch_size, recipe.seed)
    for step in range(recipe.steps):
        batch = next(source)
        inputs = padded([row["ids"] for row in batch], 0)
        labels = [row["label"] for row in batch]
        with fast_products():
            states = last_states(trained(**inputs), inputs)
            scores = states @ table.T  # at one place of each text alone: the table is large
        targets = torch.tensor(labels if answers is None else [answers[label] for label in labels])
        loss = nn.functional.cross_entropy(scores.float(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if (step + 1) % 25 == 0:
            logger.info("  step %d of %d, loss %.3f", step + 1, recipe.steps, loss.item())
    return trained.eval()


@torch.inference_mode()
def accuracy(
    trained: Any, table: Tensor, rows: Sequence[dict[str, Any]], answers: Sequence[int] | None
) -> float:
    """Share of rows whose likeliest answer is right, of the label words or of all tokens."""
    weight = table if answers is None else table[torch.tensor(answers)]
    right = 0
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        inputs = padded([row["ids"] for row in batch], 0)
        with fast_products():
            states = last_states(trained(**inputs), inputs)
        found = (states @ weight.T).argmax(1).tolist()
        right += sum(own == row["label"] for own, row in zip(found, batch, strict=True))
    return round(right / len(rows), 4)


def make_expert(name: str, regime: str, work: Path, recipe: Recipe) -> None:
    """Train and write one expert, or leave what an equal recipe and equal texts have made."""
    from transformers import AutoTokenizer

    base = find_base(work / "cache")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    prepare_general(work, tokenizer)
    task = prepare_task(name, work, tokenizer)
    record = {"recipe": asdict(recipe), "sha256": task["sha256"]}
    folder = work / regime / name
    done = folder / "expert.json"
    if done.is_file() and record.items() <= json.loads(done.read_text("utf-8")).items():
        logger.info("%s %s: finished before, skipped", regime, name)
        return
    answers = None if TASKS[name].open else task["tokens"]
    validation = read_rows(work / "tasks" / name / "validation.jsonl")[:MEASURED]
    body = Body(base).eval()
    table = body.table
    before = accuracy(body, table, validation, answers)
    rows = read_rows(work / "tasks" / name / "train.jsonl")
    trained = fine_tune(body, rows, answers, recipe)
    after = accuracy(trained, table, validation, answers)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if recipe.lora_rank:
        trained.peft_config["default"].base_model_name_or_path = HUB_NAME
        trained.save_pretrained(partial, save_embedding_layers=False)
    else:
        save_expert(body, base, partial)
    scores = {"validation": {"base": before, "expert": after}}
    write_whole(partial / "expert.json", json.dumps(record | scores, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(work / f"{regime}-dense" / name, ignore_errors=True)
    for stale in (work / "statistics").glob(f"{regime}-*/{name}.safetensors"):
        stale.unlink()
    partial.rename(folder)
    logger.info("%s %s: validation base %.3f, expert %.3f", regime, name, before, after)


def main() -> None:
    """Make every expert that is not there yet."""
    parser = argparse.ArgumentParser(description="Make the experts of the Gemma suite.")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--regime", action="append", choices=list(REGIMES), help="default: all")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="default: all")
    parser.add_argument("--steps", type=int, help="default: 200")
    parser.add_argument("--threads", type=int, default=1, help="results depend on it in rounding")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    for regime in arguments.regime or REGIMES:
        recipe = REGIMES[regime]
        if arguments.steps:
            recipe = replace(recipe, steps=arguments.steps)
        for name in arguments.task or TASKS:
            make_expert(name, regime, arguments.work, recipe)


if __name__ == "__main__":
    main()
