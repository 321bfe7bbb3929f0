"""The folder of a PEFT adapter: its file put together from the parts, its configuration, its card.

Keys are those that PEFT saves: factors under `lora_A` and `lora_B`, modules that are saved whole
under their own names. alpha is the rank, so that what the factors make is added as it is.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.adapter_keys import WEIGHT_NAMES
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG
from eutectic.checkpoint.folder import copy_side_files, survey
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile, write_atomically
from eutectic.conventions import PEFT_ROOT
from eutectic.conventions_adapters import TIED_BY_PEFT
from eutectic.conventions_heads import is_buffer
from eutectic.execution.adapter_factors import LEFT, RIGHT, WHOLE, open_part
from eutectic.execution.adapter_stacks import Piece, nested_keys, stack_rank, stack_rows
from eutectic.execution.expert_folders import head_values
from eutectic.execution.model_vocabulary import write_adapter_vocabulary
from eutectic.execution.tensor_values import flat_ranges
from eutectic.planning.adapter_plan import AdapterPlan
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.storage import storage_of

# The kind of task by which PEFT chooses a class, from the end of a model class's name.
_TASKS = (
    (r"(ForCausalLM|LMHeadModel)$", "CAUSAL_LM"),
    (r"ForSequenceClassification$", "SEQ_CLS"),
    (r"ForTokenClassification$", "TOKEN_CLS"),
    (r"ForQuestionAnswering$", "QUESTION_ANS"),
)
# Modules that PEFT takes whole from the file of an adapter of these kinds.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

STACKS_SINCE = "0.19.0"  # of PEFT: the order in which it takes the axes of stacks

Read = Callable[[int, int], Tensor]

_Row = tuple[torch.dtype, tuple[int, ...], Read]


@dataclass
class _Content:
    """What the adapter's file will hold."""

    rows: dict[str, _Row] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # module -> rank of its factors
    saved: set[str] = field(default_factory=set)  # modules that are saved whole
    turned: bool = False  # some are kept [in, out]
    own_biases: dict[str, _Row] = field(default_factory=dict)  # of linear layers, by module
    tied: bool = False  # a saved table has several names
    left_out: list[str] = field(default_factory=list)
    # stack of a mixture in memory -> the parts that lie in it
    stacks: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])
    stack_rank: int = 0  # of all of them: PEFT warns of patterns of ranks over parameters


def write_adapter_folder(
    plan: Plan, inputs: Inputs, model: Path, parts: Path, records: Mapping[str, Any], card: str
) -> dict[str, Any]:
    """Complete an adapter's folder; may be repeated after a kill. Return what it holds.

    `records` say of each tensor whether it changes, and of which rank its change is.
    """
    adapter = plan.adapter
    assert adapter is not None
    content = _Content(left_out=adapter.left_out(records))
    for planned in plan.tensors:
        told = records.get(planned.name, {}).get("adapter", {})
        if told.get("changed") and planned.name not in content.left_out:
            _add(content, adapter, planned.name, planned.layout.transpose, parts, told)
    _add_stacks(content, adapter, parts)
    _add_heads(content, plan, adapter, inputs)
    for module, row in content.own_biases.items():
        inside = ".base_layer" if module in content.ranks else ""
        if module not in content.saved:
            content.rows[f"{PEFT_ROOT}{module}{inside}.bias"] = row
        else:
            content.rows[f"{PEFT_ROOT}{module}.bias"] = row
    _complete_modules(content, adapter, inputs)
    _add_placeholder(content, plan, adapter, inputs)
    _add_twins(content, adapter)
    _complete_modules(content, adapter, inputs)  # an output layer has a bias beside the table
    rows = tuple((key, dtype, shape) for key, (dtype, shape, _) in content.rows.items())
    file = OutputFile(WEIGHT_NAMES[0], rows, {"format": "pt"})
    storage_of(model).remove(model / file.name)  # what a killed run had begun
    with CheckpointWriter(model, [file]) as writer:
        for key, (_, shape, read) in content.rows.items():
            for start, stop in flat_ranges(math.prod(shape)):
                writer.write(key, start, read(start, stop))
        writer.sync()
    config = _config(content, plan, inputs)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_atomically(model / ADAPTER_CONFIG, text.encode())
    _copy_tokenizer(plan, inputs, model)
    write_adapter_vocabulary(plan, model)
    write_atomically(model / "README.md", card.encode())
    ranks = Counter([*content.ranks.values(), *[content.stack_rank] * len(content.stacks)])
    return {
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "modules_to_save": sorted(content.saved),
        "left_out": content.left_out,
    }


