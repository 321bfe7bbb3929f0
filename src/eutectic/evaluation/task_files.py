"""Files of tasks: what they may say, read and checked as a whole with line numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from eutectic.data.columns import Columns
from eutectic.errors import Fault, TaskError, suggest
from eutectic.evaluation.metrics import METRICS_OF_KIND
from eutectic.models.linear_head import Pooling
from eutectic.models.task_kinds import (
    EMBEDDING,
    LABELLED,
    PICTURES,
    WITH_HEAD,
    ZERO_SHOT,
    TaskKind,
    spelled,
)
from eutectic.models.zero_shot import MOST_PROMPTS
from eutectic.recipes.document import (
    Location,
    Source,
    by_line,
    exists,
    inside,
    no_file,
    read_document,
    schema_fault,
)
from eutectic.recipes.schema import Name
from eutectic.vocabulary.chat_templates import is_template, template_fault

Split = Literal["proxy", "validation", "test"]
MOST_LABELS = 50_000  # twice as many as the largest sets of pictures have
SPLITS: tuple[Split, ...] = ("proxy", "validation", "test")
NOT_TOKENIZED = (*PICTURES, "function", "lm-eval")  # here, that is


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    """The rows of one split."""

    path: str  # jsonl, csv, tsv, parquet, folder of images, or folder written by `datasets`
    # This share of the rows, chosen by the hash of their inputs; None takes them all.
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    subset: str | None = None  # the split inside a `datasets` folder that has several


class HarnessOptions(_Strict):
    """What lm-evaluation-harness is asked for."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]  # or groups; their rows are pooled
    num_fewshot: Annotated[int, Field(ge=0)] | None = None  # None: what each task says
    limit: Annotated[int, Field(ge=1)] | None = None  # the first rows of each of its tasks only
    filter: str | None = None  # which of its filters, where a task has several
    include_path: str | None = None  # folder with further tasks, which may run Python code


