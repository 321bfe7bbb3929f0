"""Checkpoints as running models for a task, and other states put into them by the files' keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.experts import is_adapter, open_expert
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry, open_index
from eutectic.checkpoint.names import align
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.conventions import CLASSIFIERS
from eutectic.errors import CheckpointError, MissingExtraError, RequestError
from eutectic.evaluation.schema import Task

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_CLASSES: Mapping[str, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "pair-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
    "language-model": "AutoModelForCausalLM",
    "lm-eval": "AutoModelForCausalLM",
}
GENERATION = "generation_config.json"
EXPERTS = "experts"  # the folder of a merged model that holds one loadable folder per expert
_SEARCH = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "penalty_alpha"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    *("num_return_sequences", "constraints", "force_words_ids", "dola_layers"),
    *("max_length", "max_new_tokens", "max_time", "prompt_lookup_num_tokens"),
    *("min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
)
_PROBE = 1 << 20  # above the values of fresh weights, and exact in float32 for as many keys again


def load_model(
    folder: str | Path,
    task: Task,
    *,
    base: str | Path | None = None,
    expert: str | Path | None = None,
    device: str = "cpu",
) -> Any:
    """Return the transformers model that evaluates `task` on a checkpoint, in float32.

    With a linear head in the task it is the bare encoder. Otherwise it is a model with a task head:
    a merged folder with `experts/<expert>/` takes that folder; a folder that lacks head tensors of
    the expert (the base, a body alone) borrows them: its body, the expert's head.

    Args:
        folder: a checkpoint, or a LoRA adapter (which needs `base`).
        task: decides the class; not of the kind `function`.
        base: the base of adapters, `folder` or `expert`.
        expert: the folder of the task's expert, for its head; None: `folder` has its own.
        device: where the model goes.

    Raises:
        CheckpointError: the folder is unusable, or tensors that the task needs are nowhere.
        RequestError: an adapter without a base.
        MissingExtraError: transformers is not installed.
    """
    folder = whole = Path(folder)
    own = folder / EXPERTS / task.expert_name
    if task.head is None and own.is_dir():
        folder, expert = own, None
    if expert is not None and (task.head is not None or Path(expert) == folder):
        expert = None
    state = checkpoint_tensors(folder, base)
    configured = folder
    if expert is not None:
        state, configured = _with_head(state, folder, Path(expert), base, task)
    if is_adapter(configured) and base is not None:
        configured = Path(base)
    model = build_model(configured, task, state)
    set_generation(model, task, (folder, whole, configured))
    return model.to(device)


def checkpoint_tensors(folder: str | Path, base: str | Path | None = None) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by the file's keys; an adapter as W₀ + ΔW on its base.

    Raises:
        CheckpointError: it cannot be read.
        RequestError: an adapter without a base.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        with CheckpointReader(open_index(folder)) as reader:
            return {n: reader.read(n).view(e.shape) for n, e in reader.entries.items()}
    if base is None:
        raise RequestError(f"{folder}: is an adapter; name the base it belongs to with --base.")
    index = open_index(Path(base))
    expert = open_expert(folder, index)
    state: dict[str, Tensor] = {}
    try:
        with CheckpointReader(index) as reader:
            for name, entry in reader.entries.items():
                values = reader.read(name)
                changed = expert.entries.get(name)
                if changed is not None and changed.shape != entry.shape:
                    state[name] = expert.read(name).view(changed.shape)
                    continue
                if changed is not None:
                    dtype = torch.promote_types(entry.dtype, torch.float32)
                    values = expert.weight(name, base=values.to(dtype), dtype=dtype)
                state[name] = values.view(entry.shape)
        for name, entry in expert.extra.items():
            state[name] = expert.read_extra(name).view(entry.shape)
    finally:
        expert.close()
    return state


def head_tensors(
    expert: str | Path, body: str | Path, task: Task, base: str | Path | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an expert that count as its head, by its own keys.

    Those that `body` lacks or has in another shape, and those that `task.head_tensors` names.

    Raises:
        CheckpointError: one of them cannot be read, or they are fine-tunes of different models.
    """
    index = open_index(Path(body))
    opened = _open_full(Path(expert), index, base)
    try:
        return _head(opened, index, task)
    finally:
        opened.close()


