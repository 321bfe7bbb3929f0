"""PEFT LoRA folders as experts, without peft: each Δ_t = scaling·B·A is formed when it is read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eutectic.checkpoint.adapter_config import (
    LoraFields,
    PatternTable,
    lora_fields,
    pattern_table,
)
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG, Expert, Factors
from eutectic.checkpoint.index import TensorEntry, open_adapter_index, read_json_object
from eutectic.checkpoint.meeting import meet_names, named_like_base
from eutectic.checkpoint.names import Alignment, check_inside
from eutectic.checkpoint.odd_adapters import other_adapter
from eutectic.checkpoint.odd_folders import without_weights
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.checkpoint.weight_files import names_in
from eutectic.conventions import PEFT_ROOT, lora_factor
from eutectic.conventions_layouts import packing
from eutectic.conventions_names import (
    adapter_name,
    is_frozen_copy,
    is_trained_copy,
    unwrapped,
    without_adapter_name,
)
from eutectic.conventions_ties import is_output_table, is_token_table
from eutectic.errors import CheckpointError

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

# Options under which the merged weight is more, or other, than W₀ + scaling·B·A.
_REFUSED = {
    "use_dora": "DoRA rescales every column of the merged weight; its change is no matrix product",
    "target_parameters": "LoRA on bare parameters (fused mixture-of-experts weights)",
    "layer_replication": "it repeats layers, so that its tensors are not those of the base",
    "trainable_token_indices": "single rows of the embedding are stored apart",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only and has no merged weight",
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "block-diagonal factors are stored in another form",
    "lora_bias": "LoRA with a trained bias in its B factor",
    "arrow_config": "Arrow routes between adapters and has no merged weight",
    "kasa_config": "KaSA also changes the base weight",
    "monteclora_config": "MonteCLoRA stores a distribution over factors",
}
# Initialisations that move part of the base weight into the factors: B·A is then no difference
# from the base on disk.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_Group = dict[str, TensorEntry]  # what acts on one parameter: "A", "B", or "full"


def open_lora(
    folder: Path, base: Mapping[str, TensorEntry], base_config: Mapping[str, Any] | None = None
) -> Expert:
    """Return a LoRA adapter as an expert, aligned to the base.

    Linear layers, embeddings (`lora_embedding_A/B`), convolutions without groups and `Conv1D`
    (stored `[in, out]`) are understood; tensors stored in full (`modules_to_save`, trained biases,
    resized embeddings) replace the base's. CheckpointError where a merged weight would not be
    W₀ + scaling·B·A, or a key is not understood.
    """
    label = str(folder)
    lora = _read_config(folder)
    reader = CheckpointReader(open_adapter_index(adapter_weights(folder)))
    groups = _grouped(reader.entries, label)
    for own, group in groups.items():
        _check_factors(own.removesuffix(".weight"), group, lora, label)
    mapping, alignment = meet_names(base, groups, label, [base_config or {}])
    extra: dict[str, TensorEntry] = {}
    tied: dict[str, str] = {}
    owns = {name: own for own, name in mapping.items()}
    rest = [own for own in groups if own not in mapping]
    called = named_like_base(rest, mapping, alignment, base)
    for own, group in groups.items():
        if own in mapping:
            continue
        name = called[own]
        owns[name] = own
        table = _tied_table(name, group, base) if "A" in group else None
        if table is not None:
            tied[name] = table
            extra[name] = replace(_entry(base[table], group), name=name)
            continue
        if "A" in group:
            raise CheckpointError(
                f"{label}: acts on '{own}', which the base does not have ({alignment}).\n"
                f"The base's tensors: {', '.join(list(base)[:3])} …\n{_advice(own, alignment)}"
            )
        extra[name] = group["full"]
    named = {name: groups[own] for name, own in owns.items()}
    shapes = {n: base[tied.get(n, n)].shape for n, group in named.items() if "A" in group}
    transposed = _orientations(named, shapes, lora.fields.fan_in_fan_out, label)
    return Expert(
        label,
        reader,
        alignment,
        {name: _entry(base[name], named[name]) for name in base if name in named},
        extra,
        stored={name: group["full"] for name, group in named.items() if "full" in group},
        factored={
            n: Factors(
                named[n]["A"], named[n]["B"], lora.scaling(owns[n].removesuffix(".weight")), swapped
            )
            for n, swapped in transposed.items()
        },
        tied=tied,
        is_delta=True,
        config=lora.raw,
        folder=folder,
    )


def _advice(own: str, alignment: Alignment) -> str:
    """Return what to do where the base lacks what an adapter acts on."""
    if packing(alignment.form_of_key(own).name, 2) is None:
        return "The adapter belongs to another base."
    return (
        "The base may keep these matrices packed otherwise: merge the adapter with peft "
        "(merge_and_unload) into the model it was trained on, save that, and name the result."
    )


def _tied_table(name: str, group: _Group, base: Mapping[str, TensorEntry]) -> str | None:
    """Return the base's table that an output layer, or a table, is tied to; None for others.

    The base's file leaves a tied tensor out, and an adapter may change it by its own name.
    """
    if not (is_token_table(name) or is_output_table(name)):
        return None
    a, b = group["A"].shape, group["B"].shape
    held = (a[1], b[0]) if ".lora_embedding_" in group["A"].name else (b[0], a[1])
    tables = (n for n, e in base.items() if e.shape == held)
    return next((n for n in tables if is_token_table(n) or is_output_table(n)), None)


def adapter_weights(folder: Path) -> Path:
    """Return the file with an adapter's tensors, which may not be a link out of the folder."""
    name = next((n for n in WEIGHT_NAMES if (folder / n).exists()), None)
    if name is None:
        config = read_json_object(folder / ADAPTER_CONFIG)
        raise (other_adapter(folder, config) or without_weights(folder, names_in(folder))).error(
            folder
        )
    check_inside(folder, name)
    return folder / name


