"""The log-likelihood whose gradients the Fisher statistics are made of."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from eutectic.cluster.devices import has_float64
from eutectic.errors import RequestError
from eutectic.models.batches import IGNORED_LABEL, LABEL_KEYS
from eutectic.models.sites import is_encoder_decoder
from eutectic.models.task_kinds import ARCHITECTURES, spelled

Objective = Literal[
    "classification",
    "multi-label",
    "regression",
    "language-model",
    "sequence-to-sequence",
    "token-classification",
]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
LogLikelihood = Callable[[Any, Any], Tensor]


def objective_name(name: Any) -> Any:
    """Return the spelling in force of an objective; functions are returned as they are.

    Callers and statistics files may use earlier spellings.

    >>> objective_name("multi_label"), objective_name("causal_lm"), objective_name("auto")
    ('multi-label', 'language-model', 'auto')
    """
    hyphened = spelled(name).replace("_", "-") if isinstance(name, str) else name
    return hyphened if hyphened in OBJECTIVES else name


def log_likelihoods(
    logits: Tensor, labels: Tensor, objective: Objective, mask: Tensor | None = None
) -> Tensor:
    """Return log p(labels | input) per example `[B]`, averaged over each example's targets.

    Logits are `[B, C]`, or `[B, T, V]` over tokens; labels `[B]`, `[B, C]` or `[B, T]`, those of
    language models not yet moved. Targets of -100 and at padding (`mask` `[B, T]`) do not count;
    `regression` is a Gaussian of unit variance.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if objective == "classification":
        return -nn.functional.cross_entropy(logits, labels, reduction="none")
    if objective == "multi-label":
        loss = nn.functional.binary_cross_entropy_with_logits
        return -loss(logits, labels.to(logits), reduction="none").sum(1)
    if objective == "regression":
        errors = logits.reshape(len(labels), -1) - labels.to(logits).reshape(len(labels), -1)
        return -0.5 * errors.square().sum(1)
    if mask is not None and mask.shape == labels.shape and objective != "sequence-to-sequence":
        labels = labels.masked_fill(~mask.bool(), IGNORED_LABEL)
    if objective == "language-model":
        logits, labels = logits[:, :-1], labels[:, 1:]
        if mask is not None and mask.shape[1] == labels.shape[1] + 1:
            # Padding on the left: nothing predicts the first token.
            labels = labels.masked_fill(~mask[:, :-1].bool(), IGNORED_LABEL)
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL
    )
    counts = (labels != IGNORED_LABEL).sum(1)
    return -losses.sum(1) / counts.clamp(min=1)


def sample_labels(
    logits: Tensor,
    labels: Tensor | None,
    objective: Objective,
    seeds: Sequence[int],
    mask: Tensor | None = None,
) -> Tensor:
    """Return labels drawn from the model's own predictions, in the layout of given labels.

    Every example has a generator of its own and spends it on counted targets only, so that its
    labels depend on its seed and its logits, not on the batch or the padding around it. Token
    objectives draw each target given the data before it; where `labels` are -100, so is the draw.
    """
    valid = torch.ones(logits.shape[:2], dtype=torch.bool) if logits.ndim == 3 else None
    if valid is not None:
        for source in (mask, None if labels is None else labels != IGNORED_LABEL):
            if source is not None and source.shape == valid.shape:
                valid &= source.bool().cpu()
        if objective == "language-model":
            # Position i of the logits predicts token i + 1 of the labels, unless it is padding.
            predicts = valid if mask is None or mask.shape != valid.shape else mask.bool().cpu()
            last = torch.zeros_like(valid[:, :1])
            valid = torch.cat([valid[:, 1:], last], dim=1) & predicts
    drawn: list[Tensor] = []
    for index, seed in enumerate(seeds):
        generator = np.random.Generator(np.random.PCG64(seed))
        row = logits[index].detach().cpu().double()
        if objective == "regression":
            drawn.append(row + torch.from_numpy(generator.standard_normal(row.shape)))
        elif objective == "multi-label":
            uniform = torch.from_numpy(generator.random(row.shape))
            drawn.append((uniform < row.sigmoid()).double())
        elif valid is None:
            drawn.append(_draw(row.unsqueeze(0), generator)[0])
        else:
            chosen = torch.full(row.shape[:1], IGNORED_LABEL)
            chosen[valid[index]] = _draw(row[valid[index]], generator)
            drawn.append(chosen.roll(1, 0) if objective == "language-model" else chosen)
    labels = torch.stack(drawn)
    if labels.is_floating_point() and not has_float64(logits.device.type):
        labels = labels.float()
    return labels.to(logits.device)


