"""What a model makes of a prepared split, and the score of that."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from eutectic.cluster.devices import has_float64
from eutectic.errors import CheckpointError, Fault, NumericalError, RequestError, TaskError
from eutectic.evaluation.embeddings import vector_outcomes
from eutectic.evaluation.metrics import Array, Outcomes, metric_value, per_example
from eutectic.evaluation.splits import Prepared, normal_text
from eutectic.evaluation.task_files import Task
from eutectic.models.arguments import signature_of
from eutectic.models.batches import IGNORED_LABEL
from eutectic.models.hooks import evaluating
from eutectic.models.linear_head import Head, features, read_head
from eutectic.models.model_inputs import padding_id, tell_padding
from eutectic.models.sentence_modules import sentence_vectors
from eutectic.models.task_kinds import EMBEDDING, ZERO_SHOT
from eutectic.models.unfit_inputs import unfit_in_words
from eutectic.models.zero_shot import class_embeddings, class_logits

Precision = Literal["float32", "bfloat16"]
Tell = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Score:
    """How well a model did on a split."""

    value: float  # NaN where it is undefined (a constant under Pearson)
    metric: str
    per_example: Array  # `[n]`, see `metrics.per_example`
    outcomes: Outcomes  # any resample of them can be scored


def load_head(task: Task, *, base: bool = False) -> Head | None:
    """Return the task's linear head in float32 (`base`: the base's, where it has one of its own).

    None when the task's models have heads of their own.
    """
    path = (task.base_head if base else None) or task.head
    if path is None:
        return None
    try:
        return read_head(Path(path), task.pooling or "mean", task.normalize)
    except CheckpointError as error:
        raise CheckpointError(f"task '{task.name}': {error}") from None


@dataclass
class Shares:
    """Inputs that are done as rows: a row may have several inputs, and share some with others."""

    rows: int
    inputs: int
    done: int = 0

    def of(self, more: int) -> int:
        """Return how many rows these further inputs make up; all of them together are `rows`."""
        before = self.rows * self.done // self.inputs
        self.done += more
        return self.rows * self.done // self.inputs - before


@torch.inference_mode()
def outputs(
    model: nn.Module,
    prepared: Prepared,
    head: Head | None = None,
    *,
    dtype: Precision = "float32",
    progress: Tell | None = None,
) -> Tensor:
    """Return what `model` makes of each row, in the order of the rows, on the CPU.

    - with a linear head in the task: weight·feature + bias `[n, outputs]`, or the pooled features
      `[n, hidden]` when `head` is None;
    - similarity and retrieval: vectors `[texts, width]` in the order of `embedded_texts`;
    - classification and regression: logits `[n, outputs]`; zero-shot with the classes' texts
      through the model's own text tower as its head;
    - language models: `[n, 2]` float64, the summed negative log-likelihood of the tokens after the
      first, and their number;
    - sequence to sequence: token ids `[n, length]` of greedy decoding, −100 after their end.

    Evaluation mode during the call; the model's mode is put back, and its configuration is told
    which token pads the texts. float32 except for token ids.

    Args:
        model: of the class that `load_model` chooses for the task.
        prepared: from `prepare`, with the same tokenizer.
        head: applied to pooled features.
        dtype: `bfloat16` runs the model under autocast: faster, and accurate to 2–3 digits.
        progress: told the number of rows after each batch.

    Raises:
        RequestError: a head for a task that has none, or of another width.
        NumericalError: the outputs hold NaN or Inf.
    """
    if head is not None and prepared.task.head is None:
        raise RequestError(f"task '{prepared.task.name}' has no `head`; its models have their own.")
    tell_padding(model, prepared.processor)
    device, takes = next(model.parameters()).device, signature_of(model).taken
    found: list[Tensor] = []
    told = Shares(len(prepared), len(prepared.order))
    with evaluating(model), _precision(device.type, dtype):
        compute = _computation(model, prepared, head)
        for batch in prepared.batches:
            placed = {name: batch[name].to(device) for name in takes(batch)}
            where, advice = (
                f"task '{prepared.task.name}': ",
                "Set the task's max_length to {} or less.",
            )
            with unfit_in_words(model, placed, where, advice):
                found.append(compute(model, placed).cpu())
            if progress is not None:
                progress(told.of(len(found[-1])))
    together = _concatenated(found)
    if together.is_floating_point() and not bool(torch.isfinite(together).all()):
        raise NumericalError(
            f"task '{prepared.task.name}': the model's outputs hold NaN or Inf.\n"
            "Look for them in its weights; a scale that is too large causes them too."
        )
    result = torch.empty_like(together)
    result[prepared.order] = together
    return result


def score(results: Tensor, prepared: Prepared) -> Score:
    """Return the task's metric of what `outputs` returned."""
    metric = prepared.task.metric_name
    outcomes = outcomes_of(results, prepared)
    return Score(metric_value(metric, outcomes), metric, per_example(metric, outcomes), outcomes)