@dataclass(frozen=True)
class _LoraConfig:
    """A LoRA configuration, and which rank and α it gives to modules."""

    fields: LoraFields
    ranks: PatternTable[int]
    alphas: PatternTable[float]
    raw: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """Return r of a module (its path in the model that was adapted)."""
        return self.ranks.value(module, self.fields.r)

    def scaling(self, module: str) -> float:
        """Return alpha / r of a module, or alpha / √r under rank-stabilised LoRA."""
        rank = self.rank(module)
        alpha = self.alphas.value(module, self.fields.lora_alpha)
        return alpha / math.sqrt(rank) if self.fields.use_rslora else alpha / rank


def _read_config(folder: Path) -> _LoraConfig:
    path = folder / ADAPTER_CONFIG
    raw = read_json_object(path)
    if (other := other_adapter(folder, raw)) is not None:
        raise other.error(folder)
    for option, reason in _REFUSED.items():
        if raw.get(option):
            raise CheckpointError(
                f"{folder}: the adapter uses '{option}', which cannot be merged: {reason}.\n"
                "Merge it into its base with peft (merge_and_unload) where peft can, save that, "
                "and name the result."
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{folder}: the adapter was initialised with '{init}', which changes the base weights; "
            "B·A is not its difference from the base.\nSave it with "
            "path_initial_model_for_weight_conversion in peft, which turns it into a plain LoRA."
        )
    return _checked_config(raw, path)


def _checked_config(raw: Mapping[str, Any], path: Path) -> _LoraConfig:
    fields = lora_fields(raw, path)
    return _LoraConfig(
        fields,
        pattern_table(fields.rank_pattern, f"{path}: 'rank_pattern'"),
        pattern_table(fields.alpha_pattern, f"{path}: 'alpha_pattern'"),
        raw,
    )


def check_adapter(folder: Path) -> None:
    """Raise CheckpointError where the configuration of a LoRA is not what it must be."""
    raw = read_json_object(folder / ADAPTER_CONFIG)
    if raw.get("peft_type") == "LORA":
        _checked_config(raw, folder / ADAPTER_CONFIG)


def plain_keys(keys: Iterable[str], label: str) -> dict[str, str]:
    """Return each key of an adapter's file as PEFT names the parameter in the adapted model.

    Without PEFT's root, the adapter's name, and what wraps modules. The unchanged copy of a module
    that is trained whole is left out. CheckpointError where a file holds several adapters.
    """
    keys = list(keys)
    adapters = sorted({name for key in keys if (name := adapter_name(key))})
    plain: dict[str, str] = {}
    taken: dict[str, str] = {}
    trained = {own for key in keys if (own := _plain(key, adapters)) and is_trained_copy(key)}
    for key in keys:
        own = _plain(key, adapters)
        if is_frozen_copy(key) and own in trained:
            continue
        if own in taken:
            raise CheckpointError(
                f"{label}: the keys '{taken[own]}' and '{key}' both mean '{own}'"
                + (f"; it holds the adapters {', '.join(adapters)}" if len(adapters) > 1 else "")
                + ".\nSave each adapter into a folder of its own (save_pretrained, "
                "selected_adapters)."
            )
        taken[own] = key
        plain[key] = own
    return plain