def borrows_head(
    folder: str | Path, expert: str | Path, task: Task, base: str | Path | None = None
) -> bool:
    """Return whether `load_model(folder, task, base=base, expert=expert)` takes the expert's head.

    False where the body has a head of the same shape itself. Headers are read, no tensor.

    Raises:
        CheckpointError: one of them cannot be read, or they are fine-tunes of different models.
    """
    body = Path(base) if is_adapter(Path(folder)) and base is not None else Path(folder)
    index = open_index(body)
    opened = _open_full(Path(expert), index, base)
    try:
        return bool(opened.extra) or any(
            _is_head(name, entry, index, task) for name, entry in opened.entries.items()
        )
    finally:
        opened.close()


def build_model(folder: Path, task: Task, state: Mapping[str, Tensor]) -> Any:
    """Return the model of a folder's configuration with the tensors of a state, by file keys.

    Raises:
        CheckpointError: transformers does not know it, or misses tensors in the state.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf", "Evaluating models") from None
    transformers.utils.logging.disable_progress_bar()
    auto = "AutoModel" if task.head is not None else _CLASSES[task.kind]
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        if auto == "AutoModelForSequenceClassification" or "ImageClass" in auto:
            _fit_labels(config, task, state)
        with torch.device("meta"):
            kind = type(getattr(transformers, auto).from_config(config))
        return _from_state(kind, config, state, folder, task)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: transformers cannot load it for task '{task.name}' ({task.kind}): {reason}"
        ) from None


def set_generation(model: Any, task: Task, folders: Sequence[Path]) -> None:
    """Let a model generate as the first `generation_config.json` in `folders` says, if any.

    Tokens that it forces or forbids are part of the model. Its search is not: exact match is of
    greedy decoding, and lm-evaluation-harness names its own.

    Raises:
        CheckpointError: the file cannot be read.
    """
    folder = next((f for f in folders if (f / GENERATION).is_file()), None)
    if folder is None or task.kind not in ("sequence-to-sequence", "lm-eval"):
        return
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder / GENERATION}: cannot be read: {reason}") from None
    if task.kind == "sequence-to-sequence":
        plain = GenerationConfig()
        for name in _SEARCH:
            if hasattr(plain, name):  # names come and go with transformers' versions
                setattr(found, name, getattr(plain, name))
    model.generation_config = found


def file_keys(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return file key -> name in `model.state_dict()`, for a model from `load_model`.

    Names that agree, or agree after a prefix, are taken as they are. For the others (transformers
    renames some between file and memory) a model is loaded from tensors that hold a number each,
    which tells where every key goes. Keys that the model has no use for are left out.

    Args:
        model: from `load_model`.
        shapes: key -> shape, as in the checkpoint's files.

    Raises:
        CheckpointError: transformers joins or splits tensors when it loads them, so that there is
            no such mapping.
    """
    held = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    mapping, _ = align(held, shapes, expert="the checkpoint")
    found = {k: n for k, n in mapping.items() if held[n] == tuple(shapes[k])}
    if len(found) == len(shapes) or not _unfilled(model, found.values()):
        return found
    return _probed(model, shapes)


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
    """Copy tensors, by file key, into a loaded model; keys that it has no use for are passed over.

    Args:
        model: from `load_model`.
        tensors: file key -> values, any dtype, any subset of the keys.
        keys: from `file_keys`.

    Raises:
        CheckpointError: a tensor has another shape than the model's.
    """
    state = model.state_dict()
    with torch.no_grad():
        for key, values in tensors.items():
            if key not in keys:
                continue
            target = state[keys[key]]
            if target.shape != values.shape:
                raise CheckpointError(
                    f"'{key}' has the shape {list(values.shape)}, the model's '{keys[key]}' has "
                    f"{list(target.shape)}."
                )
            target.copy_(values)


def _open_full(expert: Path, index: CheckpointIndex, base: str | Path | None) -> Any:
    try:
        return open_expert(expert, index)
    except CheckpointError:
        if base is None or not is_adapter(expert):
            raise
        # A merged body may be named otherwise than the base that the adapter was made for.
        return open_expert(expert, open_index(Path(base)))


