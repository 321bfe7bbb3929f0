"""Accuracy of an encoder through linear heads on mean-pooled features."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eutectic.errors import CheckpointError, MissingExtraError

BATCH = 64
MAX_TOKENS = 48


@dataclass(frozen=True)
class ProbeTask:
    """Texts with labels, and the head that scores features for them.

    Attributes:
        name: the task.
        texts: its test texts.
        labels: `[n]`, indices of classes.
        weight: `[classes, hidden]`.
        bias: `[classes]`.
    """

    name: str
    texts: tuple[str, ...]
    labels: Tensor
    weight: Tensor
    bias: Tensor


def load_probe_task(name: str, texts: Path, head: Path) -> ProbeTask:
    """Read a task from a jsonl file of {"text", "label"} and a safetensors head.

    Raises:
        CheckpointError: a file is missing or does not hold what it should.
    """
    try:
        rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
        tensors = load_file(head)
        labels = torch.tensor([row["label"] for row in rows])
        return ProbeTask(
            name,
            tuple(row["text"] for row in rows),
            labels,
            tensors["weight"].float(),
            tensors["bias"].float(),
        )
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"task '{name}': {texts} or {head} cannot be used: {error}") from None


def probe_accuracies(folder: Path, tasks: Iterable[ProbeTask]) -> dict[str, float]:
    """Return task -> accuracy of the encoder in `folder`, a transformers checkpoint.

    Features are means of the last hidden states over unmasked tokens; a class is the largest of
    weight·feature + bias. float32, evaluation mode.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise MissingExtraError("transformers", "hf", "Evaluating encoders") from None
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return {task.name: _accuracy(model, tokenizer, task) for task in tasks}


@torch.inference_mode()
def _accuracy(model: Any, tokenizer: Any, task: ProbeTask) -> float:
    order = sorted(range(len(task.texts)), key=lambda i: len(task.texts[i]))
    right = 0
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch: Mapping[str, Tensor] = tokenizer(
            [task.texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        features = (states * mask).sum(1) / mask.sum(1)
        scores = features @ task.weight.T + task.bias
        right += int((scores.argmax(1) == task.labels[chosen]).sum())
    return right / len(order)