def outcomes_of(results: Tensor, prepared: Prepared) -> Outcomes:
    """Return predictions and references, row by row."""
    kind = prepared.task.kind
    if kind == "language-model":
        return Outcomes(results[:, 0].double().numpy(), results[:, 1].double().numpy())
    if len(prepared.references) != len(prepared):
        raise RequestError(
            f"task '{prepared.task.name}': the split '{prepared.split}' has no labels to score."
        )
    if kind in EMBEDDING:
        return vector_outcomes(prepared.task, results, prepared.references)
    if kind == "sequence-to-sequence":
        ids = results.masked_fill(results == IGNORED_LABEL, padding_id(prepared.processor))
        texts = prepared.processor.batch_decode(ids, skip_special_tokens=True)
        pairs = zip(texts, prepared.references, strict=True)
        right = [float(normal_text(text) == reference) for text, reference in pairs]
        return Outcomes(np.array(right), np.ones(len(right)))
    labels = cast("tuple[float, ...]", prepared.references)
    references = np.array(labels, dtype=np.float64)
    if kind == "regression":
        if results.numel() != len(results):
            raise RequestError(
                f"task '{prepared.task.name}': a regression has one output, the head gives "
                f"{results.shape[-1]}."
            )
        return Outcomes(results.reshape(len(results), -1)[:, 0].double().numpy(), references)
    classes = results.shape[-1]
    outside = f"is none of the model's {classes} classes, counted from 0."
    faults = [
        Fault("label", f"the label {label} {outside}", f"row {number}")
        for number, label in enumerate(labels, 1)
        if not 0 <= int(label) < classes
    ]
    if faults:
        raise TaskError(faults[:10], f"task '{prepared.task.name}'")
    return Outcomes(results.argmax(-1).double().numpy(), references)


def _precision(kind: str, dtype: Precision) -> AbstractContextManager[Any]:
    """Return the context of forward passes in a dtype on a kind of device."""
    if dtype == "float32":
        return nullcontext()
    if not torch.amp.is_autocast_available(kind):
        raise RequestError(
            f"dtype bfloat16: torch {torch.__version__} has no autocast on {kind}.\n"
            "Leave the dtype out, or the device."
        )
    return torch.autocast(kind, torch.bfloat16)


def _computation(
    model: nn.Module, prepared: Prepared, head: Head | None
) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    task = prepared.task
    if task.kind == ZERO_SHOT and task.head is not None:  # a search compares features
        return lambda model, batch: model(**batch).pooler_output.float()
    if task.kind == ZERO_SHOT:
        classes = class_embeddings(model, prepared.texts, len(prepared.classes))
        return lambda model, batch: class_logits(model, model(**batch).pooler_output, classes)
    if task.kind == "language-model":
        return _likelihood
    if task.kind in EMBEDDING:
        return _vectors
    if task.kind == "sequence-to-sequence":
        return lambda model, batch: _generated(model, batch, prepared.generate_tokens)
    if task.head is None:
        return lambda model, batch: model(**batch).logits.float()

    def through_head(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        try:
            pooled = _features(model, batch, task)
            if head is not None:
                return head.of(pooled)
        except RequestError as error:
            raise RequestError(f"task '{task.name}': {error}") from None
        return nn.functional.normalize(pooled, dim=-1) if task.normalize else pooled

    return through_head


def _features(model: Any, batch: dict[str, Tensor], task: Task) -> Tensor:
    if task.pooling == "pooler" and hasattr(model, "get_image_features"):
        found = model.get_image_features(**batch)
        # A tensor before transformers 5, an output object since.
        return (found if isinstance(found, Tensor) else found.pooler_output).float()
    mask = batch.get("attention_mask")
    return features(model(**batch), mask, task.pooling or "mean").float()


def _vectors(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return sentence_vectors(model, model(**batch), batch["attention_mask"])


def _likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    counts = (labels != IGNORED_LABEL).sum(1)
    if not has_float64(losses.device.type):
        losses, counts = losses.cpu(), counts.cpu()
    return torch.stack([losses.double().sum(1), counts.double()], dim=1)


def _generated(model: Any, batch: dict[str, Tensor], tokens: int) -> Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    # The first position is the decoder's start token.
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)[:, 1:]


def _concatenated(found: list[Tensor]) -> Tensor:
    if found[0].ndim == 2:
        width, pad = max(t.shape[1] for t in found), nn.functional.pad
        found = [pad(t, (0, width - t.shape[1]), value=IGNORED_LABEL) for t in found]
    return torch.cat(found)