def _draw(logits: Tensor, generator: np.random.Generator) -> Tensor:
    """Return one class per row of `[n, classes]`, by inversion."""
    ends = logits.softmax(-1).cumsum(-1)
    uniform = torch.from_numpy(generator.random((len(ends), 1))) * ends[:, -1:]
    return torch.searchsorted(ends, uniform, right=True)[:, 0].clamp(max=ends.shape[-1] - 1)


def resolve_objective(model: nn.Module, logits: Tensor, labels: Tensor | None) -> Objective:
    """Return what the model's logits stand for, from its configuration, its class and shapes."""
    config = getattr(model, "config", None)
    named = {
        "single_label_classification": "classification",
        "multi_label_classification": "multi-label",
        "regression": "regression",
    }
    problem = getattr(config, "problem_type", None)
    if logits.ndim == 2:
        if problem in named:
            return named[problem]  # pyright: ignore[reportReturnType]
        if logits.shape[1] == 1:
            return "regression"
        if labels is not None and labels.is_floating_point():
            return "multi-label" if labels.shape == logits.shape else "regression"
        return "classification"
    if logits.ndim == 3:
        if is_encoder_decoder(model):
            return "sequence-to-sequence"
        inner = getattr(getattr(model, "base_model", None), "model", model)
        names = (type(model).__name__, type(inner).__name__)
        causal = any(n.endswith(ARCHITECTURES["language-model"]) for n in names)
        return "language-model" if causal else "token-classification"
    raise RequestError(
        f"logits {[*logits.shape]} fit no objective; allowed are [examples, classes] and "
        "[examples, tokens, classes].\n"
        "Pass objective=… as a function (outputs, batch) -> [examples]."
    )


def find_logits(outputs: Any) -> Tensor:
    """Return the logits in a model's outputs."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    logits = getattr(outputs, "logits", None) if logits is None else logits
    if isinstance(logits, Tensor):
        return logits
    raise RequestError(
        f"the model's outputs ({type(outputs).__name__}) hold no logits, so there is no "
        "log-likelihood to differentiate.\n"
        "Load the model with its head, or pass objective=… as a function "
        "(outputs, batch) -> [examples]."
    )


def evaluate(
    model: nn.Module,
    outputs: Any,
    batch: Any,
    objective: Objective | LogLikelihood | Literal["auto"],
    sampled: bool,
    seeds: Sequence[int],
) -> Tensor:
    """Return the log-likelihood of each example of a batch `[B]`, of given or of drawn labels."""
    if callable(objective):
        if sampled:
            raise RequestError(
                "labels='sample' needs a named objective: labels cannot be drawn from a function."
            )
        return objective(outputs, batch)
    logits, named = find_logits(outputs), batch if isinstance(batch, Mapping) else {}
    labels = next((v for key in LABEL_KEYS if isinstance(v := named.get(key), Tensor)), None)
    mask = named.get("attention_mask")
    name = objective_name(objective)
    if name == "auto":
        name = resolve_objective(model, logits, labels)
    if sampled:
        of_targets = None if name == "sequence-to-sequence" else mask
        labels = sample_labels(logits, labels, name, seeds, of_targets)
    if labels is None:
        raise RequestError(
            "gradients of the log-likelihood need 'labels' in every batch.\n"
            "Without labelled data pass labels='sample', which draws them from the model."
        )
    if labels.shape[0] != logits.shape[0]:
        raise RequestError(
            f"labels {[*labels.shape]} do not fit logits {[*logits.shape]}: one row per example."
        )
    return log_likelihoods(logits, labels, name, mask)


def label_seeds(seed: int, hashes: Sequence[int]) -> list[int]:
    """Return one seed per example, from the run's seed and the example's own hash."""
    return [
        int.from_bytes(hashlib.sha256(f"{seed}\0{h}".encode()).digest()[:8], "big") >> 1
        for h in hashes
    ]
