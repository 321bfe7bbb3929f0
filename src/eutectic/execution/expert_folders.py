"""The folders of the experts' own heads: the merged body, and what one expert alone has."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.folder import copy_side_files
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry, read_json_object
from eutectic.checkpoint.module_folders import ModuleFolder
from eutectic.checkpoint.output_format import (
    SHARD_INDEX_NAME,
    SINGLE_NAME,
    OutputFormat,
    OutputTensor,
    TensorFiles,
    shard_name,
    weight_index_bytes,
)
from eutectic.checkpoint.writer import OutputFile, write_atomically
from eutectic.conventions import CLASSIFIERS, is_token_embedding
from eutectic.execution.merging import narrow_finite
from eutectic.execution.tensor_values import flat_ranges
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import OutputLayout, Plan
from eutectic.storage import storage_of

Spelling = Callable[[str], str]  # the base's name of a tensor -> the expert's


Variants = dict[tuple[str, tuple[str, ...]], Path]  # file of the model, its keys -> a copy


@dataclass(frozen=True)
class _Target:
    """An expert's folder, and what it is written from."""

    folder: Path
    expert: Expert
    left_out: frozenset[str]  # of the model: the expert has heads in their place, or lacks them
    inputs: Inputs
    model: Path  # the folder of the merged model
    format: OutputFormat
    dtype: torch.dtype | None
    nonfinite: Literal["error", "allow"]
    variants: Variants


def write_expert_folders(plan: Plan, inputs: Inputs, model: Path, layout: OutputLayout) -> None:
    """Write `experts/<name>/` for every expert with heads of its own.

    Files are linked, not copied, where the storage allows it. One that holds a head, or whose keys
    the expert spells with another prefix, is written once per variant. What transformers reads has
    its heads in a shard of their own; what other loaders read stays one file. Output layers of the
    base that an expert lacks are in its folder neither: its class has no place for them.
    """
    index = inputs.index
    assert index is not None
    variants: Variants = {}
    for name, heads in plan.heads.items():
        expert, folder = inputs.experts[name], model / "experts" / name
        dtype, nonfinite = plan.output.dtype, plan.output.nonfinite
        left_out = plan.foreign_heads[name].union(head.name for head in heads)
        rules = (layout.format, dtype, nonfinite, variants)
        to = _Target(folder, expert, left_out, inputs, model, *rules)
        homes = {head: _home(head, expert, index) for head in heads}
        parts = {index.module_of(file.name): [] for file in layout.files}
        for file in layout.files:
            parts[index.module_of(file.name)].append(file)
        for module in dict.fromkeys([*parts, *homes.values()]):
            own = [head for head in heads if homes[head] == module]
            files = parts.get(module, [])
            if left_out.isdisjoint(key for file in files for key, _, _ in file.entries) and not own:
                _link(to, module, files)
            elif _in_shards(module, index):
                _write_shards(to, module, files, own)
            else:
                _write_one(to, module, files, own)
        # The expert's own config and tokenizer replace the base's; an adapter may bring either.
        copy_side_files(index.folder, folder)
        if expert.folder is not None:
            copy_side_files(expert.folder, folder, like=index.folder)
        if expert.is_delta:
            _fit_config(folder / index.main.file("config.json"), expert, heads)


def _home(head: TensorEntry, expert: Expert, index: CheckpointIndex) -> ModuleFolder:
    """Return the module that a head belongs to: the base's, or one that only the expert has."""
    if head.name in index.entries:
        return index.module_of(index.entries[head.name].file)
    theirs = getattr(expert.source, "index", index)
    known = {module.prefix: module for module in (*theirs.modules, *index.modules) if module.prefix}
    found = [prefix for prefix in known if head.name.startswith(prefix)]
    return known[max(found, key=len)] if found else index.module_of(index.main.file(""))


def _in_shards(module: ModuleFolder, index: CheckpointIndex) -> bool:
    """Tell whether the loader of a module reads shards, as transformers does."""
    if index.modules or module.folder:
        return module.transformer
    by_timm = "architecture" in index.config and "model_type" not in index.config
    return not by_timm and not any(file.startswith("open_clip_") for file in index.files)


