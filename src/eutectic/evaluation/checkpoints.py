"""Checkpoints to evaluate with their roles; the model, classes and tokenizer of each per task."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eutectic.checkpoint.experts import is_adapter
from eutectic.checkpoint.index import read_json_object
from eutectic.checkpoint.locating import locate
from eutectic.checkpoint.module_folders import MODULES_NAME
from eutectic.data.python_functions import source_file
from eutectic.errors import CheckpointError, Fault, RequestError, TaskError, suggest
from eutectic.evaluation.identities import (
    ROUTED,
    ROUTED_HEADS,
    digest_of,
    file_hash,
    head_hashes,
    processor_hash,
    versions,
    weights_identity,
)
from eutectic.evaluation.task_files import Task
from eutectic.models.sentence_modules import SETTINGS, hang_on
from eutectic.models.task_kinds import (
    ARCHITECTURES,
    CLASSIFICATION,
    EMBEDDING,
    MODEL_CLASSES,
    PICTURES,
    WITH_HEAD,
    ZERO_SHOT,
)
from eutectic.models.task_models import (
    EXPERTS,
    GENERATION,
    borrows_head,
    checkpoint_tensors,
    completing,
    head_advice,
    lacking_head,
    load_model,
    names_no_head,
)
from eutectic.models.zero_shot import embed_pictures
from eutectic.storage import view_once
from eutectic.vocabulary.chat_templates import template_of
from eutectic.words import few

# Of a task: what counts by its content, not by its name.
_BY_CONTENT = {"name", "data", "head", "base_head", "corpus"}
Role = Literal["base", "expert", "model"]
RoutingMode = Literal["route", "oracle", "base"]
EXPERTS_MEAN = "experts"


_PROVENANCE = "eutectic.json"
_NUMBER = re.compile(r"\d+(\.\d+)?(e-\d+)?")  # a sweep's folders are called by their weights


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

    def of_expert(self, task: Task) -> Path:
        """Return where a merged or routed model keeps the task's expert; it need not be there."""
        return self.folder / (ROUTED_HEADS if self.routed else EXPERTS) / task.expert_name

    def runs_from(self, task: Task) -> Path:
        """Return the folder that the task's model is loaded from."""
        own = self.of_expert(task)
        kept = task.head is None and own.is_dir() and not self.routed
        return own if kept else self.folder


