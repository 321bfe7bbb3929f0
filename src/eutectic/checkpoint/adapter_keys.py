"""The tensors of an adapter's file: by the parameter that each acts on, and as what."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.index import read_json_object
from eutectic.checkpoint.names import check_inside
from eutectic.checkpoint.odd_adapters import other_adapter
from eutectic.checkpoint.odd_folders import without_weights
from eutectic.checkpoint.weight_files import names_in
from eutectic.conventions import PEFT_ROOT
from eutectic.conventions_adapters import adapter_part, with_depth, without_depth
from eutectic.conventions_names import (
    adapter_name,
    is_frozen_copy,
    is_trained_copy,
    unwrapped,
    without_adapter_name,
)
from eutectic.errors import CheckpointError

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

Group = dict[str, TensorEntry]  # what acts on one parameter, by part; "full" replaces it


@dataclass(frozen=True)
class Grouped:
    """An adapter's tensors, in the adapted model's own names."""

    parameters: Mapping[str, Group]  # parameter -> what acts on it
    # module -> factors of its bare parameters, the innermost wrapper's last
    bare: Mapping[str, Mapping[int, Group]] = field(default_factory=dict[str, dict[int, Group]])
    shared: Mapping[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])


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


def plain_keys(keys: Iterable[str], label: str) -> dict[str, str]:
    """Return each key of an adapter's file as PEFT names the parameter in the adapted model.

    Without PEFT's root, the adapter's name, and what wraps modules; wrappers of bare parameters
    are counted (`with_depth`). The unchanged copy of a module that is trained whole is left out.
    CheckpointError where a file holds several adapters.
    """
    keys = list(keys)
    adapters = sorted({name for key in keys if (name := adapter_name(key))})
    plain: dict[str, str] = {}
    taken: dict[str, str] = {}
    trained = {own for key in keys if (own := _plain(key, adapters)) and is_trained_copy(key)}
    # PEFT writes tables twice where tokens were added and the tables trained whole: as what it
    # reads, and with the wrapper's names (`save_embedding_layers`).
    whole = {_plain(k, adapters) for k in keys if not (is_trained_copy(k) or is_frozen_copy(k))}
    for key in keys:
        own = _plain(key, adapters)
        if is_frozen_copy(key) and own in trained:
            continue
        if is_trained_copy(key) and own in whole and not adapter_name(key):
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
    bare = unwrapped(with_depth(without_adapter_name(key)), adapters)
    while bare.startswith(PEFT_ROOT):
        bare = bare.removeprefix(PEFT_ROOT)
    return bare


def grouped(
    entries: Mapping[str, TensorEntry],
    parts: frozenset[str],
    shared: frozenset[str],
    parameters: Sequence[str],
    label: str,
) -> Grouped:
    """Group a file's tensors by the parameter they act on.

    `parts` and `shared` are those of the adapter's kind, `parameters` the bare ones that it says
    it adapts. CheckpointError names the first tensor that is none of these, nor a whole one.
    """
    groups: dict[str, Group] = {}
    common: dict[str, TensorEntry] = {}
    bare: dict[str, dict[int, Group]] = {}
    for key, own in plain_keys(entries, label).items():
        part = adapter_part(own)
        if part is None:
            if _of_a_variant(own):
                raise _not_understood(label, key)
            groups.setdefault(own, {})["full"] = entries[key]
            continue
        module, kind = part
        if kind in shared:
            common[kind] = entries[key]
        elif kind not in parts:
            raise _not_understood(label, key)
        elif kind == "lora_B.bias":
            groups.setdefault(f"{module}.bias", {})[kind] = entries[key]
        else:
            path, depth = without_depth(module)
            if bare_parameters(path, parameters):
                bare.setdefault(path, {}).setdefault(depth, {})[kind] = entries[key]
            elif depth:
                raise _not_understood(label, key)
            else:
                groups.setdefault(f"{path}.weight", {})[kind] = entries[key]
    return Grouped(groups, bare, common)


def bare_parameters(module: str, parameters: Sequence[str]) -> list[str]:
    """Return which of the bare parameters that an adapter names a module has, by their own names.

    >>> bare_parameters("model.layers.0.mlp.experts", ["experts.down_proj", "router.weight"])
    ['down_proj']
    """
    found: list[str] = []
    for path in parameters:
        owner, _, name = path.rpartition(".")
        if module == owner or module.endswith(f".{owner}"):
            found.append(name)
    return sorted(set(found))


def _of_a_variant(own: str) -> bool:
    return "lora_" in own or "token_adapter" in own


def _not_understood(label: str, key: str) -> CheckpointError:
    return CheckpointError(
        f"{label}: the tensor '{key}' is not understood.\n"
        f"It belongs to another kind of adapter than {ADAPTER_CONFIG} says, or to a variant that "
        "cannot be merged; merge it with peft first."
    )