def _head(opened: Any, index: CheckpointIndex, task: Task) -> dict[str, Tensor]:
    # An adapter's files have names of PEFT's own; the body's are the base's.
    found = {
        n if opened.is_delta else e.name: opened.read_extra(n).view(e.shape)
        for n, e in opened.extra.items()
    }
    for name, entry in opened.entries.items():
        if not _is_head(name, entry, index, task):
            continue
        own = index.entries.get(name)
        key = name if opened.is_delta else entry.name
        if opened.is_delta and own is not None and own.shape == entry.shape:
            raise CheckpointError(
                f"{opened.label}: holds '{name}' as a change of the base's, not a head of its own."
            )
        found[key] = opened.read(name).view(entry.shape)
    return found


def _is_head(name: str, entry: TensorEntry, index: CheckpointIndex, task: Task) -> bool:
    """Tell whether an expert's tensor, by the body's name, is of its head."""
    own = index.entries.get(name)
    named = any(fnmatchcase(name, pattern) for pattern in task.head_tensors)
    return own is None or own.shape != entry.shape or named


def _with_head(
    state: dict[str, Tensor], folder: Path, expert: Path, base: str | Path | None, task: Task
) -> tuple[dict[str, Tensor], Path]:
    """Return the body of `folder` with the expert's head, under the expert's keys."""
    body = Path(base) if is_adapter(folder) and base is not None else folder
    index = open_index(body)
    opened = _open_full(expert, index, base)
    try:
        head = _head(opened, index, task)
        if not head:
            return state, folder
        if opened.is_delta:
            return {**state, **head}, body
        spelled = {entry.name: state[name] for name, entry in opened.entries.items()}
        return {**spelled, **head}, expert
    finally:
        opened.close()


def _fit_labels(config: Any, task: Task, state: Mapping[str, Tensor]) -> None:
    """Set the number of outputs where the configuration is the base's and knows no task."""
    if task.kind == "regression":
        config.num_labels = 1
    elif task.labels is not None:
        config.num_labels = len(task.labels)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    else:
        rows = [len(state[name]) for name in CLASSIFIERS if name in state and state[name].ndim == 2]
        if rows and rows[0] != config.num_labels:
            config.num_labels = rows[0]


def _from_state(
    kind: Any, config: Any, state: Mapping[str, Tensor], folder: Path, task: Task
) -> Any:
    model, info = _quietly(kind, config, state)
    missing = [name for name in info["missing_keys"] if _matters(name, task)]
    wrong = [str(item[0]) for item in info["mismatched_keys"]]
    if missing or wrong:
        named = ", ".join([*sorted(missing), *wrong][:4])
        raise CheckpointError(
            f"{folder}: task '{task.name}' ({task.kind}) needs tensors that the checkpoint lacks "
            f"or has in another shape: {named}.\nName the expert that has this head with --expert "
            f"{task.expert_name}=PATH, or a linear head with `head:` in the task."
        )
    return model.eval()


def _matters(name: str, task: Task) -> bool:
    return task.head is None or task.pooling == "pooler" or "pooler" not in name


def _quietly(kind: Any, config: Any, state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    import transformers

    # transformers tells of tensors that are left out or missing; callers check what matters.
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    old = int(transformers.__version__.split(".")[0]) < 5
    dtype = {"torch_dtype" if old else "dtype": torch.float32}
    try:
        return kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **dtype,
        )
    finally:
        log.set_verbosity(before)


def _unfilled(model: nn.Module, names: Iterable[str]) -> bool:
    """Tell whether a parameter shares memory with none of the named tensors."""
    state = model.state_dict()
    filled = {state[name].data_ptr() for name in names}
    return any(p.data_ptr() not in filled for p in model.parameters())


def _probed(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    keys = list(shapes)
    state = {k: torch.tensor(float(_PROBE + i)).expand(*shapes[k]) for i, k in enumerate(keys)}
    loaded, _ = _quietly(type(model), model.config, state)
    found: dict[str, str] = {}
    for name, values in loaded.state_dict().items():
        if not values.is_floating_point() or values.numel() == 0:
            continue
        low, high = (float(v) for v in values.aminmax())
        if high < _PROBE:
            continue
        if low != high or tuple(values.shape) != tuple(shapes[keys[int(low) - _PROBE]]):
            raise CheckpointError(
                f"'{name}' is put together from several tensors of the file, so a state cannot be "
                "put into the loaded model.\nEvaluate checkpoint folders instead."
            )
        found.setdefault(keys[int(low) - _PROBE], name)
    return found
