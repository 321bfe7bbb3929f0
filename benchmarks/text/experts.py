"""Make the experts of the text suite: all-MiniLM-L6-v2 fine-tuned on each of twenty tasks.

    python benchmarks/text/experts.py --work DIR                     # everything; resumable
    python benchmarks/text/experts.py --work DIR --regime hard --task movie
    python benchmarks/text/experts.py --base mpnet --work DIR2       # all-mpnet-base-v2 instead

A task's head is a logistic regression on the base's mean-pooled features and stays frozen; base,
experts and merges all use it. The learning rate decides how far experts move from the base and
from each other: at 1e-4 (`kind`) their average beats the base, at 4e-4 (`hard`) it does not.
`lora` is a rank-16 adapter of every encoder matrix, also hard, and `lora-unequal` one of ranks 4 to
64, another for every task; `lora-extracted` are the experts of `hard` made adapters of such ranks
by `eutectic extract`. Embeddings are frozen throughout.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bases import BASES, MINILM, Base
from confirmation import CONFIRMATION
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sources import TASKS, Splits, digest, load_splits
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "minilm"), str(ROOT / "benchmarks")]
from make_experts import (
    Encoder,
    batches,
    fit_head,
    learning_rate_share,
    write_jsonl,
    write_whole,
)
from precision import fast_products, has_bfloat16
from texts import Example

logger = logging.getLogger("experts")
ALL_TASKS = TASKS | CONFIRMATION
PROXY_TEXTS = 128
BASE = MINILM.find(Path())


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an expert, beside its texts."""

    learning_rate: float
    lora_rank: int = 0
    steps: int = 200
    warm_up_steps: int = 20
    batch_size: int = 32
    max_tokens: int = 32
    max_train_texts: int = 12_000
    head_texts: int = 6_000
    head_l2: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Shuffled(Recipe):
    """A recipe whose training labels are exchanged at random: it makes an expert of noise."""

    shuffled: bool = True


REGIMES = tuple(MINILM.rates)
# Ranks of `lora-unequal` and `lora-extracted`, task by task, again from the first after the last.
RANKS = (64, 4, 8, 32, 16, 48, 24, 12)


def recipe_of(regime: str, base: Base) -> Recipe:
    """Return how an expert of a regime is trained on a base."""
    return Recipe(base.rates[regime], lora_rank=16 if regime == "lora" else 0)


def base_record(base: Base) -> dict[str, str]:
    """Return what the record of a head or an expert says of another base than MiniLM."""
    return {} if base is MINILM else {"base": base.hub_name}