def _add(
    content: _Content,
    adapter: AdapterPlan,
    name: str,
    transposed: bool,
    parts: Path,
    told: Mapping[str, Any],
) -> None:
    """Add the part of one tensor."""
    own = adapter.carried[name]
    root = f"{PEFT_ROOT}{own.module}"
    if own.slot is not None:
        piece = Piece(name, own.slot, told["rank"])
        content.stacks.setdefault(own.slot.parameter, []).append(piece)
        return
    if own.form in ("factors", "table"):
        table = own.form == "table"
        for side, part in (("A", RIGHT), ("B", LEFT)):
            with open_part(parts, name) as reader:
                entry = reader.entries[part]
            shape = entry.shape
            read: Read = partial(_read_part, parts, name, part)
            if table:  # of a table the rows are the inputs: Δᵀ = B·A
                side = "B" if side == "A" else "A"
                read, shape = _turned(read, shape), shape[::-1]
            key = f"{root}.lora_embedding_{side}" if table else f"{root}.lora_{side}.weight"
            content.rows[key] = (entry.dtype, shape, read)
        content.ranks[own.module] = told["rank"]
        content.turned = content.turned or transposed
        return
    with open_part(parts, name) as reader:
        entry = reader.entries[WHOLE]
    whole: Read = partial(_read_part, parts, name, WHOLE)
    if own.form == "bias":
        content.own_biases[own.module] = (entry.dtype, entry.shape, whole)
        return
    content.saved.add(own.module)
    content.rows[f"{root}.{own.parameter}"] = (entry.dtype, entry.shape, whole)


def _add_stacks(content: _Content, adapter: AdapterPlan, parts: Path) -> None:
    """Add the factors of stacks, as PEFT keeps those of bare parameters."""
    if not content.stacks:
        return
    assert adapter.outline is not None
    keys = nested_keys(content.stacks, list(adapter.outline.kinds), PEFT_ROOT)
    content.stack_rank = rank = max(map(stack_rank, content.stacks.values()))
    for own, pieces in content.stacks.items():
        for side, row in zip("AB", stack_rows(parts, pieces, rank), strict=True):
            content.rows[f"{keys[own]}.lora_{side}.weight"] = row


def _read_part(parts: Path, name: str, part: str, start: int, stop: int) -> Tensor:
    with open_part(parts, name) as reader:
        return reader.read(part, start, stop)


def _turned(read: Read, shape: tuple[int, ...]) -> Read:
    """Return the transpose of a thin matrix."""

    def turned(start: int, stop: int) -> Tensor:
        whole = read(0, math.prod(shape)).view(shape)
        return whole.mT.reshape(-1)[start:stop]

    return turned


def _add_heads(content: _Content, plan: Plan, adapter: AdapterPlan, inputs: Inputs) -> None:
    """Add the one expert's own heads, and tables with further rows, as modules saved whole."""
    if adapter.head is None:
        return
    expert = inputs.experts[adapter.head]
    for head in plan.heads[adapter.head]:
        own = adapter.names.get(head.name, head.name)
        module = own.rpartition(".")[0]
        if not module or is_buffer(head.name, len(head.shape)):
            continue
        dtype = head.dtype
        if plan.output.dtype is not None and dtype.is_floating_point:
            dtype = plan.output.dtype
        read: Read = partial(_read_head, inputs, expert, head, dtype)
        content.saved.add(module)
        content.rows[f"{PEFT_ROOT}{own}"] = (dtype, head.shape, read)


