"""The tasks of a search: data that may be used, models with their heads, the experts' outputs."""

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eutectic.errors import RequestError
from eutectic.evaluation.checkpoints import Checkpoint, Checkpoints
from eutectic.evaluation.model_outputs import load_head, outputs
from eutectic.evaluation.splits import Prepared, check_disjoint, prepare
from eutectic.evaluation.task_files import Task, load_tasks
from eutectic.models.batches import IGNORED_LABEL
from eutectic.models.linear_head import Head
from eutectic.models.task_kinds import EMBEDDING, GENERATIVE, ZERO_SHOT
from eutectic.models.task_models import load_model
from eutectic.models.zero_shot import is_whole
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.recipes.schema import ScaleSearch
from eutectic.tuning.putting import base_folder
from eutectic.types import Treatment

Split = Literal["proxy", "validation"]
POSITIONS = 512  # of one task whose next-token distributions are compared: vocabularies are large


@dataclass(frozen=True)
class TuningTask:
    """One task, ready to be measured."""

    task: Task  # with `compare: features`, as one whose models are bare encoders
    prepared: Prepared  # its split
    head: Head | None  # None: the model's own, or features
    rows: Mapping[str, int]  # split -> number of rows, of all splits, which share none
    tested_elsewhere: Mapping[str, int]  # other task -> rows of the split among its test rows
    as_features: bool  # features are compared, not predictions
    reading: str  # hash of configurations, classes and tokenizers of base and expert

    @property
    def expert(self) -> str:
        """The expert that the task belongs to."""
        return self.task.expert_name

    def outputs(self, model: nn.Module) -> Tensor:
        """Return what the metric needs of a model."""
        return outputs(model, self.prepared, self.head)

    def comparable(self, model: nn.Module) -> Tensor:
        """Return logits or features `[n, …]`; of generative models, logits at some positions."""
        if self.task.kind in GENERATIVE:
            return _token_logits(model, self.prepared)
        return self.outputs(model)

    def expert_model(self, inputs: Inputs, device: str) -> nn.Module:
        """Load the expert itself."""
        own, base = _expert(inputs, self.expert), base_folder(inputs)
        return load_model(own, self.task, base=base, device=device)

    def body_model(self, inputs: Inputs, device: str) -> nn.Module:
        """Load the base with the expert's head, for deltas to be added to its body."""
        base, expert = base_folder(inputs), _expert(inputs, self.expert)
        return load_model(base, self.task, base=base, expert=expert, device=device)

    def described(self) -> dict[str, Any]:
        """Return what the record says of the task's data."""
        return {
            "split": self.prepared.split,
            "metric": self.task.metric_name,
            "rows": len(self.prepared),
            "data_hash": self.prepared.data_hash,
            "disjoint": dict(self.rows),
            "test_rows_of_other_tasks": dict(self.tested_elsewhere),
        }

    def identity(self) -> list[Any]:
        """Return what decides its outputs besides the models."""
        head = None if self.head is None else self.head.fingerprint()
        stated = self.task.model_dump(mode="json", exclude={"data"})
        return [self.prepared.data_hash, stated, head, self.reading]


def open_tasks(search: ScaleSearch, plan: Plan, inputs: Inputs) -> list[TuningTask]:
    """Read, check and encode the data of a search. Test data are looked at for overlap only."""
    assert search.tasks is not None
    split: Split = "validation" if search.search == "validation" else "proxy"
    found = load_tasks(search.tasks)
    faults = [f for task in found.values() if (f := _fault(task, split, search, inputs))]
    if faults:
        raise RequestError(
            f"{search.tasks} cannot be used to choose the scale:\n" + "\n".join(faults)
        )
    features = search.compare == "features"
    lent = lent_heads(plan)
    tasks: list[TuningTask] = []
    keys = {name: check_disjoint(task) for name, task in found.items()}
    for task in found.values():
        own = keys[task.name]
        rows = {name: len(of) for name, of in own.items()}
        shared = {n: len(own[split] & of.get("test", frozenset())) for n, of in keys.items()}
        tested = {name: count for name, count in shared.items() if count}
        vectors = task.kind in EMBEDDING  # which are features as they are, without a head
        # The base may have a head of the same shape.
        if task.head is None and lent and not vectors:
            patterns = (*task.head_tensors, *map(glob.escape, lent))
            task = task.model_copy(update={"head_tensors": patterns})
        # The head's name is never opened: without a head, outputs are features.
        if features and not vectors:
            task = task.model_copy(update={"head": task.head or "features"})
        head = None if features else load_head(task)
        prepared, reading = _encoded(task, split, inputs)
        tasks.append(TuningTask(task, prepared, head, rows, tested, features or vectors, reading))
    return tasks


