"""What is evaluated: checkpoints with their roles, identities, and the model each task runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from eutectic.checkpoint.experts import is_adapter, open_expert
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.errors import RequestError
from eutectic.evaluation.functions import source_file
from eutectic.evaluation.schema import CLASSIFICATION, Task
from eutectic.models.generation import GENERATION
from eutectic.models.task_models import EXPERTS, borrows_head, load_model

Role = Literal["base", "expert", "model"]
RoutingMode = Literal["route", "oracle", "base"]
ROUTED = "routed.json"
_PROCESSOR_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tokenizer.model", "source.spm", "target.spm"),
    *("preprocessor_config.json", "processor_config.json"),
)
_ROUTED_HEADS = {
    "text-classification": ("ForSequenceClassification",),
    "pair-classification": ("ForSequenceClassification",),
    "regression": ("ForSequenceClassification",),
    "image-classification": ("ForImageClassification",),
    "language-model": ("ForCausalLM", "LMHeadModel"),
    "lm-eval": ("ForCausalLM", "LMHeadModel"),
    "sequence-to-sequence": ("ForConditionalGeneration",),
}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint to evaluate."""

    name: str
    role: Role
    folder: Path

    @property
    def routed(self) -> bool:
        """Whether it is a routed model."""
        return (self.folder / ROUTED).is_file()