def _link(to: _Target, module: ModuleFolder, files: Sequence[OutputFile]) -> None:
    """Put the files of a module without heads into an expert's folder."""
    spelling = _spelling(to.expert, module)
    spelt = [_spelt(file, file.name, spelling, to.left_out) for file in files]
    for file, shard in zip(files, spelt, strict=True):
        _put(to, file, shard)
    to.format.finish(to.folder, spelt)


def _write_shards(
    to: _Target, module: ModuleFolder, files: Sequence[OutputFile], heads: Sequence[TensorEntry]
) -> None:
    """Write a module's files without the heads, and the heads into shards of their own."""
    spelling = _spelling(to.expert, module)
    rows = _head_rows(to, heads, spelling)
    ends = to.format.lay_out(rows, {})
    count = len(files) + len(ends)
    names = [module.file(shard_name(position, count)) for position in range(1, count + 1)]
    shards: list[OutputFile] = []
    for file, name in zip(files, names, strict=False):
        shard = _spelt(file, name, spelling, to.left_out)
        if shard.entries:
            shards.append(shard)
            _put(to, file, shard)
    last = [
        OutputFile(name, file.entries, {"format": "pt"}, module.prefix)
        for name, file in zip(names[len(files) :], ends, strict=True)
    ]
    for file in last:
        storage_of(to.folder).remove(to.folder / file.name)
    if last:
        with to.format.open(to.folder, last, resume=True) as opened:
            _fill_heads(to, dict(zip(heads, rows, strict=True)), opened)
            opened.sync()
    index = module.file(SHARD_INDEX_NAME)
    write_atomically(to.folder / index, weight_index_bytes([*shards, *last]))


def _write_one(
    to: _Target, module: ModuleFolder, files: Sequence[OutputFile], heads: Sequence[TensorEntry]
) -> None:
    """Write a module with its heads as one file."""
    spelling = _spelling(to.expert, module)
    rows = _head_rows(to, heads, spelling)
    name = files[0].name if len(files) == 1 else module.file(SINGLE_NAME)
    body = [_spelt(file, name, spelling, to.left_out) for file in files]
    entries = [entry for part in body for entry in part.entries]
    entries += [(row.name, row.dtype, row.shape) for row in rows]
    said = {key: text for part in body for key, text in part.metadata.items()}
    whole = OutputFile(name, tuple(entries), {**said, "format": "pt"}, module.prefix)
    storage_of(to.folder).remove(to.folder / name)
    with to.format.open(to.folder, [whole], resume=True) as opened:
        for file, part in zip(files, body, strict=True):
            _copy_tensors(to, file, part, opened)
        _fill_heads(to, dict(zip(heads, rows, strict=True)), opened)
        opened.sync()


def _spelt(file: OutputFile, name: str, spelling: Spelling, left_out: frozenset[str]) -> OutputFile:
    """Return a file of the model as an expert's folder has it: under its names, without heads."""
    entries = tuple((spelling(k), d, s) for k, d, s in file.entries if k not in left_out)
    return replace(file, name=name, entries=entries)


def _put(to: _Target, file: OutputFile, shard: OutputFile) -> None:
    """Link a file of the model into the folder; write it, once per variant, where it differs."""
    source = to.model / file.name
    target = to.folder / shard.name
    keys = tuple(k for k, _, _ in shard.entries)
    if keys != tuple(k for k, _, _ in file.entries):
        if (file.name, keys) not in to.variants:
            storage_of(to.folder).remove(target)
            with to.format.open(to.folder, [shard], resume=True) as opened:
                _copy_tensors(to, file, shard, opened)
                opened.sync()
            to.variants[file.name, keys] = target
        source = to.variants[file.name, keys]
    if source != target:
        storage_of(to.folder).copy(source, target, share=True)