@dataclass(frozen=True)
class Checkpoints:
    """All checkpoints of an evaluation, base and experts for reference first."""

    base: Path | None
    experts: Mapping[str, Path]
    all: tuple[Checkpoint, ...]
    routing: RoutingMode = "route"

    def head_of(self, checkpoint: Checkpoint, task: Task) -> Path | None:
        """Return the expert folder that lends its head, or None where none is needed."""
        expert = self.experts.get(task.expert_name)
        own_head = checkpoint.of_expert(task).is_dir() or task.kind in EMBEDDING
        return None if task.head is not None or expert == checkpoint.folder or own_head else expert

    def _homes(self, checkpoint: Checkpoint) -> list[Path]:
        return [f for f in (checkpoint.folder, self.base) if f is not None]

    def processor(self, checkpoint: Checkpoint, task: Task) -> Path:
        """Return the folder whose tokenizer or image processor encodes the task's rows.

        The first that has one and a configuration; an adapter's tokenizer goes with the base's.
        """
        folders = [checkpoint.of_expert(task), checkpoint.folder]
        folders += [f for f in (self.experts.get(task.expert_name), self.base) if f is not None]
        for folder in folders:
            brings = (folder / "tokenizer_config.json").exists()
            adapted = brings and self.base is not None and is_adapter(folder)
            adapted = adapted and task.kind not in PICTURES
            configured = adapted or (folder / "config.json").exists()
            if configured and processor_hash(folder):
                return folder
        raise RequestError(
            f"{checkpoint.folder}: neither it, nor the expert, nor the base has a tokenizer or "
            f"image processor for task '{task.name}'.\nCopy the tokenizer's files into one of them."
        )

    def with_template(self, checkpoint: Checkpoint, task: Task) -> Task:
        """Return the task with the expert's or the base's chat template where the own lacks one."""
        if task.kind != "language-model" or task.chat_template is not None:
            return task
        if template_of(self.processor(checkpoint, task)) is not None:
            return task
        others = (self.experts.get(task.expert_name), self.base)
        found = next((f for f in others if f is not None and template_of(f) is not None), None)
        return task if found is None else task.model_copy(update={"chat_template": str(found)})

    def label_ids(self, checkpoint: Checkpoint, task: Task) -> dict[str, int]:
        """Return class name -> index in the outputs of the head that a checkpoint runs with.

        From the configuration that the head belongs to: the expert's where it is borrowed or comes
        from a file, else the checkpoint's own. Names that only count (LABEL_0) give way to others.
        Rows may number their classes; numbers are the expert's, and are names here where its
        order is another than the head's.
        """
        if task.kind not in CLASSIFICATION:
            return {}
        own = checkpoint.of_expert(task)
        expert = self.experts.get(task.expert_name)
        lender = self.head_of(checkpoint, task)
        if task.head is not None:
            folders = (own, expert, checkpoint.folder)
        elif own.is_dir():
            folders = (own, expert)
        elif checkpoint.routed:
            fits = str(_config(checkpoint.folder).get("architectures")).rstrip("']")
            lent = lender is not None and not fits.endswith(ARCHITECTURES[task.kind])
            folders = (lender, checkpoint.folder) if lent else (checkpoint.folder, expert)
        elif lender is None:
            folders = (checkpoint.folder, expert)
        elif borrows_head(checkpoint.folder, lender, task, self.base):
            folders = (lender, checkpoint.folder)
        else:
            folders = (checkpoint.folder, lender)
        known = [found for folder in folders if (found := _classes(folder))]
        if not known and any(f is not None and is_adapter(f) for f in folders):
            known = [found] if (found := _classes(self.base)) else []  # whose head it adapts
        if not known:
            return {}
        says_names = (k for k in known if any(n != f"LABEL_{i}" for n, i in k.items()))
        labels = next(says_names, known[0])
        meant = _classes(expert)
        if meant != labels and meant.keys() == labels.keys():
            return {**{str(i): labels[name] for name, i in meant.items()}, **labels}
        return labels

    def _sources(self, checkpoint: Checkpoint, task: Task) -> list[Path]:
        """Return the folders that the task's model and its head are loaded from."""
        own = checkpoint.runs_from(task)
        whole = completing(own, task, self.base) if task.kind == ZERO_SHOT else None
        lender = None if task.kind == ZERO_SHOT else self.head_of(checkpoint, task)
        folders = (own, whole, lender)
        return [folder for folder in folders if folder is not None]

    def reading(self, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
        """Return what decides a checkpoint's outputs besides weights, rows and settings."""
        folders = self._sources(checkpoint, task)
        if self.base is not None and any(is_adapter(f) for f in folders):
            folders.append(self.base)
        generation = [f / GENERATION for f in (*folders, checkpoint.folder)]
        is_function = task.kind == "function"
        tokenizers = [processor_hash(Path(f)) for f in (task.text_model, self.base) if f]
        encoder = checkpoint.folder if is_function else self.processor(checkpoint, task)
        return {
            "configs": [_config(f) for f in folders],
            "labels": sorted(self.label_ids(checkpoint, task).items()),
            "processor": processor_hash(encoder),
            **({"tokenizers": tokenizers} if task.kind == ZERO_SHOT else {}),
            **self._template(checkpoint, task),
            **self._modules(checkpoint, task),
            "generation": [file_hash(f) if f.is_file() else None for f in generation],
        }

    def _template(self, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
        """Return the identity of a chat template that lies in another folder than the tokenizer."""
        named = self.with_template(checkpoint, task).chat_template
        if named is None or not Path(named).is_dir():
            return {}
        return {"template": digest_of(template_of(Path(named)))}

    def _modules(self, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
        """Return the identity of what says how vectors are made of token states."""
        if task.kind not in EMBEDDING:
            return {}
        names = (MODULES_NAME, *SETTINGS)
        homes = self._homes(checkpoint)
        files = [home / name for home in homes for name in names]
        files += [file for home in homes for file in sorted(home.glob("*_*/config.json"))]
        return {"modules": [(f.name, file_hash(f)) for f in files if f.is_file()]}

    def pair_identity(
        self, checkpoint: Checkpoint, task: Task, data_hash: str, settings: Any
    ) -> str:
        """Return a hash of all that decides a pair's outcomes."""
        code = None if task.function is None else source_file(task.function.rpartition(":")[0])
        described = {
            "weights": [weights_identity(f, self.base) for f in self._sources(checkpoint, task)],
            "reading": self.reading(checkpoint, task),
            "heads": head_hashes(task),
            "role": checkpoint.role if task.base_head else None,
            "routing": [self.routing, task.expert_name] if checkpoint.routed else None,
            "function": file_hash(code) if code is not None else None,
            "task": task.model_dump(mode="json", exclude=_BY_CONTENT),
            "data": data_hash,
            "settings": settings,
            "versions": versions(),
        }
        return digest_of(described)

    def load(self, checkpoint: Checkpoint, task: Task, device: str = "cpu") -> Any:
        """Return the model that runs a task, on a device; see `models.load_model`."""
        model = self._load(checkpoint, task)
        return model if device == "cpu" else model.to(device)

    def _load(self, checkpoint: Checkpoint, task: Task) -> Any:
        if not checkpoint.routed:
            head = self.head_of(checkpoint, task)
            return load_model(checkpoint.folder, task, base=self.base, expert=head)
        from eutectic.routed import load_routed
        from eutectic.routed.head_files import expert_head
        from eutectic.routed.heads import heads_of, with_head

        model = load_routed(checkpoint.folder).float()
        if task.kind == ZERO_SHOT:
            return self._with_texts(model, checkpoint, task)
        if task.kind in EMBEDDING:
            homes = self._homes(checkpoint)
            state = checkpoint_tensors(checkpoint.folder)
            return hang_on(model, homes, state, task.pooling).eval()
        if task.head is None and task.expert_name in heads_of(model):
            return heads_of(model)[task.expert_name]
        name, lender = type(model).__name__, self.head_of(checkpoint, task)
        endings = ("Model",) if task.head is not None else ARCHITECTURES[task.kind]
        if name.endswith(endings) and not (task.head is not None and "LMHead" in name):
            return model
        if task.kind in WITH_HEAD and lender is not None and not is_adapter(lender):
            head = expert_head(lender, checkpoint.folder)
            if head is not None:
                return with_head(model, head, f"expert '{task.expert_name}'")[0].float()
        advice = (
            f"Name an expert that has this head with --expert {task.expert_name}=PATH, or build "
            "the routed model from a merged folder that keeps experts' heads."
        )
        raise RequestError(
            f"{checkpoint.folder}: a routed {name} cannot run task '{task.name}' "
            f"({task.kind}); it takes {' or '.join('*' + e for e in endings)}."
            + (f"\n{advice}" if task.kind in WITH_HEAD and task.head is None else "")
        )

    def _with_texts(self, model: Any, checkpoint: Checkpoint, task: Task) -> Any:
        """Return a routed model that embeds pictures and texts, of whichever towers it has."""
        from eutectic.routed.head_files import whole_around
        from eutectic.routed.heads import with_head

        whole = completing(checkpoint.folder, task, self.base)
        if whole is not None:
            head = whole_around(whole, checkpoint.folder)
            model = with_head(model, head, str(whole))[0].float()
        return embed_pictures(model)

    @contextmanager
    def routed_as_asked(self, model: Any, checkpoint: Checkpoint, task: Task) -> Iterator[None]:
        """Choose the experts of a routed model; nothing for other models."""
        if not checkpoint.routed:
            yield
            return
        from eutectic.routed import routing

        expert = task.expert_name if self.routing == "oracle" else None
        with routing(model, mode=self.routing, expert=expert):
            yield


def check_heads(checkpoints: Checkpoints, tasks: Mapping[str, Task]) -> None:
    """Refuse, before any row is run, checkpoints that have no head for a task and borrow none.

    Raises:
        CheckpointError: naming the tasks, and the experts to name.
        TaskError: `head_tensors` that fit none of the expert's.
    """
    for checkpoint in checkpoints.all:
        own = [
            t
            for t in tasks.values()
            if checkpoint.role != "expert" or t.expert_name == checkpoint.name
        ]
        lacking: dict[str, tuple[str, ...]] = {}
        known: dict[str, tuple[str, ...]] = {}
        for task in own:
            lender = checkpoints.head_of(checkpoint, task)
            if checkpoint.routed or lender is not None:
                if lender is not None and not checkpoint.routed:
                    _check_patterns(checkpoint, lender, task, checkpoints.base)
                continue
            if checkpoint.of_expert(task).is_dir() or task.head is not None:
                continue
            auto = MODEL_CLASSES.get(task.kind, "")
            if auto not in known:
                known[auto] = lacking_head(checkpoint.folder, task, checkpoints.base)
            if known[auto]:
                lacking[task.name] = known[auto]
        if lacking:
            first = tasks[next(iter(lacking))]
            which = f"task '{first.name}' ({first.kind}) needs"
            if len(lacking) > 1:
                which = f"{len(lacking)} tasks ({few(list(lacking))}) need"
            raise CheckpointError(
                f"{checkpoint.folder}: {which} tensors that the checkpoint lacks: "
                f"{few(lacking[first.name])}.\n{head_advice(first.expert_name)}"
            )


def _check_patterns(checkpoint: Checkpoint, lender: Path, task: Task, base: Path | None) -> None:
    if names_no_head(checkpoint.folder, lender, task, base):
        patterns = ", ".join(task.head_tensors)
        fault = Fault(
            "head_tensors", f"{patterns}: no tensor of {lender} has such a name.", "head_tensors"
        )
        raise TaskError([fault], f"task '{task.name}'")


def named_checkpoints(
    tasks: Mapping[str, Task],
    base: str | Path | None,
    experts: Mapping[str, str | Path],
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    routing: RoutingMode,
) -> Checkpoints:
    """Return base, experts and models by name; one model may stand alone."""
    models = [models] if isinstance(models, str | Path) else models
    given = dict(models) if isinstance(models, Mapping) else {str(m).rstrip("/"): m for m in models}
    named = {n: path for name, folder in given.items() for n, path in _mixtures(name, folder)}
    wanted = [task.expert_name for task in tasks.values()]
    for name in experts:
        if name not in wanted:
            raise RequestError(
                f"the expert '{name}' has no task.{suggest(name, wanted)}\n"
                f"Tasks are of the experts: {', '.join(dict.fromkeys(wanted))}."
            )
    for name in named:
        if name in ("base", EXPERTS_MEAN, *experts):
            raise RequestError(f"the name '{name}' is taken; write another as NAME=FOLDER.")
    for name in {"base", EXPERTS_MEAN} & experts.keys():
        raise RequestError(f"an expert cannot be called '{name}'; tables use that name.")
    folders = {name: _folder(path) for name, path in experts.items()}
    root = None if base is None else _folder(base, full=True)
    found = [Checkpoint("base", "base", root)] if root is not None else []
    found += [Checkpoint(name, "expert", path) for name, path in folders.items()]
    found += [Checkpoint(name, "model", _folder(path)) for name, path in named.items()]
    if not found:
        raise RequestError("nothing to evaluate: name a base, experts or models.")
    for checkpoint in found:
        if not checkpoint.folder.is_dir():
            named_so = "" if checkpoint.name == str(checkpoint.folder) else f" ({checkpoint.name})"
            raise RequestError(f"{checkpoint.folder}: no such folder{named_so}.")
    if routing != "route" and not any(checkpoint.routed for checkpoint in found):
        raise RequestError(f"routing '{routing}' is for routed models, and none of these is one.")
    return Checkpoints(root, folders, tuple(found), routing)


def _mixtures(name: str, folder: str | Path) -> list[tuple[str, str | Path]]:
    """Return the merges of a sweep's folder, each by its weight; any other folder as it is."""
    path = view_once(folder)
    if not path.is_dir() or (path / _PROVENANCE).is_file():
        return [(name, folder)]
    found = [f for f in path.iterdir() if _NUMBER.fullmatch(f.name) and (f / _PROVENANCE).is_file()]
    found.sort(key=lambda f: float(f.name))
    return [(f"{name}/{f.name}", f) for f in found] or [(name, folder)]


def _folder(path: str | Path, *, full: bool = False) -> Path:
    """Return the folder of a checkpoint, the one below it where that alone holds weights."""
    place = view_once(path)
    return locate(place, full=full).path if place.is_dir() else place


def _config(folder: Path | None) -> dict[str, Any]:
    file = folder / "config.json" if folder is not None else None
    return read_json_object(file) if file is not None and file.is_file() else {}


def _classes(folder: Path | None) -> dict[str, int]:
    """Return class name -> index as a configuration says, {} where it says nothing."""
    config = _config(folder)
    with suppress(TypeError, ValueError):
        found = dict(config.get("label2id") or {})
        found = found or {name: i for i, name in dict(config.get("id2label") or {}).items()}
        return {str(name): int(i) for name, i in found.items()}
    return {}
