"""What makes a folder of weights a model: config, tokenizer, experts' folders, card, provenance."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from eutectic.checkpoint.adapters import WEIGHT_NAMES
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG
from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.folder import copy_side_files, module_weights
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.output_format import (
    SHARD_INDEX_NAME,
    OutputTensor,
    shard_name,
    weight_index_bytes,
)
from eutectic.checkpoint.quantised.side_files import forget_quantisation
from eutectic.checkpoint.writer import OutputFile, write_atomically
from eutectic.conventions import CLASSIFIERS, is_token_embedding
from eutectic.execution.tasks import Finished
from eutectic.execution.tensor_values import flat_ranges
from eutectic.planning.cost import treatments
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import OutputLayout, Plan
from eutectic.storage import storage_of
from eutectic.types import Statistics

Spelling = Callable[[str], str]  # the base's name of a tensor -> the expert's


def write_expert_folders(plan: Plan, inputs: Inputs, model: Path, layout: OutputLayout) -> None:
    """Write `experts/<name>/` for every expert with heads of its own.

    Shards are linked, not copied, where the storage allows it. One that holds a head, or whose keys
    the expert spells with another prefix, is written once per variant.
    """
    storage = storage_of(model)
    variants: dict[tuple[str, tuple[str, ...]], Path] = {}
    for name, heads in plan.heads.items():
        expert = inputs.experts[name]
        folder = model / "experts" / name
        spelling = _spelling(expert)
        own = frozenset(head.name for head in heads)
        rows = _head_rows(expert, heads, spelling, plan.output.dtype)
        ends = layout.format.lay_out(rows, {})
        count = len(layout.files) + len(ends)
        shards: list[OutputFile] = []
        for position, file in enumerate(layout.files, start=1):
            shard = OutputFile(
                shard_name(position, count),
                tuple((spelling(k), d, s) for k, d, s in file.entries if k not in own),
                file.metadata,
            )
            if not shard.entries:
                continue
            shards.append(shard)
            source = model / file.name
            keys = tuple(k for k, _, _ in shard.entries)
            if keys != tuple(k for k, _, _ in file.entries):
                if (file.name, keys) not in variants:
                    _write_variant(OutputLayout(layout.format, (file,)), model, shard, folder, own)
                    variants[file.name, keys] = folder / shard.name
                source = variants[file.name, keys]
            if source != folder / shard.name:
                storage.copy(source, folder / shard.name, share=True)
        last = tuple(
            OutputFile(shard_name(position, count), file.entries, {"format": "pt"})
            for position, file in enumerate(ends, start=len(layout.files) + 1)
        )
        written = OutputLayout(layout.format, last)
        _write_heads(inputs, expert, dict(zip(heads, rows, strict=True)), folder, written)
        write_atomically(folder / SHARD_INDEX_NAME, weight_index_bytes([*shards, *last]))
        # The expert's own config and tokenizer replace the base's; an adapter may bring either.
        for donor in (inputs.index and inputs.index.folder, expert.folder):
            if donor is not None:
                copy_side_files(donor, folder)
        if expert.is_delta:
            _fit_config(folder / "config.json", expert, heads)


def _spelling(expert: Expert) -> Spelling:
    """Return how the expert spells the base's names: with or without a prefix, as all of them."""
    for name, entry in () if expert.is_delta else expert.entries.items():
        if entry.name == name:
            break
        if entry.name.endswith(name):
            more = entry.name.removesuffix(name)
            return lambda key: more + key
        if name.endswith(entry.name):
            less = name.removesuffix(entry.name)
            return lambda key: key.removeprefix(less)
    return lambda key: key


def _head_rows(
    expert: Expert, heads: Sequence[TensorEntry], spelling: Spelling, dtype: torch.dtype | None
) -> list[OutputTensor]:
    """Return an expert's heads as its folder holds them, under the expert's own names."""
    rows: list[OutputTensor] = []
    for head in heads:
        name = spelling(head.name)
        if head.name in expert.extra and not expert.is_delta:
            name = expert.extra[head.name].name
        stored = dtype if dtype is not None and head.dtype.is_floating_point else head.dtype
        rows.append(OutputTensor(name, stored, head.shape))
    return rows


