"""Opening experts: full checkpoints, adapters and (IA)³ adapters, under the base's names.

An (IA)³ vector multiplies the outputs of a layer (`[out, 1]`), or the inputs of a feed-forward one
(`[1, in]`); one of ones changes nothing, so Δ_t = l_t − 1: vectors are the tensors of such an
expert, and vectors of ones its base.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eutectic.checkpoint.adapter_keys import WEIGHT_NAMES, adapter_weights, plain_keys
from eutectic.checkpoint.adapters import open_adapter
from eutectic.checkpoint.arranged import Arranged, whole
from eutectic.checkpoint.changes import BaseWeights
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG, Expert, full_expert
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry, open_index, read_json_object
from eutectic.checkpoint.names import align
from eutectic.checkpoint.opening import open_reader, path_of
from eutectic.checkpoint.reader import CheckpointSource, StateDictReader, TensorSource
from eutectic.conventions import IA3_SUFFIX, PEFT_ROOT
from eutectic.errors import CheckpointError


def common_base(
    base: CheckpointSource, experts: Mapping[str, Path]
) -> tuple[TensorSource, CheckpointIndex]:
    """Return what the experts' tensors are compared with, and its layout.

    The base itself; where every expert is an (IA)³ adapter, the adapter of it that changes nothing.
    """
    if not experts or not all(is_ia3(path) for path in experts.values()):
        return base, base.index
    return _identity_adapter({name: _open_ia3(path)[0] for name, path in experts.items()}, base)


def open_expert(path: Path, base: CheckpointIndex, weights: TensorSource | None = None) -> Expert:
    """Return the expert at `path`: a checkpoint (folder or file) or a PEFT adapter folder.

    A folder with an adapter_config.json is an adapter, whatever else it holds. `base` is the
    layout that `common_base` returned; `weights` is the base itself where that is open already,
    for adapters whose change is computed from it. It must stay open as long as the expert.
    """
    path = Path(path)
    vectors = is_ia3(path) and bool(_ia3_vectors(base))
    if is_adapter(path) and not vectors:
        held = BaseWeights(None if weights else lambda: open_reader(path_of(base)), weights)
        return open_adapter(path, base.entries, base.config, held)
    if vectors:
        index, source = _open_ia3(path)
        return full_expert(source, base.entries, str(path), index.config, path)
    reader = open_reader(path)
    index = reader.index
    return full_expert(reader, base.entries, str(path), index.config, index.folder, base.config)


def is_adapter(path: Path) -> bool:
    """Return whether `path` is a PEFT adapter folder."""
    return (path / ADAPTER_CONFIG).is_file()


def fingerprint_of(path: Path, base: Path | None = None) -> str:
    """Return the identity of the content of a checkpoint, or of an adapter alone."""
    if is_adapter(path) and not is_ia3(path) and base is not None:
        with open_reader(base) as whole, closing(open_expert(path, whole.index)) as expert:
            return expert.fingerprint()
    with closing(_open_ia3(path)[1] if is_ia3(path) else open_reader(path)) as reader:
        return reader.fingerprint()


def scaling_vectors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what an (IA)³ adapter multiplies a base's tensors with, and what it replaces.

    Both by the base's names, see `applied_vectors`.
    """
    index, source = _open_ia3(path)
    with closing(source):
        tensors = {name: source.read(name).view(e.shape) for name, e in index.entries.items()}
    return applied_vectors(tensors, turned=is_turned(path))


def is_turned(path: Path) -> bool:
    """Return whether an adapter's layers keep their weights as `[in, out]`."""
    return bool(read_json_object(path / ADAPTER_CONFIG).get("fan_in_fan_out"))