@dataclass(frozen=True)
class Sources:
    """All checkpoints of an evaluation, base and experts for reference first."""

    base: Path | None
    experts: Mapping[str, Path]
    checkpoints: tuple[Checkpoint, ...]
    routing: RoutingMode = "route"

    def head_of(self, checkpoint: Checkpoint, task: Task) -> Path | None:
        """Return the expert folder that lends its head, or None where none is needed."""
        expert = self.experts.get(task.expert_name)
        own = checkpoint.folder / EXPERTS / task.expert_name
        if task.head is not None or expert == checkpoint.folder or own.is_dir():
            return None
        return expert

    def processor(self, checkpoint: Checkpoint, task: Task) -> Path:
        """Return the folder whose tokenizer or image processor encodes the task's rows.

        The checkpoint's own (a merged model's `experts/<expert>/` first), or the expert's, or the
        base's: the first that has one and a configuration. An adapter's tokenizer goes with the
        base's configuration.
        """
        folders = [checkpoint.folder / EXPERTS / task.expert_name, checkpoint.folder]
        folders += [f for f in (self.experts.get(task.expert_name), self.base) if f is not None]
        for folder in folders:
            own = (
                folder / "tokenizer_config.json"
            ).exists() and task.kind != "image-classification"
            adapted = own and self.base is not None and is_adapter(folder)
            configured = adapted or (folder / "config.json").exists()
            if configured and processor_hash(folder):
                return folder
        raise RequestError(
            f"{checkpoint.folder}: neither it, nor the expert, nor the base has a tokenizer or "
            f"image processor for task '{task.name}'.\nCopy the tokenizer's files into one of them."
        )

    def label_ids(self, checkpoint: Checkpoint, task: Task) -> dict[str, int]:
        """Return class name -> index in the outputs of the head that a checkpoint runs with.

        From the configuration that the head belongs to: the expert's where it is borrowed or comes
        from a file, else the checkpoint's own. Names that only count (LABEL_0) give way to others.
        Rows may number their classes; numbers are the expert's, and are names here where its
        order is another than the head's.

        Raises:
            CheckpointError: a checkpoint that cannot be read.
        """
        if task.kind not in CLASSIFICATION:
            return {}
        own = checkpoint.folder / EXPERTS / task.expert_name
        expert = self.experts.get(task.expert_name)
        lender = self.head_of(checkpoint, task)
        if task.head is not None:
            folders = (own, expert, checkpoint.folder)
        elif own.is_dir():
            folders = (own, expert)
        elif lender is None or checkpoint.routed:
            folders = (checkpoint.folder, expert)
        elif borrows_head(checkpoint.folder, lender, task, self.base):
            folders = (lender, checkpoint.folder)
        else:
            folders = (checkpoint.folder, lender)
        known = [found for folder in folders if (found := _classes(folder))]
        if not known:
            return {}
        labels = next(filter(_says_names, known), known[0])
        meant = _classes(expert)
        if meant != labels and meant.keys() == labels.keys():
            return {**{str(i): labels[name] for name, i in meant.items()}, **labels}
        return labels

    def reading(self, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
        """Return what decides a checkpoint's outputs besides weights, rows and settings.

        Configurations of the model and of what it borrows from, classes, the tokenizer or image
        processor, and how texts are generated.
        """
        own = checkpoint.folder / EXPERTS / task.expert_name
        folders = [own if task.head is None and own.is_dir() else checkpoint.folder]
        folders += [f for f in (self.head_of(checkpoint, task),) if f is not None]
        if self.base is not None and any(is_adapter(f) for f in folders):
            folders.append(self.base)
        generation = [f / GENERATION for f in (*folders, checkpoint.folder)]
        encoder = checkpoint.folder
        if task.kind != "function":
            encoder = self.processor(checkpoint, task)
        return {
            "configs": [_config(f) for f in folders],
            "labels": sorted(self.label_ids(checkpoint, task).items()),
            "processor": processor_hash(encoder),
            "generation": [_file_hash(f) if f.is_file() else None for f in generation],
        }

    def load(self, checkpoint: Checkpoint, task: Task) -> Any:
        """Return the model that runs a task; see `models.load_model`.

        Raises:
            RequestError: a routed model whose architecture has no head for the task.
        """
        if not checkpoint.routed:
            head = self.head_of(checkpoint, task)
            return load_model(checkpoint.folder, task, base=self.base, expert=head)
        from eutectic.routed import load_routed

        model = load_routed(checkpoint.folder).float()
        name = type(model).__name__
        endings = ("Model",) if task.head is not None else _ROUTED_HEADS[task.kind]
        if not name.endswith(endings) or (task.head is not None and "LMHead" in name):
            raise RequestError(
                f"{checkpoint.folder}: a routed {name} cannot run task '{task.name}' "
                f"({task.kind}); it takes {' or '.join('*' + e for e in endings)}."
            )
        return model

    @contextmanager
    def routed_as_asked(self, model: Any, checkpoint: Checkpoint, task: Task) -> Iterator[None]:
        """Choose the experts of a routed model; nothing for other models."""
        if not checkpoint.routed:
            with nullcontext():
                yield
            return
        from eutectic.routed import routing

        expert = task.expert_name if self.routing == "oracle" else None
        with routing(model, mode=self.routing, expert=expert):
            yield


def fingerprint(folder: Path, base: Path | None) -> str:
    """Return the identity of a checkpoint's weights; of an adapter's own and its base's.

    Raises:
        CheckpointError: it cannot be read.
        RequestError: an adapter without a base.
    """
    if is_adapter(folder):
        if base is None:
            raise RequestError(f"{folder}: is an adapter; name the base it belongs to with --base.")
        expert = open_expert(folder, open_index(base))
        try:
            return _digest([expert.fingerprint(), fingerprint(base, None)])
        finally:
            expert.close()
    with CheckpointReader(open_index(folder)) as reader:
        found = reader.fingerprint()
    if not (folder / ROUTED).is_file():
        return found
    extra = [_file_hash(folder / name) for name in (ROUTED, "routed.safetensors")]
    return _digest([found, *extra])


def pair_identity(
    sources: Sources, checkpoint: Checkpoint, task: Task, data_hash: str, settings: Any
) -> str:
    """Return a hash of all that decides a pair's outcomes.

    Weights (by fingerprint, size and time of change of their files), heads, configurations,
    classes, tokenizer or image processor, rows, settings, versions.
    """
    own = checkpoint.folder / EXPERTS / task.expert_name
    folder = own if task.head is None and own.is_dir() else checkpoint.folder
    lender = sources.head_of(checkpoint, task)
    code = None if task.function is None else source_file(task.function.rpartition(":")[0])
    described = {
        "weights": [_identity(f, sources.base) for f in (folder, lender) if f is not None],
        "reading": sources.reading(checkpoint, task),
        "heads": head_hashes(task),
        "role": checkpoint.role if task.base_head else None,
        "routing": [sources.routing, task.expert_name] if checkpoint.routed else None,
        "function": _file_hash(code) if code is not None else None,
        "task": task.model_dump(mode="json", exclude={"name", "data", "head", "base_head"}),
        "data": data_hash,
        "settings": settings,
        "versions": versions(),
    }
    return _digest(described)


def head_hashes(task: Task) -> dict[Literal["head", "base_head"], str]:
    """Return the SHA-256 of the head files that a task names."""
    files: dict[Literal["head", "base_head"], str | None]
    files = {"head": task.head, "base_head": task.base_head}
    return {role: _file_hash(Path(file)) for role, file in files.items() if file is not None}


@cache
def versions() -> dict[str, str]:
    """Return the versions of what computes the figures."""
    found: dict[str, str] = {}
    for package in ("eutectic", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor_hash(folder: Path) -> str:
    """Return the identity of a folder's tokenizer or image processor, "" if it has none."""
    found = {n: _file_hash(folder / n) for n in _PROCESSOR_FILES if (folder / n).is_file()}
    return _digest(found) if found else ""


def _identity(folder: Path, base: Path | None) -> list[Any]:
    folders = [folder, base] if base is not None and is_adapter(folder) else [folder]
    files = [p for f in folders for p in sorted(f.glob("*")) if p.suffix in _WEIGHTS]
    stats = [(p.name, p.stat()) for p in files]
    return [fingerprint(folder, base), [[n, s.st_size, s.st_mtime_ns] for n, s in stats]]


_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def _config(folder: Path | None) -> dict[str, Any]:
    file = folder / "config.json" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}


def _classes(folder: Path | None) -> dict[str, int]:
    """Return class name -> index as a configuration says, {} where it says nothing."""
    config = _config(folder)
    try:
        found = dict(config.get("label2id") or {})
        found = found or {name: i for i, name in dict(config.get("id2label") or {}).items()}
        return {str(name): int(i) for name, i in found.items()}
    except (TypeError, ValueError):
        return {}


def _says_names(labels: Mapping[str, int]) -> bool:
    return any(name != f"LABEL_{i}" for name, i in labels.items())


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