def _write_heads(
    inputs: Inputs,
    expert: Expert,
    heads: Mapping[TensorEntry, OutputTensor],
    folder: Path,
    layout: OutputLayout,
) -> None:
    for file in layout.files:
        storage_of(folder).remove(folder / file.name)
    with layout.open(folder, resume=True) as files:
        for head, row in heads.items():
            for start, stop in flat_ranges(head.numel):
                values = _head_values(inputs, expert, head, start, stop)
                files.write(row.name, start, values.to(row.dtype))
        files.sync()


def _head_values(
    inputs: Inputs, expert: Expert, head: TensorEntry, start: int, stop: int
) -> Tensor:
    if head.name in expert.extra:
        return expert.read_extra(head.name, start, stop)
    own = inputs.base.entries[head.name]
    if not expert.is_delta or head.shape != own.shape:
        return expert.read(head.name, start, stop)
    # An adapter may hold the head as a change of the base's.
    dtype = torch.promote_types(own.dtype, torch.float32)
    base = inputs.base.read(head.name, start, stop).to(dtype)
    return expert.weight(head.name, start, stop, base=base, dtype=dtype)


def _write_variant(
    merged: OutputLayout, model: Path, shard: OutputFile, folder: Path, own: frozenset[str]
) -> None:
    """Write a shard of the merged model without some tensors, or under other names."""
    storage_of(folder).remove(folder / shard.name)
    variant = OutputLayout(merged.format, (shard,))
    with merged.open(model, resume=True) as source, variant.open(folder, resume=True) as files:
        kept = [(k, s) for k, _, s in merged.files[0].entries if k not in own]
        for (key, shape), (spelled, _, _) in zip(kept, shard.entries, strict=True):
            for start, stop in flat_ranges(math.prod(shape)):
                files.write(spelled, start, source.read_back(key, start, stop))
        files.sync()


_TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
_TASK_OF_CLASS = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")