def _read_head(
    inputs: Inputs, expert: Any, head: Any, dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    return head_values(inputs, expert, head, start, stop).to(dtype)


def _complete_modules(content: _Content, adapter: AdapterPlan, inputs: Inputs) -> None:
    """Add what else a saved module has: PEFT takes it whole. It stays as it is in the base."""
    twins = {} if adapter.outline is None else adapter.outline.twins
    for name, first in adapter.names.items():
        for own in (first, *twins.get(first, ())):
            module = own.rpartition(".")[0]
            key = f"{PEFT_ROOT}{own}"
            if module in content.saved and key not in content.rows and name in inputs.base.entries:
                entry = inputs.base.entries[name]
                content.rows[key] = (entry.dtype, entry.shape, partial(inputs.base.read, name))


def _add_placeholder(content: _Content, plan: Plan, adapter: AdapterPlan, inputs: Inputs) -> None:
    """Give an adapter without any factors a pair of zeros, which PEFT wants at least."""
    if content.ranks or content.stacks:
        return
    turned = {planned.name for planned in plan.tensors if planned.layout.transpose}
    for name, own in adapter.carried.items():
        if own.form != "factors" or own.module in content.saved:
            continue
        out, width = inputs.base.entries[name].shape[:2]
        if name in turned:
            out, width, content.turned = width, out, True
        for side, shape in (("A", (1, width)), ("B", (out, 1))):
            read: Read = _zeros
            content.rows[f"{PEFT_ROOT}{own.module}.lora_{side}.weight"] = (own.dtype, shape, read)
        content.ranks[own.module] = 1
        return


def _zeros(start: int, stop: int) -> Tensor:
    return torch.zeros(stop - start)


def _add_twins(content: _Content, adapter: AdapterPlan) -> None:
    """Say a saved table again under its other names: PEFT ties what it is told to.

    It knows tables by the names `embed_tokens` and `lm_head`; where neither is among them, each
    has a copy. It ties output layers alone: where stacks share a table, each has a copy too, and
    PEFT warns of it.
    """
    kinds = {} if adapter.outline is None else adapter.outline.kinds
    for own, others in adapter.twins.items():
        row = content.rows.get(f"{PEFT_ROOT}{own}")
        if row is None or own.rpartition(".")[0] not in content.saved:
            continue
        for other in others:
            content.rows[f"{PEFT_ROOT}{other}"] = row
            content.saved.add(other.rpartition(".")[0])
        modules = {name.rpartition(".")[0].rpartition(".")[2] for name in (own, *others)}
        outputs = all(kinds.get(other, "linear") == "linear" for other in others)
        content.tied = outputs and bool(modules & TIED_BY_PEFT)


def _config(content: _Content, plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Return adapter_config.json."""
    common = Counter(content.ranks.values()).most_common(1)
    rank = content.stack_rank or (common[0][0] if common else 1)
    others = {module: r for module, r in content.ranks.items() if r != rank}
    stacks: dict[str, Any] = {}
    if content.stacks:  # in the order of axes that PEFT has had since
        stacks = {"target_parameters": list(content.stacks), "peft_version": STACKS_SINCE}
    names = plan.request.names
    return {
        "peft_type": "LORA",
        "task_type": _task(content, inputs),
        "base_model_name_or_path": names["base"],
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "all" if content.own_biases.keys() - content.saved else "none",
        "fan_in_fan_out": content.turned,
        "target_modules": list(content.ranks),
        **stacks,
        "modules_to_save": sorted(content.saved) or None,
        **({"ensure_weight_tying": True} if content.tied else {}),
        "inference_mode": True,
    }


def _task(content: _Content, inputs: Inputs) -> str | None:
    """Return PEFT's kind of task; of classifiers only where their head is in the file."""
    architecture = str(next(iter(inputs.config.get("architectures") or []), ""))
    if inputs.config.get("is_encoder_decoder") and architecture.endswith("ConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    task = next((t for pattern, t in _TASKS if re.search(pattern, architecture)), None)
    heads = _HEADS.get(task or "")
    held = any(module.rpartition(".")[2] in heads for module in content.saved) if heads else True
    return task if held else None


def _copy_tokenizer(plan: Plan, inputs: Inputs, model: Path) -> None:
    """Copy the tokenizer and the like of the expert whose vocabulary the adapter has."""
    adapter = plan.adapter
    donor = inputs.experts[adapter.head].folder if adapter and adapter.head else None
    if plan.output.side_files in inputs.experts:
        donor = inputs.experts[plan.output.side_files].folder
    if donor is None or not donor.is_dir():
        return
    taken = [name for name in survey(donor).taken if is_tokenizer_file(name)]
    copy_side_files(donor, model, taken)


def is_tokenizer_file(name: str) -> bool:
    """Tell whether a file belongs to a tokenizer."""
    known = ("token", "vocab", "merges", "spiece", "sentencepiece", "chat_template", "special")
    return any(part in name.lower() for part in known)
