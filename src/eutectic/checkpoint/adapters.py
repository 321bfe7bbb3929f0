"""PEFT's adapters as experts, without peft: their changes are formed when they are read.

A plain LoRA keeps its thin factors, Δ_t = scaling·B·A. Every other kind's change is computed from
its parts, and for some from the recipe's base (`changes`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eutectic.checkpoint.adapter_config import LoraFields, lora_fields
from eutectic.checkpoint.adapter_keys import WEIGHT_NAMES as WEIGHT_NAMES
from eutectic.checkpoint.adapter_keys import Group, Grouped, adapter_weights, grouped
from eutectic.checkpoint.adapter_layers import (
    PAIRS,
    OpenAdapter,
    acts_on,
    factor_pair,
    layer_changes,
    module_of,
)
from eutectic.checkpoint.changes import BaseWeights
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG, Expert
from eutectic.checkpoint.index import TensorEntry, open_adapter_index, read_json_object
from eutectic.checkpoint.meeting import meet_names, named_like_base
from eutectic.checkpoint.odd_adapters import other_adapter
from eutectic.checkpoint.packed_adapters import BareAdapter, MetBase, meet_bare
from eutectic.checkpoint.parts_of_packed import changes_of_packed, find_places
from eutectic.checkpoint.peft_kinds.formulas import AdapterSettings, Layer, settings_of
from eutectic.checkpoint.peft_kinds.kinds import KINDS, LORA_PARTS, Kind
from eutectic.checkpoint.peft_kinds.low_rank import lora_scaling
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.conventions_layouts import packing
from eutectic.conventions_ties import is_output_table, is_token_table
from eutectic.errors import CheckpointError

# Options under which there is no merged weight, or none that is known from the files.
_REFUSED = {
    "layer_replication": "it repeats layers, so that its tensors are not those of the base",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only and has no merged weight",
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "block-diagonal factors are stored in another form",
    "arrow_config": "Arrow routes between adapters and has no merged weight",
    "kasa_config": "KaSA also changes the base weight",
    "monteclora_config": "MonteCLoRA stores a distribution over factors",
}
# Initialisations that move a part of the base weight into the factors which nothing here can
# compute again: they draw at random, look at data, or quantise.
_LOST_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")


def open_adapter(
    folder: Path,
    base: Mapping[str, TensorEntry],
    base_config: Mapping[str, Any] | None = None,
    weights: BaseWeights | None = None,
) -> Expert:
    """Return a PEFT adapter as an expert, aligned to the base.

    Linear layers, embeddings, convolutions without groups, `Conv1D` (stored `[in, out]`) and bare
    parameters are understood, of every kind in `KINDS` and of LoRA with its variants; tensors
    stored in full (`modules_to_save`, trained biases, resized embeddings) replace the base's.
    `weights` is the base for kinds whose change depends on it. CheckpointError where there is
    no merged weight, or a key is not understood.
    """
    label, config = str(folder), base_config or {}
    adapter = _read_config(folder)
    reader = CheckpointReader(open_adapter_index(adapter_weights(folder)))
    if not reader.entries:
        raise CheckpointError(
            f"{adapter_weights(folder)}: holds no tensors, so that it changes nothing.\n"
            "Save the adapter again with save_pretrained."
        )
    found = grouped(reader.entries, adapter.parts, adapter.shared, adapter.bare, label)
    _check_stated(found, adapter, label)
    for own, group in found.parameters.items():
        _check_pair(own.removesuffix(".weight"), group, adapter, label)
    bare = _bare_adapter(adapter, reader, found, label)
    stacks = [own for module in found.bare for own in bare.candidates(module)]
    mapping, alignment = meet_names(base, [*found.parameters, *stacks], label, [config])
    met_base = MetBase(base, config, mapping, alignment)
    met = meet_bare(bare, met_base)
    groups = dict(met.pairs)
    owns = {name: own for own, name in mapping.items()}
    groups |= {name: found.parameters[own] for name, own in owns.items() if own in found.parameters}
    extra: dict[str, TensorEntry] = {}
    tied: dict[str, str] = {}
    opened = OpenAdapter(
        adapter.settings, adapter.kind, adapter.fields, reader, found.shared, label
    )
    rest = [own for own in found.parameters if own not in mapping]
    left = {own: found.parameters[own] for own in rest}
    places = find_places(opened, left, met_base)
    rest = [own for own in rest if own not in places]
    called = named_like_base(rest, mapping, alignment, base)
    for own in rest:
        group, name = found.parameters[own], called[own]
        groups[name], owns[name] = group, own
        if group.keys() == {"full"}:
            extra[name] = group["full"]
            continue
        table = _tied_table(opened, own, name, group, base)
        if table is None:
            raise CheckpointError(
                f"{label}: acts on '{own}', which the base does not have ({alignment}).\n"
                f"The base's tensors: {', '.join(list(base)[:3])} …\n{_advice(own, met_base)}"
            )
        tied[name] = table
        extra[name] = replace(_entry(base[table], group), name=name)
    shapes = {n: base[tied.get(n, n)].shape for n in groups if n in base or n in tied}
    modules = {name: module_of(own) for name, own in owns.items()}
    held = weights or BaseWeights(None)
    for own, place in places.items():
        modules[own], shapes[own] = module_of(own), place.shape
    acting = {**groups, **{own: left[own] for own in places}}
    made = layer_changes(opened, acting, modules, shapes, held, tied, places)
    packed, packed_read = changes_of_packed(places, left, made, opened, met_base, held)
    factored = {name: own for name, own in made[0].items() if name not in places}
    changes = {name: own for name, own in made[1].items() if name not in places}
    stored = {n: g["full"] for n, g in groups.items() if "full" in g and n not in changes}
    changes |= {**met.changes, **packed}
    for parts in (met.read, packed_read):
        groups |= {name: {str(i): e for i, e in enumerate(read)} for name, read in parts.items()}
    return Expert(
        label,
        reader,
        alignment,
        {name: _entry(base[name], groups[name]) for name in base if name in groups},
        extra,
        stored=stored,
        factored=factored,
        changes=changes,
        tied=tied,
        is_delta=True,
        config=adapter.settings.raw,
        folder=folder,
        base_weights=held,
    )


def _tied_table(
    opened: OpenAdapter, own: str, name: str, group: Group, base: Mapping[str, TensorEntry]
) -> str | None:
    """Return the base's table that an output layer, or a table, is tied to; None for others.

    The base's file leaves a tied tensor out, and an adapter may change it by its own name.
    """
    if not (is_token_table(name) or is_output_table(name)):
        return None
    tables = (n for n in base if is_token_table(n) or is_output_table(n))
    return next((n for n in tables if acts_on(opened, module_of(own), group, base[n].shape)), None)


def _advice(own: str, base: MetBase) -> str:
    """Return what to do where the base lacks what an adapter acts on."""
    how = packing(base.alignment.form_of_key(own).name, 2)
    if how is None or how.group not in base.mixtures:
        return "The adapter belongs to another base."
    return (
        "The base may keep these matrices packed otherwise: merge the adapter with peft "
        "(merge_and_unload) into the model it was trained on, save that, and name the result."
    )


@dataclass(frozen=True)
class _Adapter:
    """A configuration: what the adapter is, and which rank and α it gives to modules."""

    settings: AdapterSettings
    kind: Kind | None  # None for a LoRA
    fields: LoraFields | None  # of a LoRA
    bare: tuple[str, ...] = ()  # parameters that it adapts without their modules

    @property
    def parts(self) -> frozenset[str]:
        return LORA_PARTS if self.kind is None else self.kind.parts

    @property
    def shared(self) -> frozenset[str]:
        return frozenset() if self.kind is None else self.kind.shared


def _read_config(folder: Path) -> _Adapter:
    path = folder / ADAPTER_CONFIG
    raw = read_json_object(path)
    if (other := other_adapter(folder, raw)) is not None:
        raise other.error(folder)
    if raw.get("peft_type") != "LORA":
        return _Adapter(settings_of(raw, path), KINDS[raw["peft_type"]], None)
    for option, reason in _REFUSED.items():
        if raw.get(option):
            raise CheckpointError(
                f"{folder}: the adapter uses '{option}', which cannot be merged: {reason}.\n"
                "Merge it into its base with peft (merge_and_unload) where peft can, save that, "
                "and name the result."
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_LOST_INITS):
        raise CheckpointError(
            f"{folder}: the adapter was initialised with '{init}', which moved a part of the base "
            "weights into the factors, and which part cannot be computed again.\nSave it with "
            "path_initial_model_for_weight_conversion in peft, which turns it into a plain LoRA."
        )
    bare = raw.get("target_parameters") or ()
    if not isinstance(bare, (list, tuple)) or not all(isinstance(p, str) for p in bare):
        raise CheckpointError(f"{path}: 'target_parameters' is no list of names.")
    fields = lora_fields(raw, path)
    return _Adapter(settings_of(raw, path), None, fields, tuple(bare))


def check_adapter(folder: Path) -> None:
    """Raise CheckpointError where the configuration of an adapter is not what it must be."""
    path = folder / ADAPTER_CONFIG
    raw = read_json_object(path)
    kind = raw.get("peft_type")
    if kind == "LORA":
        lora_fields(raw, path)
        settings_of(raw, path)
    elif isinstance(kind, str) and kind in KINDS:
        settings = settings_of(raw, path)
        if (states := KINDS[kind].states) is not None:
            settings.stated(states)


def _check_stated(found: Grouped, adapter: _Adapter, label: str) -> None:
    """Refuse an adapter that lacks what its configuration says it has, or the other way round."""
    raw = adapter.settings.raw
    held = {part for group in found.parameters.values() for part in group}
    for part, key, what in (
        ("trainable_tokens_delta", "trainable_token_indices", "rows of trained tokens"),
        ("lora_B.bias", "lora_bias", "biases of the factor B"),
    ):
        if adapter.fields is not None and bool(raw.get(key)) != (part in held):
            has, says = ("no", "there are") if raw.get(key) else ("", "there are none")
            raise CheckpointError(
                f"{label}: holds {has + ' ' if has else ''}{what}, and {key} in {ADAPTER_CONFIG} "
                f"says that {says}.\nRestore the tensors or the configuration."
            )


def _check_pair(module: str, group: Group, adapter: _Adapter, label: str) -> None:
    """Refuse factors of a LoRA that make no product of the stated rank."""
    if adapter.fields is None:
        return
    for a, b in PAIRS:
        if (a in group) == (b in group):
            continue
        has, lacks = ("A", "B") if a in group else ("B", "A")
        raise CheckpointError(f"{label}: '{module}.weight' has the factor {has} but lacks {lacks}.")
    pair = factor_pair(group)
    dora = adapter.settings.raw.get("use_dora") is True
    if ("lora_magnitude_vector" in group) != (dora and pair is not None):
        has, says = ("no magnitude", "true") if dora and pair else ("a magnitude", "nothing of it")
        raise CheckpointError(
            f"{label}: '{module}' has {has} (DoRA), and use_dora in {ADAPTER_CONFIG} says {says}.\n"
            "Restore the tensors or the configuration."
        )
    if pair is None:
        return
    a, b = (entry.shape for entry in pair)
    if min(len(a), len(b)) < 2 or math.prod(b[2:]) != 1:
        raise CheckpointError(
            f"{label}: '{module}' has factors A {list(a)} and B {list(b)}; expected "
            "matrices, or kernels of which B's has size 1.\nWas the adapter saved in shards?"
        )
    rank = adapter.settings.rank(module, adapter.fields.r)
    if not a[0] == b[1] == rank:
        raise CheckpointError(
            f"{label}: '{module}' has factors of rank {a[0]} (A) and {b[1]} (B), but "
            f"{ADAPTER_CONFIG} gives it rank {rank}.\n"
            "The scaling alpha/r would be wrong; restore the matching configuration."
        )


def _bare_adapter(
    adapter: _Adapter, reader: CheckpointReader, found: Grouped, label: str
) -> BareAdapter:
    bare = BareAdapter(
        reader,
        found,
        adapter.bare,
        {},
        {},
        str(adapter.settings.common.peft_version or ""),
        label,
    )
    owns = [own for module in found.bare for own in bare.candidates(module)]
    if adapter.fields is None or not owns:
        return bare
    layers = {own: Layer(own, (), {}, adapter.settings) for own in owns}
    ranks = {own: adapter.settings.rank(own, adapter.fields.r) for own in owns}
    scalings = {own: lora_scaling(adapter.fields, layer) for own, layer in layers.items()}
    return replace(bare, ranks=ranks, scalings=scalings)


def _entry(base: TensorEntry, group: Group) -> TensorEntry:
    """Return how a tensor that the adapter changes or replaces looks; bytes are the file's."""
    full = group.get("full")
    floats = (entry for entry in group.values() if entry.dtype.is_floating_point)
    first = full or next(floats, next(iter(group.values())))
    nbytes = sum(entry.nbytes for entry in group.values())
    return TensorEntry(base.name, first.dtype, (full or base).shape, first.file, -1, nbytes)