def lent_heads(plan: Plan) -> list[str]:
    """Return tensors of the base that are the expert's own in the model that is measured.

    So the written model is run: with `heads: per_expert` from the expert's folder inside, with
    `drop` by borrowing. `heads: base` leaves the base's own where it has them.
    """
    if plan.output.heads == "base":
        return []
    kept = [t.name for t in plan.tensors if t.treatment is Treatment.HEAD]
    return [*kept, *plan.left_out]


def _fault(task: Task, split: str, search: ScaleSearch, inputs: Inputs) -> str | None:
    if task.kind in ("function", "lm-eval"):
        return f"  - task '{task.name}' is of the kind {task.kind}, which reads its data itself."
    if task.expert_name not in inputs.experts:
        return (
            f"  - task '{task.name}' belongs to '{task.expert_name}', which is none of the "
            f"experts: {', '.join(inputs.experts)}. Name it: expert: NAME."
        )
    if split not in task.data:
        return f"  - task '{task.name}' has no split '{split}'; it has {', '.join(task.data)}."
    if task.kind == ZERO_SHOT and not is_whole(base_folder(inputs)):
        return (
            f"  - task '{task.name}' ({task.kind}) needs a base with both towers, and the base "
            "has that of pictures alone."
        )
    if search.compare == "features" and task.kind in GENERATIVE:
        return f"  - task '{task.name}' ({task.kind}) has no features; leave out compare."
    return None


def _encoded(task: Task, split: Split, inputs: Inputs) -> tuple[Prepared, str]:
    """Return the split as `evaluate` encodes it for the base, and a hash of what else is read."""
    base, expert = base_folder(inputs), _expert(inputs, task.expert_name)
    body = Checkpoint("base", "base", base)
    own = Checkpoint(task.expert_name, "expert", expert)
    sources = Checkpoints(base, {task.expert_name: expert}, (body, own))
    labels = sources.label_ids(own, task)
    merged = sources.label_ids(body, task)
    if task.labels is None and merged != labels:
        raise RequestError(
            f"task '{task.name}': the base has a head with the classes {_in_order(merged)},\nand "
            f"expert '{task.expert_name}' one with {_in_order(labels)}: merged, they are neither.\n"
            "Keep the expert's (a rule with treatment head for it), or name the classes of the "
            "merged head in the task (labels: […])."
        )
    folder = sources.processor(body, task)
    answers = split == "validation"
    spoken = sources.with_template(body, task)
    prepared = prepare(spoken, split, folder, label_ids=labels, answers=answers, base=base)
    read = [sources.reading(body, task), sources.reading(own, task)]
    return prepared, hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _in_order(labels: Mapping[str, int]) -> str:
    names = [name for name in labels if not name.isdecimal()]
    return ", ".join(sorted(names, key=lambda name: labels[name]))


def _expert(inputs: Inputs, name: str) -> Path:
    folder = inputs.experts[name].folder
    if folder is None:
        raise RequestError(f"expert '{name}' is not a folder, so it cannot be run.")
    return folder


@torch.inference_mode()
def _token_logits(model: Any, prepared: Prepared) -> Tensor:
    """Return next-token logits `[positions, vocabulary]` at evenly spread known positions."""
    causal = prepared.task.kind == "language-model"  # the last position predicts nothing known
    labels = [batch["labels"][:, 1:] if causal else batch["labels"] for batch in prepared.batches]
    counted = [own != IGNORED_LABEL for own in labels]
    total = sum(int(mask.sum()) for mask in counted)
    step = max(1, -(-total // POSITIONS))
    found: list[Tensor] = []
    seen = 0
    for batch, mask in zip(prepared.batches, counted, strict=True):
        count = int(mask.sum())
        chosen = [i for i in range(count) if (seen + i) % step == 0]
        seen += count
        if not chosen:
            continue
        device = next(model.parameters()).device
        given = {n: v.to(device) for n, v in batch.items() if not (causal and n == "labels")}
        logits = model(**given).logits
        logits = logits[:, :-1] if causal else logits
        found.append(logits[mask.to(device)][chosen].float().cpu())
    if not found:
        raise RequestError(
            f"task '{prepared.task.name}': its {prepared.split} texts hold no token that is "
            "predicted from others; give longer ones."
        )
    return torch.cat(found)