class TaskSpec(_Strict):
    """One task: data with known answers, a kind of model, a metric."""

    kind: TaskKind  # what the model does
    # Split -> file, or {path, share, subset}; a file alone is the split `test`.
    data: Annotated[dict[Split, Part], Field(default_factory=dict[Split, Part])]
    columns: Columns = Columns()  # names of columns, where they are not the usual ones
    metric: str | None = None  # None takes the kind's first; see `metrics.METRICS_OF_KIND`
    expert: Name | None = None  # whose head and accuracy it refers to; None: the task's own name
    # Class names in the order of the model's outputs; None: as its configuration says.
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None  # tokens; None: the model's, at most 512
    # File of `weight` [outputs, hidden] and `bias` for pooled features; None: the model's own head.
    head: str | None = None
    base_head: str | None = None  # the same for the base, where it differs
    # Of features: mean of unmasked tokens, first token, or the model's own (CLIP: projected image).
    # Of vectors of texts: None, what the checkpoint says. Of features: None is the mean.
    pooling: Pooling | None = None
    normalize: bool = False  # scale features to length 1 before the head
    # Shell patterns of the expert's head, besides what the base lacks or has in another shape.
    head_tensors: tuple[str, ...] = ()
    # Of zero-shot tasks: texts with {} for a class name; None: "a photo of a {}.".
    prompts: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_PROMPTS)] | None = None
    # The whole model that completes towers of pictures alone; None: the base.
    text_model: str | None = None
    # Of messages: a known template (chatml, …), Jinja, or the folder of a model that has one; None:
    # the checkpoint's own, else the expert's.
    chat_template: Annotated[str, Field(min_length=1, max_length=200_000)] | None = None
    corpus: str | None = None  # of retrieval: the documents to rank, a file of `id` and `text`
    function: str | None = None  # `module:function` or `file.py:function`, of the kind `function`
    options: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of the function
    harness: HarnessOptions | None = None  # for `lm-eval`, which brings its rows and metrics

    @field_validator("kind", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> str:
        found = spelled(str(value))
        if found not in METRICS_OF_KIND:
            raise ValueError(f"must be one of {', '.join(METRICS_OF_KIND)}")
        return found

    @field_validator("labels", mode="before")
    @classmethod
    def _label_names(cls, value: Any) -> Any:
        # YAML reads an unquoted `1` as a number; it is kept as text.
        if not isinstance(value, list):
            return value
        listed = cast("list[Any]", value)
        if any(isinstance(v, bool) for v in listed):
            raise ValueError("YAML reads unquoted yes, no, on, off as true and false: quote them")
        if len(listed) > MOST_LABELS:
            raise ValueError(f"{len(listed):,} classes, the limit is {MOST_LABELS:,}")
        names = [str(v) for v in listed]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise ValueError(f"each class is named once; twice there: {', '.join(twice)}")
        return names

    @field_validator("prompts")
    @classmethod
    def _prompt_places(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in value or ():
            if text.count("{}") != 1:
                raise ValueError(f"a prompt has one {{}} for the class name, got '{text}'")
        return value

    @field_validator("chat_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and is_template(value) and (fault := template_fault(value)):
            raise ValueError(fault.what)
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"test": value}
        if not isinstance(value, Mapping):
            return value
        parts = cast("Mapping[Any, Any]", value)
        return {s: {"path": p} if isinstance(p, str) else p for s, p in parts.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> TaskSpec:
        known = METRICS_OF_KIND[self.kind]
        is_harness = self.kind == "lm-eval"
        if self.metric is not None and self.metric not in known and not is_harness:
            raise ValueError(
                f"metric '{self.metric}' is none of {self.kind}: {', '.join(known)}."
                f"{suggest(self.metric, known)}"
            )
        is_function = self.kind == "function"
        if is_function != (self.function is not None):
            raise ValueError("`function` and the kind 'function' belong together")
        if self.options and not is_function:
            raise ValueError("`options` are for the kind 'function'")
        if is_harness != (self.harness is not None):
            raise ValueError("`harness` and the kind 'lm-eval' belong together")
        if is_harness and self.data:
            raise ValueError("`data` is not for the kind 'lm-eval', which brings its own rows")
        if not is_function and not is_harness and not self.data:
            raise ValueError("'data' is missing")
        pools = self.head is not None or self.kind in EMBEDDING
        if self.pooling is not None and not pools:
            raise ValueError(f"pooling needs `head`, or one of the kinds {', '.join(EMBEDDING)}")
        if self.head is None and (self.base_head or self.normalize):
            raise ValueError("base_head and normalize need `head`")
        if (self.kind == "retrieval") != (self.corpus is not None):
            raise ValueError("`corpus` and the kind 'retrieval' belong together")
        if self.labels is not None and self.kind not in LABELLED:
            raise ValueError(f"`labels` name classes, which the kind '{self.kind}' has not")
        if (self.prompts or self.text_model) and self.kind != ZERO_SHOT:
            raise ValueError(f"`prompts` and `text_model` are for the kind '{ZERO_SHOT}'")
        if self.max_length is not None and self.kind in NOT_TOKENIZED:
            raise ValueError(f"`max_length` is not for the kind '{self.kind}'")
        if self.kind == "language-model" and self.max_length == 1:
            raise ValueError("max_length must be at least 2: each token is predicted from others")
        if self.chat_template is not None and self.kind != "language-model":
            raise ValueError("`chat_template` is for the kind 'language-model'")
        if self.head is not None and self.kind not in WITH_HEAD:
            raise ValueError(f"`head` is not for the kind '{self.kind}'")
        if self.head_tensors and self.head is not None:
            raise ValueError(
                "`head_tensors` name tensors of the models' own heads; `head` is a file"
            )
        if self.head_tensors and self.kind in (*EMBEDDING, ZERO_SHOT, "function"):
            raise ValueError(
                f"`head_tensors` is not for the kind '{self.kind}', which lends no head"
            )
        shares: dict[tuple[str, str | None], list[float | None]] = {}
        for part in self.data.values():
            shares.setdefault((part.path, part.subset), []).append(part.share)
        for (path, _), found in shares.items():
            if len(found) > 1 and (
                None in found or sum(map(float, filter(None, found))) > 1.000001
            ):
                raise ValueError(f"splits of one file ({path}) need shares of at most 1 in sum")
        return self


class Task(TaskSpec):
    """A checked task with its name; paths are absolute or relative to the working folder."""

    name: str

    @property
    def expert_name(self) -> str:
        """The expert that the task belongs to."""
        return self.expert or self.name

    @property
    def metric_name(self) -> str:
        """The metric in force."""
        return self.metric or METRICS_OF_KIND[self.kind][0]

    @property
    def formula(self) -> str:
        """How the metric is computed from outcomes, by its name in `metrics`."""
        return "mean" if self.kind == "lm-eval" else self.metric_name


class TaskFile(_Strict):
    """The whole file."""

    tasks: Annotated[dict[Name, TaskSpec], Field(min_length=1)]


def load_tasks(path: str | Path) -> dict[str, Task]:
    """Return the tasks of a YAML file by name, in its order.

    Relative paths in it start at the file's folder.

    Raises:
        TaskError: listing every fault, each with its line.
    """
    values, source, faults = read_document(path, "a file of tasks", "tasks", TaskError)
    try:
        checked = TaskFile.model_validate(dict(values))
    except ValidationError as error:
        faults += [schema_fault(item, source, _known_keys) for item in error.errors()]
        raise TaskError(by_line(faults), source.name) from None
    tasks: dict[str, Task] = {}
    for name, spec in checked.tasks.items():
        values, missing = _resolved(name, spec, source)
        faults += missing
        try:
            tasks[name] = Task.model_validate(values)
        except ValidationError as error:  # two names of one file are one only when resolved
            found = [{**item, "loc": ("tasks", name, *item["loc"])} for item in error.errors()]
            faults += [schema_fault(item, source, _known_keys) for item in found]
    if faults:
        raise TaskError(by_line(faults), source.name)
    return tasks


def _known_keys(location: Location) -> list[str]:
    inside = [str(part) for part in location[2:]]
    if len(location) == 1:
        return list(TaskFile.model_fields)
    if inside[:1] == ["data"] and len(inside) > 2:
        return list(Part.model_fields)
    if inside[:1] == ["columns"] and len(inside) > 1:
        return list(Columns.model_fields)
    if inside[:1] == ["harness"] and len(inside) > 1:
        return list(HarnessOptions.model_fields)
    return list(TaskSpec.model_fields)


def _resolved(name: str, spec: TaskSpec, source: Source) -> tuple[dict[str, Any], list[Fault]]:
    """Return a task's values with paths that start at the file's folder, and those not there."""
    values: dict[str, Any] = spec.model_dump() | {"name": name}
    harness = values["harness"] or {}
    places: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        (values["data"][split], "path", ("data", split)) for split in spec.data
    ]
    places += [(values, key, (key,)) for key in ("head", "base_head", "text_model", "corpus")]
    places.append((harness, "include_path", ("harness", "include_path")))
    if spec.chat_template is not None and not is_template(spec.chat_template):
        places.append((values, "chat_template", ("chat_template",)))  # it is a folder then
    if spec.function is not None and ".py:" in spec.function:
        places.append((values, "function", ("function",)))
    faults: list[Fault] = []
    for holder, key, where in places:
        stated = holder.get(key)
        if stated is None:
            continue
        file = stated.rpartition(":")[0] if key == "function" else stated
        path = inside(file, source)
        if not exists(path):
            faults.append(no_file(("tasks", name, *where), file, source))
        holder[key] = f"{path}{stated.removeprefix(file)}"
    return values, faults
