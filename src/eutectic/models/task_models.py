"""Checkpoints as models for a task; bodies without the task's head borrow the expert's."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert, is_adapter, is_ia3, open_expert, scaling_vectors
from eutectic.checkpoint.index import CheckpointIndex
from eutectic.checkpoint.opening import logical_index, open_reader
from eutectic.conventions import CLASSIFIERS
from eutectic.conventions_heads import output_part
from eutectic.conventions_patterns import fits
from eutectic.errors import CheckpointError, EutecticError, first_line
from eutectic.models.linear_head import Pooling
from eutectic.models.loading import base_folder, load_config, pretrained, transformers_for
from eutectic.models.sentence_modules import hang_on
from eutectic.models.task_kinds import (
    EMBEDDING,
    MODEL_CLASSES,
    WITH_HEAD,
    ZERO_SHOT,
    TaskKind,
)
from eutectic.models.zero_shot import completed, embed_pictures, is_whole

GENERATION = "generation_config.json"
_SEARCH = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "penalty_alpha"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    *("num_return_sequences", "constraints", "force_words_ids", "dola_layers"),
    *("max_length", "max_new_tokens", "max_time", "prompt_lookup_num_tokens"),
    *("min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
)
# Keys of a configuration on which no parameter depends; of labels the number counts.
_NO_PARAMETERS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id"}
)
EXPERTS = "experts"  # the folder of a merged model that holds one loadable folder per expert


class ModelTask(Protocol):
    """What decides the model of a task; `eutectic.evaluation.Task` is one."""

    name: str  # for messages
    kind: TaskKind  # decides the class of the model; not `function`
    head: str | None  # file of a linear head on the bare model's features; None: the model's own
    pooling: Pooling | None  # of features; None: mean, or what the checkpoint says of vectors
    head_tensors: tuple[str, ...]  # patterns of the expert's head besides the usual ones
    labels: tuple[str, ...] | None  # names of the classes, where the configuration has none
    text_model: str | None  # the whole model that completes a tower of pictures; None: the base

    @property
    def expert_name(self) -> str:
        """The expert whose head it uses."""
        ...


def load_model(
    folder: str | Path,
    task: ModelTask,
    *,
    base: str | Path | None = None,
    expert: str | Path | None = None,
    device: str = "cpu",
) -> Any:
    """Return the transformers model that evaluates `task` on a checkpoint, in float32.

    With a linear head in the task it is the bare encoder. Otherwise it is a model with a task head:
    a merged folder with `experts/<expert>/` takes that folder; a folder that lacks head tensors of
    the expert (the base, a body alone) borrows them: its body, the expert's head. An adapter,
    `folder` or `expert`, needs its `base`; without `expert`, `folder` has a head of its own.
    Tasks that compare vectors of texts take the bare model with the checkpoint's pooling (see
    `sentence_modules`), or the base's where the checkpoint names none.
    Zero-shot tasks take a model with two towers, which embeds pictures or texts when it is called;
    a tower of pictures alone is completed by the task's `text_model`, or by the base.
    """
    if task.kind == ZERO_SHOT:
        return _two_towers(Path(folder), task, base).to(device)
    if task.kind in EMBEDDING:
        own, below = Path(folder), base_folder(Path(folder), base)
        state = checkpoint_tensors(own, base)
        homes = [own, below, *([] if base is None else [Path(base)])]
        model = _build(below, task, state)
        return hang_on(model, homes, state, task.pooling).to(device).eval()
    folder = whole = Path(folder)
    own = folder / EXPERTS / task.expert_name
    if task.head is None and own.is_dir():
        folder, expert = own, None
    state = checkpoint_tensors(folder, base)
    configured = body = base_folder(folder, base)
    if (
        expert is not None
        and task.head is None
        and Path(expert) != folder
        and not is_ia3(Path(expert))
    ):
        index = logical_index(body)
        with _opened(Path(expert), index, base) as lender:
            head = _head(lender, index, task)
            if head and not lender.is_delta:
                state = {entry.name: state[name] for name, entry in lender.entries.items()}
                configured = Path(expert)
            state |= head
    model = _build(configured, task, state)
    _set_generation(model, task.kind, (folder, whole, configured))
    return model.to(device)


def completing(folder: Path, task: ModelTask, base: str | Path | None) -> Path | None:
    """Return the folder of the model that completes a tower of pictures; None where it is whole."""
    if is_whole(base_folder(folder, base)):
        return None
    for given in (task.text_model, base):
        if given is not None and is_whole(Path(given)):
            return Path(given)
    raise CheckpointError(
        f"{folder}: task '{task.name}' ({task.kind}) needs a text tower, which it lacks.\n"
        "Name the whole model that it was taken from: as --base, or with text_model in the task."
    )


def _two_towers(folder: Path, task: ModelTask, base: str | Path | None) -> Any:
    state, whole = checkpoint_tensors(folder, base), completing(folder, task, base)
    if whole is not None:
        try:
            state = completed(state, checkpoint_tensors(whole))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}, completed by {whole}: {error}") from None
    return embed_pictures(_build(whole or base_folder(folder, base), task, state))


def checkpoint_tensors(folder: str | Path, base: str | Path | None = None) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by the file's keys; an adapter as W₀ + ΔW on its base."""
    with open_reader(base_folder(Path(folder), base)) as reader:
        index = reader.index
        state = {n: reader.read(n).view(e.shape) for n, e in reader.entries.items()}
    if not is_adapter(Path(folder)):
        return state
    if is_ia3(Path(folder)):
        return state | _scaled(state, Path(folder))
    with closing(open_expert(Path(folder), index)) as expert:
        before = dict(state)
        changed = {name: expert.extra[name] for name in expert.tied}
        for name, entry in {**expert.entries, **changed}.items():
            like = before[expert.tied.get(name, name)]
            if entry.shape == like.shape:
                stored = like.view(-1)
                dtype = torch.promote_types(stored.dtype, torch.float32)
                values = expert.weight(name, base=stored.to(dtype), dtype=dtype)
            else:
                values = expert.read(name)
            state[name] = values.view(entry.shape)
        for name, entry in expert.extra.items():
            if name not in changed:
                state[name] = expert.read_extra(name).view(entry.shape)
    return state