def _copy_tensors(to: _Target, file: OutputFile, shard: OutputFile, opened: TensorFiles) -> None:
    with to.format.open(to.model, [file], resume=True) as source:
        kept = [(k, s) for k, _, s in file.entries if k not in to.left_out]
        for (key, shape), (spelled, _, _) in zip(kept, shard.entries, strict=True):
            for start, stop in flat_ranges(math.prod(shape)):
                opened.write(spelled, start, source.read_back(key, start, stop))


def _spelling(expert: Expert, module: ModuleFolder) -> Spelling:
    """Return how the expert spells the base's names: with another prefix, or none, as all of them.

    Names of further modules begin with their folder's in every checkpoint.
    """
    if module.prefix:
        return lambda key: key
    for name, entry in () if expert.is_delta else expert.entries.items():
        if entry.name == name:
            break
        if entry.name.endswith(name):
            more = entry.name.removesuffix(name)
            return lambda key: more + key
        if name.endswith(entry.name):
            less = name.removesuffix(entry.name)
            return lambda key: key.removeprefix(less)
        ours, _, rest = name.partition(".")
        theirs, _, same = entry.name.partition(".")
        if rest == same:  # the body is called otherwise: `model.…` and `transformer.…`
            return lambda key: theirs + key.removeprefix(ours) if _below(key, ours) else key
    return lambda key: key


def _below(key: str, root: str) -> bool:
    return key.startswith(f"{root}.")


def _head_rows(to: _Target, heads: Sequence[TensorEntry], spelling: Spelling) -> list[OutputTensor]:
    """Return an expert's heads as its folder holds them, under the expert's own names."""
    rows: list[OutputTensor] = []
    for head in heads:
        name = spelling(head.name)
        if head.name in to.expert.extra and not to.expert.is_delta:
            name = to.expert.extra[head.name].name
        stored = head.dtype
        if to.dtype is not None and head.dtype.is_floating_point:
            stored = to.dtype
        rows.append(OutputTensor(name, stored, head.shape))
    return rows


def _fill_heads(
    to: _Target, heads: Mapping[TensorEntry, OutputTensor], opened: TensorFiles
) -> None:
    for head, row in heads.items():
        for start, stop in flat_ranges(head.numel):
            values = head_values(to.inputs, to.expert, head, start, stop)
            if to.nonfinite == "allow":
                stored = values.to(row.dtype)
            else:
                stored = narrow_finite(head.name, values, row.dtype, f"'{to.folder.name}'")
            opened.write(row.name, start, stored)


def head_values(inputs: Inputs, expert: Expert, head: TensorEntry, start: int, stop: int) -> Tensor:
    """Return a flat range of an expert's head, as the expert has it."""
    if head.name in expert.extra and head.name not in expert.tied:
        return expert.read_extra(head.name, start, stop)
    own = inputs.base.entries[expert.tied.get(head.name, head.name)]
    if not expert.is_delta or head.shape != own.shape:
        return expert.read(head.name, start, stop)
    # An adapter may hold the head as a change of the base's.
    dtype = torch.promote_types(own.dtype, torch.float32)
    base = inputs.base.read(own.name, start, stop).to(dtype)
    return expert.weight(head.name, start, stop, base=base, dtype=dtype)


_TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
_TASK_OF_CLASS = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")


def _fit_config(config: Path, expert: Expert, heads: Sequence[TensorEntry]) -> None:
    """Tell the base's config what an adapter's heads are: their classes, task and vocabulary."""
    if not config.exists():
        return
    values = read_json_object(config)
    for head in heads:
        rows = head.shape[0] if len(head.shape) == 2 else 0
        if rows and head.name.endswith(CLASSIFIERS):
            named: Any = values.get("id2label")
            if not isinstance(named, Mapping) or len(cast("Any", named)) != rows:
                values["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
                values["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
            ending = _TASKS.get(str(expert.config.get("task_type")))
            names: Any = values.get("architectures")
            if ending is not None and isinstance(names, list):
                values["architectures"] = [_TASK_OF_CLASS.sub(ending, str(n)) for n in names]
        elif rows and is_token_embedding(head.name) and head.name in expert.entries:
            values["vocab_size"] = rows
    write_atomically(config, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
