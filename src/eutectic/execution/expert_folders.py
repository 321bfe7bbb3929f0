"""A loadable folder per expert: the merged body, shared on disk, with the expert's own heads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.folder import copy_side_files
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.output_format import (
    SHARD_INDEX_NAME,
    OutputTensor,
    shard_name,
    weight_index_bytes,
)
from eutectic.checkpoint.writer import OutputFile, write_atomically
from eutectic.conventions import CLASSIFIERS, is_token_embedding
from eutectic.execution.tensor_values import flat_ranges
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import OutputLayout, Plan
from eutectic.storage import storage_of

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