def _scaled(state: Mapping[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """Return the tensors that an (IA)³ adapter multiplies, multiplied, and its own."""
    vectors, saved = scaling_vectors(adapter)
    unknown = [n for n in vectors if n not in state and not n.endswith(".bias")]
    if unknown:
        raise CheckpointError(
            f"{adapter}: its base holds no {unknown[0]}.\n"
            "Name the base that the adapter was trained on, with the same class."
        )
    return saved | {name: state[name] * vectors[name] for name in vectors if name in state}


def head_tensors(
    expert: str | Path, body: str | Path, task: ModelTask, base: str | Path | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an expert that count as its head, by its own keys.

    Those that `body` lacks or has in another shape, and those that `task.head_tensors` names.
    """
    index = logical_index(Path(body))
    with _opened(Path(expert), index, base) as lender:
        return _head(lender, index, task)


def names_no_head(
    folder: str | Path, expert: str | Path, task: ModelTask, base: str | Path | None = None
) -> bool:
    """Return whether none of `task.head_tensors` fits a tensor of the expert that lends its head.

    Then the body would keep its own head, and nothing would show it.
    """
    if not task.head_tensors or is_ia3(Path(expert)):
        return False
    index = logical_index(base_folder(Path(folder), base))
    with _opened(Path(expert), index, base) as lender:
        names = [*lender.entries, *lender.extra, *(e.name for e in lender.extra.values())]
        return not any(fits(name, pattern) for name in names for pattern in task.head_tensors)


def borrows_head(
    folder: str | Path, expert: str | Path, task: ModelTask, base: str | Path | None = None
) -> bool:
    """Return whether `load_model(folder, task, base=base, expert=expert)` takes the expert's head.

    False where the body has a head of the same shape itself. Headers are read, no tensor.
    """
    if is_ia3(Path(expert)):  # vectors, and no head
        return False
    index = logical_index(base_folder(Path(folder), base))
    with _opened(Path(expert), index, base) as lender:
        return bool(lender.extra.keys() - lender.tied or _head_names(lender, index, task))


def head_advice(expert: str) -> str:
    """Return what helps where a checkpoint has no head for a task."""
    return (
        f"Name the expert that has this head with --expert {expert}=PATH, or a linear head with "
        "`head:` in the task."
    )


def lacking_head(
    folder: str | Path, task: ModelTask, base: str | Path | None = None
) -> tuple[str, ...]:
    """Return the head's parameters where a checkpoint of its own holds none of a task's head.

    Told by headers and the configuration, before any tensor is read; empty where the checkpoint has
    some part of the head, or where that is only known when the model is loaded.
    """
    if task.head is not None or task.kind not in WITH_HEAD or is_ia3(Path(folder)):
        return ()
    body = base_folder(Path(folder), base)
    held = {*logical_index(body).entries}
    if is_adapter(Path(folder)):
        with closing(open_expert(Path(folder), logical_index(body))) as adapter:
            held |= {*adapter.extra, *adapter.entries}
    transformers_for("Evaluating models")
    try:
        config = load_config(body)
        head = _head_parameters(MODEL_CLASSES[task.kind], _Architecture(_described(config), config))
    except Exception:  # loading the model says what is wrong
        return ()
    return () if {*map(output_part, held)} & {*head.values()} else tuple(sorted(head))


@dataclass(frozen=True)
class _Architecture:
    """A configuration, equal to all that describe the same parameters."""

    text: str
    config: Any = field(compare=False)


def _described(config: Any) -> str:
    """Return what a configuration says of its model's parameters, and of little else."""
    told = {k: v for k, v in config.to_dict().items() if k not in _NO_PARAMETERS}
    return json.dumps([told, config.num_labels], default=str, sort_keys=True)


@lru_cache(maxsize=64)
def _head_parameters(auto: str, architecture: _Architecture) -> Mapping[str, str]:
    """Return the head's parameters in a model of a class, and which part of a head each is.

    An empty model is built for it, once for the merges of one base. None can be: nothing.
    """
    try:
        with torch.device("meta"):
            made = getattr(transformers_for("Evaluating models"), auto)
            empty = made.from_config(architecture.config, trust_remote_code=False)
    except Exception:  # loading the model says what is wrong
        return {}
    own = {n: output_part(n) for n, _ in empty.named_parameters()}
    return {n: part for n, part in own.items() if part and not part.startswith("pooler")}


def _build(folder: Path, task: ModelTask, state: Mapping[str, Tensor]) -> Any:
    """Return the model of a folder's configuration with the tensors of a state, by file keys."""
    transformers = transformers_for("Evaluating models")
    bare = task.head is not None and task.kind != ZERO_SHOT
    auto = "AutoModel" if bare else MODEL_CLASSES[task.kind]
    try:
        config = load_config(folder)
        if auto.endswith("Classification") and task.kind != ZERO_SHOT:
            _fit_labels(config, task, state)
        with torch.device("meta"):
            empty = getattr(transformers, auto).from_config(config, trust_remote_code=False)
        model, report = pretrained(type(empty), None, config=config, state=state)
    except (EutecticError, ImportError):
        raise
    except Exception as error:  # transformers raises anything at values that it does not expect
        raise CheckpointError(
            f"{folder}: transformers cannot load it for task '{task.name}' ({task.kind}): "
            f"{first_line(error)}"
        ) from None
    bare = bare or task.kind in EMBEDDING
    pooled = not bare or task.pooling == "pooler"
    missing = [name for name in report["missing_keys"] if pooled or "pooler" not in name]
    wrong = [str(item[0]) for item in report["mismatched_keys"]]
    if missing or wrong:
        named = ", ".join([*sorted(missing), *wrong][:4])
        raise CheckpointError(
            f"{folder}: task '{task.name}' ({task.kind}) needs tensors that the checkpoint lacks "
            f"or has in another shape: {named}.\n{head_advice(task.expert_name)}"
        )
    return model.eval()


def _fit_labels(config: Any, task: ModelTask, state: Mapping[str, Tensor]) -> None:
    """Set the number of outputs where the configuration is the base's and knows no task."""
    if task.kind == "regression":
        config.num_labels = 1
    elif task.labels is not None:
        config.num_labels = len(task.labels)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    else:
        found = (state[name] for name in CLASSIFIERS if name in state)
        rows = next((len(weight) for weight in found if weight.ndim == 2), config.num_labels)
        if rows != config.num_labels:
            config.num_labels = rows


def _set_generation(model: Any, kind: TaskKind, folders: Sequence[Path]) -> None:
    """Let a model generate as the first `generation_config.json` in `folders` says, if any.

    Tokens that it forces or forbids are part of the model. Its search is not: exact match is of
    greedy decoding, and lm-evaluation-harness names its own.
    """
    folder = next((f for f in folders if (f / GENERATION).is_file()), None)
    if folder is None or kind not in ("sequence-to-sequence", "lm-eval"):
        return
    settings = transformers_for("Generating texts").GenerationConfig
    try:
        found = settings.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = f"{folder / GENERATION}: cannot be read: {first_line(error)}"
        raise CheckpointError(reason) from None
    if kind == "sequence-to-sequence":
        plain = settings()
        for name in _SEARCH:
            if hasattr(plain, name):  # names come and go with transformers' versions
                setattr(found, name, getattr(plain, name))
    model.generation_config = found


def _opened(expert: Path, index: CheckpointIndex, base: str | Path | None) -> closing[Expert]:
    try:
        return closing(open_expert(expert, index))
    except CheckpointError:
        if base is None or not is_adapter(expert):
            raise
        # A merged body may be named otherwise than the base that the adapter was made for.
        return closing(open_expert(expert, logical_index(Path(base))))


def _head(lender: Expert, index: CheckpointIndex, task: ModelTask) -> dict[str, Tensor]:
    """Return an expert's head: under the base's keys for an adapter, else under its own."""
    found = {
        n if lender.is_delta else e.name: lender.read_extra(n).view(e.shape)
        for n, e in lender.extra.items()
        if n not in lender.tied
    }
    for name in _head_names(lender, index, task):
        entry, own = lender.entries[name], index.entries.get(name)
        if lender.is_delta and own is not None and own.shape == entry.shape:
            raise CheckpointError(
                f"{lender.label}: holds '{name}' as a change of the base's, not a head of its own."
            )
        found[name if lender.is_delta else entry.name] = lender.read(name).view(entry.shape)
    return found


def _head_names(lender: Expert, index: CheckpointIndex, task: ModelTask) -> list[str]:
    """Return the tensors of an expert, by the body's names, that are of its head."""
    shapes = {name: entry.shape for name, entry in index.entries.items()}
    return [
        name
        for name, entry in lender.entries.items()
        if shapes.get(name) != entry.shape
        or any(fits(name, pattern) for pattern in task.head_tensors)
    ]