def _plain(key: str, adapters: Sequence[str]) -> str:
    bare = unwrapped(without_adapter_name(key), adapters)
    while bare.startswith(PEFT_ROOT):
        bare = bare.removeprefix(PEFT_ROOT)
    return bare


def _grouped(entries: Mapping[str, TensorEntry], label: str) -> dict[str, _Group]:
    """Group a file's tensors by the parameter they act on, in the adapted model's own names."""
    groups: dict[str, _Group] = {}
    for key, own in plain_keys(entries, label).items():
        entry = entries[key]
        if factor := lora_factor(own):
            groups.setdefault(f"{factor['module']}.weight", {})[factor["side"]] = entry
        elif "lora_" in own or "token_adapter" in own:
            raise CheckpointError(
                f"{label}: the tensor '{key}' is not understood.\n"
                "It belongs to a variant of LoRA that cannot be merged"
                f"{' (DoRA)' if 'magnitude' in own else ''}; merge it with peft first."
            )
        else:
            groups.setdefault(own, {})["full"] = entry
    return groups


def _check_factors(module: str, group: _Group, lora: _LoraConfig, label: str) -> None:
    if ("A" in group) != ("B" in group):
        has, lacks = ("A", "B") if "A" in group else ("B", "A")
        raise CheckpointError(f"{label}: '{module}.weight' has the factor {has} but lacks {lacks}.")
    if "A" not in group:
        return
    a, b = group["A"].shape, group["B"].shape
    if min(len(a), len(b)) < 2 or math.prod(b[2:]) != 1:
        raise CheckpointError(
            f"{label}: '{module}' has factors A {list(a)} and B {list(b)}; expected "
            "matrices, or kernels of which B's has size 1.\nWas the adapter saved in shards?"
        )
    if not a[0] == b[1] == lora.rank(module):
        raise CheckpointError(
            f"{label}: '{module}' has factors of rank {a[0]} (A) and {b[1]} (B), but "
            f"{ADAPTER_CONFIG} gives it rank {lora.rank(module)}.\n"
            "The scaling alpha/r would be wrong; restore the matching configuration."
        )


def _entry(base: TensorEntry, group: _Group) -> TensorEntry:
    """Return how a tensor that the adapter changes or replaces looks; bytes are the file's."""
    full = group.get("full")
    first = full or group["A"]
    nbytes = sum(entry.nbytes for entry in group.values())
    return TensorEntry(base.name, first.dtype, (full or base).shape, first.file, -1, nbytes)


def _orientations(
    named: Mapping[str, _Group],
    shapes: Mapping[str, tuple[int, ...]],
    fan_in_fan_out: bool,
    label: str,
) -> dict[str, bool]:
    """Tell for each pair of factors whether the base stores [in, out] instead of [out, in].

    Shapes decide; for square matrices the configuration does, or else what the adapter's other
    tensors show: all of GPT-2's `Conv1D` are stored alike, and no output layer is one.
    """
    transposed: dict[str, bool] = {}
    fixed: dict[str, bool] = {}
    square: list[str] = []
    for name, group in named.items():
        if "A" not in group:
            continue
        a, b, shape = group["A"].shape, group["B"].shape, shapes[name]
        rows, columns = b[0], math.prod(a[1:])
        held = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
        if held not in ((rows, columns), (columns, rows)) or (
            len(shape) > 2 and shape[1:] != a[1:]
        ):
            raise CheckpointError(
                f"{label}: the factors of '{name}' make a [{rows}, {columns}] matrix, "
                f"the base's tensor is {list(shape)}.\nThe adapter belongs to another base."
            )
        if ".lora_embedding_" in group["B"].name:
            fixed[name] = True
        elif rows == columns and len(shape) == 2:
            fixed.update({name: False} if is_output_table(name) else {})
            square.append(name)
        else:
            transposed[name] = held != (rows, columns)
    as_the_others = fan_in_fan_out or any(transposed.values())
    return {**transposed, **dict.fromkeys(square, as_the_others), **fixed}