def applied_vectors(
    tensors: Mapping[str, Tensor], *, turned: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the factors of a base's tensors, and the tensors that modules saved in full replace.

    A vector has one row or one column, so that it scales inputs or outputs of the weight as stored;
    where outputs are scaled, those of the bias are too, as in PEFT.

    Args:
        tensors: of an adapter, by the names that PEFT gives them in files.
        turned: weights are stored as `[in, out]`.
    """
    vectors: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name, values in tensors.items():
        module = name.removeprefix(PEFT_ROOT)
        if not name.endswith(IA3_SUFFIX):
            saved[module] = values
            continue
        module = module.removesuffix(IA3_SUFFIX)
        if values.shape[0] > 1:
            vectors[f"{module}.bias"] = values.view(-1)
        vectors[f"{module}.weight"] = values.mT if turned else values
    return vectors, saved


def is_ia3(path: Path) -> bool:
    """Return whether `path` is an (IA)³ adapter; CheckpointError if its configuration is broken."""
    return is_adapter(path) and read_json_object(path / ADAPTER_CONFIG).get("peft_type") == "IA3"


def _open_ia3(folder: Path) -> tuple[CheckpointIndex, TensorSource]:
    """Return the table of an (IA)³ adapter's tensors, vectors and modules saved in full.

    And their reader; both by the names that PEFT gives them in files.
    """
    index = open_index(adapter_weights(folder))
    source: TensorSource = open_reader(index)
    index = replace(index, config=read_json_object(folder / ADAPTER_CONFIG))
    called = {own: key for key, own in plain_keys(index.entries, str(folder)).items()}
    if any(PEFT_ROOT + own != key for own, key in called.items()):
        views = {PEFT_ROOT + own: whole(index.entries[key]) for own, key in called.items()}
        shapes = {PEFT_ROOT + own: index.entries[key].shape for own, key in called.items()}
        source = Arranged(source, views, shapes)
        held = {name: replace(source.entries[name], name=name) for name in views}
        index = replace(index, entries=held)
    if not _ia3_vectors(index):
        raise CheckpointError(
            f"{folder}: holds no vector ('…{IA3_SUFFIX}'); it is no (IA)³ adapter."
        )
    return index, source


def _identity_adapter(
    adapters: Mapping[str, CheckpointIndex], base: CheckpointSource
) -> tuple[StateDictReader, CheckpointIndex]:
    """Return the adapter that changes nothing, and its layout: that of the first adapter.

    Vectors of ones; modules that the adapters save in full come from the base.
    """
    (first, index), *others = adapters.items()
    vectors = _ia3_vectors(index)
    for name, other in others:
        theirs = _ia3_vectors(other)
        both = sorted(vectors.keys() | theirs.keys())
        if differing := [n for n in both if vectors.get(n) != theirs.get(n)]:
            raise CheckpointError(
                f"experts '{first}' and '{name}' train different vectors, such as "
                f"'{differing[0]}'.\n(IA)³ adapters merge if their target_modules and "
                "feedforward_modules agree."
            )
    entries = base.entries
    modules = {
        name: f"{name.removeprefix(PEFT_ROOT).removesuffix(IA3_SUFFIX)}.weight" for name in vectors
    }
    saved = [name for name in index.entries if name not in vectors]
    own = [*dict.fromkeys(modules.values()), *(name.removeprefix(PEFT_ROOT) for name in saved)]
    called, _ = align(entries, own, expert=str(index.folder))
    tensors: dict[str, Tensor] = {}
    for name, entry in index.entries.items():
        if name in vectors:
            _check_vector(entry, entries.get(called.get(modules[name], "")), index.folder)
            tensors[name] = torch.ones(entry.shape, dtype=entry.dtype)
            continue
        key = called.get(name.removeprefix(PEFT_ROOT), "")
        if key not in entries or entries[key].shape != entry.shape:
            raise CheckpointError(
                f"{index.folder}: saves '{name}' in full, a head that the base lacks or has in "
                "another shape; heads of (IA)³ adapters cannot be kept apart.\nMerge adapters "
                "without modules_to_save, or apply them with peft (merge_and_unload) first."
            )
        tensors[name] = base.read(key).view(entry.shape)
    # Laid out as if all were in the file that PEFT looks for first.
    file = WEIGHT_NAMES[0]
    held = {name: replace(entry, file=file) for name, entry in index.entries.items()}
    metadata = {file: next(iter(index.metadata.values()), {})}
    layout = replace(index, entries=held, files=(file,), metadata=metadata, config={})
    return StateDictReader(tensors, "the identity adapter"), layout


def _ia3_vectors(index: CheckpointIndex) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the (IA)³ vectors in a table, by name."""
    return {n: e.shape for n, e in index.entries.items() if n.endswith(IA3_SUFFIX)}


def _check_vector(vector: TensorEntry, weight: TensorEntry | None, folder: Path) -> None:
    """Refuse a vector whose layer the base lacks, or has in another size."""
    length = max(vector.shape, default=0)
    if weight is None or vector.numel != length:
        raise CheckpointError(
            f"{folder}: '{vector.name}' {list(vector.shape)} belongs to no layer of the base.\n"
            "The adapter was trained on another base, or on the same with its matrices kept apart: "
            "then merge it with peft (merge_and_unload) into that, and name the result."
        )
    # `Conv1D` keeps [in, out]; kernels [out, in, k, k].
    sizes = (*weight.shape[:2], math.prod(weight.shape[1:]))
    if length not in sizes:
        raise CheckpointError(
            f"{folder}: '{vector.name}' has {length} entries, the base's layer "
            f"{list(weight.shape)}.\nThe adapter was trained on another base."
        )