def _fit_config(config: Path, expert: Expert, heads: Sequence[TensorEntry]) -> None:
    """Tell the base's config what an adapter's heads are: their classes, task and vocabulary."""
    if not config.exists():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    for head in heads:
        rows = head.shape[0] if len(head.shape) == 2 else 0
        if rows and head.name.endswith(CLASSIFIERS):
            if len(values.get("id2label") or {}) != rows:
                values["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
                values["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
            ending = _TASKS.get(str(expert.config.get("task_type")))
            if ending is not None and values.get("architectures"):
                names = values["architectures"]
                values["architectures"] = [_TASK_OF_CLASS.sub(ending, name) for name in names]
        elif rows and is_token_embedding(head.name) and head.name in expert.entries:
            values["vocab_size"] = rows
    write_atomically(config, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


PROVENANCE = "eutectic.json"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


def document(
    plan: Plan, inputs: Inputs, finished: Mapping[tuple[str, str], Finished], identity: str
) -> dict[str, Any]:
    """Return the provenance of a merge: what was asked, what each tensor took, hashes, versions.

    `identity` is the request's (see `request_identity`): by it a sweep knows its own merges again.
    Nothing depends on when or how it ran, so that a resumed run gives the same bytes.
    """
    names = plan.request.names
    provenance: dict[str, Any] = {
        "eutectic": version("eutectic"),
        "torch": version("torch"),
        "request": identity,
        "recipe": plan.stated_recipe,
        "scale": plan.scale,
        "treatments": treatments(plan),
        "notes": [str(note) for note in plan.notes],
        "parents": {
            "base": {
                "name": names["base"],
                "fingerprint": inputs.base.fingerprint(),
                "licence": _licence(inputs.index.folder if inputs.index else None),
            },
            **{
                name: _parent(names[name], expert, inputs.statistics.get(name))
                for name, expert in inputs.experts.items()
            },
        },
        "tensors": {
            t.name: {
                "treatment": t.treatment.value,
                "method": t.method,
                "scale": t.scale,
                "reason": t.why,
                "sha256": finished["merge", t.name].sha256,
            }
            for t in plan.tensors
        },
    }
    if inputs.initial is not None:
        provenance["initial"] = _parent(names["initial"], inputs.initial)
    return provenance


def _parent(name: str, expert: Expert, statistics: Statistics | None = None) -> dict[str, Any]:
    """Describe an expert, and which data its statistics are of, if the recipe names any."""
    known = statistics is not None and statistics.provenance
    data = {"statistics": known["data"]} if known else {}
    licence = _licence(expert.folder)
    return {"name": name, "fingerprint": expert.fingerprint(), "licence": licence, **data}


def write_folder(
    plan: Plan,
    inputs: Inputs,
    model: Path,
    layout: OutputLayout,
    provenance: Mapping[str, Any],
    records: Mapping[str, Any],
) -> None:
    """Complete a folder of merged weights; may be repeated after a kill."""
    assert inputs.index is not None
    layout.format.finish(model, layout.files)
    donor = inputs.index.folder
    if plan.output.side_files != "base":
        donor = inputs.experts[plan.output.side_files].folder or donor
    if not (donor / "config.json").is_file():  # an adapter brings a tokenizer at most
        copy_side_files(inputs.index.folder, model)
    copy_side_files(donor, model)
    if layout.files[0].name == WEIGHT_NAMES[0]:  # (IA)³ vectors: the output is an adapter again
        copy_side_files(donor, model, [ADAPTER_CONFIG])
    copy_side_files(inputs.index.folder, model, module_weights(inputs.index.folder))
    write_expert_folders(plan, inputs, model, layout)
    asked = plan.output.dtype
    stated = _stated_dtype(inputs.config) if asked is None else _name_of(asked)
    dtype = stated or _prevailing_dtype(layout.files)
    for folder in model.glob("experts/*"):
        forget_quantisation(folder)
        _state_dtype(folder / "config.json", dtype)
    if forget_quantisation(model) or asked is not None or plan.output.side_files != "base":
        _state_dtype(model / "config.json", dtype)
    write_atomically(model / "README.md", card(provenance).encode())
    text = json.dumps({**provenance, "records": dict(records)}, indent=1, ensure_ascii=False)
    write_atomically(model / PROVENANCE, (text + "\n").encode())


def card(provenance: Mapping[str, Any]) -> str:
    """Return the model card: front matter that hubs read, parents, recipe."""
    parents = provenance["parents"]
    sources = dict(parents)
    if "initial" in provenance:
        sources["initial"] = provenance["initial"]
    licences = {p["licence"] for p in sources.values()}
    front: dict[str, Any] = {"tags": ["merge", "eutectic"], "base_model": [parents["base"]["name"]]}
    if len(licences) == 1 and "unknown" not in licences:
        front["license"] = licences.pop()
    rows = "\n".join(
        f"| {role} | {p['name']} | {p['licence']} | `{p['fingerprint'][:16]}` |"
        for role, p in sources.items()
    )
    counts = ", ".join(f"{n} {name}" for name, n in provenance["treatments"].items())
    notes = "".join(f"- {note}\n" for note in provenance["notes"]) or "- none\n"
    recipe = yaml.safe_dump(provenance["recipe"], sort_keys=False, allow_unicode=True)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# Merged model\n\nMerged from {len(parents) - 1} experts by "
        f"`{provenance['recipe']['method']}` with scale {provenance['scale']:g}, using eutectic "
        f"{provenance['eutectic']} (torch {provenance['torch']}). Tensors: {counts}.\n\n"
        f"| role | model | licence | fingerprint |\n|---|---|---|---|\n{rows}\n\n"
        "The fingerprint identifies a checkpoint's content by samples of every tensor. Hashes of "
        f"every merged tensor are in `{PROVENANCE}`.\n\n"
        f"## Recipe\n\n```yaml\n{recipe}```\n\n## Notes\n\n{notes}"
    )


def _licence(folder: Path | None) -> str:
    """Return the licence that a model's card states, or "unknown"."""
    if folder is None:
        return "unknown"
    try:
        match = _FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        front = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "unknown"
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else "unknown"


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    found = config.get("dtype", config.get("torch_dtype"))
    known = isinstance(found, str) and isinstance(getattr(torch, found, 0), torch.dtype)
    return found if known else None


def _prevailing_dtype(files: Sequence[OutputFile]) -> str:
    """Return the dtype of most of the output's numbers."""
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        for _, dtype, shape in file.entries:
            counts[dtype] += math.prod(shape) if dtype.is_floating_point else 0
    return _name_of(counts.most_common(1)[0][0])


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state_dtype(config: Path, dtype: str) -> None:
    """Write the output's dtype into its config under whichever key the model uses."""
    if not config.exists():
        return  # bare weights without a config
    values = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    values[key] = _name_of(getattr(torch, dtype))
    write_atomically(config, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