def prepare_task(name: str, work: Path, recipe: Recipe, base: Base) -> Splits:
    """Write the task's splits and head, unless they are there; return the splits."""
    splits = load_splits(ALL_TASKS[name], work / "cache")
    folder = work / "tasks" / name
    record = {
        "labels": splits.labels,
        "sha256": digest(splits),
        "head_texts": recipe.head_texts,
        "max_tokens": recipe.max_tokens,
    } | base_record(base)
    done = folder / "task.json"
    if done.is_file() and json.loads(done.read_text("utf-8")) == record:
        return splits
    for side in ("train", "validation", "test"):
        examples: list[Example] = getattr(splits, side)[: recipe.max_train_texts]
        rows = [{"text": e.text, "label": e.label} for e in examples]
        write_jsonl(folder / f"{side}.jsonl", rows)
    write_jsonl(folder / "proxy.jsonl", [{"text": e.text} for e in splits.train[:PROXY_TEXTS]])
    chosen = splits.train[: recipe.head_texts]
    encoder = Encoder(base.find(work / "cache"))
    features = encoder.features(chosen, autocast=has_bfloat16(), max_tokens=recipe.max_tokens)
    labels = torch.tensor([example.label for example in chosen])
    head = fit_head(features, labels, len(splits.labels), recipe.head_l2)
    save_file(
        {"weight": head.weight.contiguous(), "bias": head.bias.contiguous()},
        folder / "head.safetensors",
    )
    write_whole(done, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return splits


def write_tasks(work: Path, recipe: Recipe) -> None:
    """Write `tasks.yaml`, the suite as `eutectic evaluate` and `eutectic tune` take it."""
    lines = ["tasks:"]
    for name in ALL_TASKS:
        folder = work / "tasks" / name
        if (folder / "task.json").is_file():
            lines += [
                f"  {name}:",
                "    kind: text-classification",
                "    data: {"
                + ", ".join(f"{s}: tasks/{name}/{s}.jsonl" for s in ("proxy", "validation", "test"))
                + "}",
                f"    head: tasks/{name}/head.safetensors",
                f"    max_length: {recipe.max_tokens}",
            ]
    write_whole(work / "tasks.yaml", "\n".join(lines) + "\n")


def load_head(file: Path) -> nn.Linear:
    """Read a frozen head."""
    tensors = load_file(file)
    head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
    head.load_state_dict(tensors)
    return head.requires_grad_(False)


def fine_tune(
    encoder: Encoder, head: nn.Linear, train: list[Example], recipe: Recipe, base: Base
) -> None:
    """Train the encoder's layers, or an adapter on them, under the frozen head."""
    torch.manual_seed(recipe.seed)
    if recipe.lora_rank:
        # 8/√r, which is 2 at rank 16: one learning rate then suits every rank.
        config = LoraConfig(
            r=recipe.lora_rank, lora_alpha=8, use_rslora=True, target_modules=[*base.adapted]
        )
        encoder.model = get_peft_model(encoder.model, config)
    else:
        for parameter_name, parameter in encoder.model.named_parameters():
            parameter.requires_grad_(not parameter_name.startswith(base.frozen))
    encoder.model.train()
    parameters = [p for p in encoder.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_share(step, recipe.steps, recipe.warm_up_steps)
    )
    source = batches(train[: recipe.max_train_texts], recipe.batch_size, recipe.seed)
    for step in range(recipe.steps):
        batch = next(source)
        with fast_products():
            pooled = encoder.pool([example.text for example in batch], recipe.max_tokens)
        labels = torch.tensor([example.label for example in batch])
        loss = nn.functional.cross_entropy(head(pooled), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if (step + 1) % 50 == 0:
            logger.info("  step %d of %d, loss %.3f", step + 1, recipe.steps, loss.item())


def save_expert(model: nn.Module, folder: Path, base: Base, found: Path) -> None:
    """Write a checkpoint with the base file's own keys, or a PEFT adapter."""
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = base.hub_name
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    for file in found.iterdir():
        if file.suffix in {".json", ".txt"}:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.name)
    tensors = load_file(found / "model.safetensors")
    trained: dict[str, Tensor] = model.state_dict()
    tensors |= {name: trained[name].contiguous() for name in tensors if name in trained}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def accuracy(encoder: Encoder, head: nn.Linear, examples: list[Example], tokens: int) -> float:
    """Share of examples whose largest logit is their label's."""
    scores = head(encoder.features(examples, autocast=has_bfloat16(), max_tokens=tokens))
    labels = torch.tensor([example.label for example in examples])
    return round((scores.argmax(1) == labels).float().mean().item(), 4)


def shuffle_labels(train: list[Example], seed: int) -> list[Example]:
    """Return the same texts with each other's labels."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(own.text, train[i].label) for own, i in zip(train, order, strict=True)]


def make_expert(name: str, regime: str, work: Path, recipe: Recipe, base: Base) -> None:
    """Train and write one expert, or leave what an equal recipe and equal texts have made."""
    splits = prepare_task(name, work, recipe, base)
    folder = work / regime / name
    record = {"recipe": asdict(recipe), "sha256": digest(splits)} | base_record(base)
    done = folder / "expert.json"
    if done.is_file():
        old = json.loads(done.read_text("utf-8"))
        if {key: old.get(key) for key in record} == record:
            logger.info("%s %s: finished before, skipped", regime, name)
            return
    head = load_head(work / "tasks" / name / "head.safetensors")
    found = base.find(work / "cache")
    encoder = Encoder(found)
    tokens = recipe.max_tokens
    before = accuracy(encoder, head, splits.validation, tokens)
    shuffled = isinstance(recipe, Shuffled)
    train = shuffle_labels(splits.train, recipe.seed) if shuffled else splits.train
    fine_tune(encoder, head, train, recipe, base)
    expert = accuracy(encoder, head, splits.validation, tokens)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_expert(encoder.model, partial, base, found)
    scores = {"validation": {"base": before, "expert": expert}, "bfloat16": has_bfloat16()}
    write_whole(partial / "expert.json", json.dumps(record | scores, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(work / f"{regime}-dense" / name, ignore_errors=True)
    for stale in (work / "statistics").glob(f"{regime}-*/{name}.safetensors"):
        stale.unlink()
    partial.rename(folder)
    logger.info("%s %s: validation base %.3f, expert %.3f", regime, name, before, expert)


def rank_of(name: str) -> int:
    """Return the rank of a task's adapter where ranks are unequal."""
    return RANKS[list(TASKS).index(name) % len(RANKS)]


def extract_expert(name: str, work: Path, recipe: Recipe, base: Base) -> None:
    """Make an adapter of a full fine-tune, which is trained first where it is not there."""
    import eutectic

    make_expert(name, "hard", work, recipe, base)
    rank = rank_of(name)
    made = json.loads((work / "hard" / name / "expert.json").read_text("utf-8"))
    record = {"recipe": made["recipe"] | {"lora_rank": rank}, "sha256": made["sha256"]}
    folder = work / "lora-extracted" / name
    done = folder / "expert.json"
    if done.is_file() and json.loads(done.read_text("utf-8")) == record:
        return
    for stale in (folder, work / "lora-extracted-dense" / name):
        shutil.rmtree(stale, ignore_errors=True)
    found = base.find(work / "cache")
    eutectic.extract(work / "hard" / name, base=found, output=folder, rank=rank, others="drop")
    write_whole(done, json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Make every expert that is not there yet."""
    parser = argparse.ArgumentParser(description="Make the experts of the text suite.")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--base", choices=list(BASES), default="text", help="text: MiniLM")
    parser.add_argument("--regime", action="append", choices=REGIMES, help="default: all")
    parser.add_argument(
        "--task", action="append", choices=list(ALL_TASKS), help="default: the twenty"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of training; other than 0: in REGIME-seed-N"
    )
    parser.add_argument("--steps", type=int, help="default: 200")
    parser.add_argument("--head-texts", type=int, help="default: 6000")
    parser.add_argument("--max-tokens", type=int, help="default: 32")
    parser.add_argument("--threads", type=int, default=1, help="results depend on it in rounding")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    base = BASES[arguments.base]
    for regime in arguments.regime or REGIMES:
        asked = {name: getattr(arguments, name) for name in ("steps", "head_texts", "max_tokens")}
        recipe = replace(recipe_of(regime, base), seed=arguments.seed)
        recipe = replace(recipe, **{k: v for k, v in asked.items() if v})
        folder = f"{regime}-seed-{arguments.seed}" if arguments.seed else regime
        for name in arguments.task or TASKS:
            if regime == "lora-extracted":
                extract_expert(name, arguments.work, recipe, base)
            else:
                unequal = {"lora_rank": rank_of(name)} if regime == "lora-unequal" else {}
                make_expert(name, folder, arguments.work, replace(recipe, **unequal), base)
        write_tasks(arguments.work, recipe)


if __name__ == "__main__":
    main()
