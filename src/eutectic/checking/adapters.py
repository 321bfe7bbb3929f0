"""An adapter's folder by itself: what kind it is, and whether its factors fit each other."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from eutectic.checking.report import Finding
from eutectic.checkpoint.adapter_keys import adapter_weights, grouped, plain_keys
from eutectic.checkpoint.adapter_places import counted, misplaced
from eutectic.checkpoint.adapters import check_adapter
from eutectic.checkpoint.experts import is_ia3
from eutectic.checkpoint.index import CheckpointIndex, open_adapter_index, read_json_object
from eutectic.checkpoint.odd_adapters import other_adapter
from eutectic.checkpoint.peft_kinds.kinds import KINDS
from eutectic.checkpoint.reader import TensorSource
from eutectic.checkpoint.weight_files import ADAPTER_CONFIG, is_full_weights, names_in
from eutectic.conventions import lora_factor
from eutectic.errors import Fault, Note
from eutectic.words import few, shown

_CHUNK = 1 << 22


def open_adapter(folder: Path) -> CheckpointIndex:
    """Return the table of an adapter's own tensors; CheckpointError where it cannot be one."""
    raw = read_json_object(folder / ADAPTER_CONFIG)
    if not is_ia3(folder) and (other := other_adapter(folder, raw)) is not None:
        raise other.error(folder)
    check_adapter(folder)
    return open_adapter_index(adapter_weights(folder))


def adapter_findings(folder: Path, index: CheckpointIndex) -> Iterator[Finding]:
    """Yield what an adapter's configuration and its tensors say, without its base."""
    raw = read_json_object(folder / ADAPTER_CONFIG)
    trained = raw.get("base_model_name_or_path")
    if isinstance(trained, str) and trained:
        yield Note("adapter_of", (shown(trained)[1:-1],))
    else:
        yield Note("adapter_of_nothing", level="warning")
    if is_ia3(folder):
        yield Note("ia3_only", level="note")
    others = [n for n in names_in(folder) if is_full_weights(n) and not (folder / n).is_dir()]
    if others:
        yield Note("weights_beside_adapter", tuple(others), level="warning")
    factors = _factors(folder, index)
    lonely = [m for m, own in factors.items() if len(own) < 2]
    if lonely:
        yield Fault("lonely_factor", f"one of two factors is missing: {few(lonely)}.")
    targets = raw.get("target_modules")
    if factors and isinstance(targets, list):
        held = {module.rpartition(".")[2] for module in factors}
        idle = [t for t in targets if isinstance(t, str) and t.rpartition(".")[2] not in held]
        if idle:
            yield Note("idle_targets", tuple(idle), level="warning")


def place_faults(folder: Path, index: CheckpointIndex, source: TensorSource) -> Iterator[Finding]:
    """Yield that an adapter stores indices at which there is nothing, as far as it says itself."""
    kind = KINDS.get(str(read_json_object(folder / ADAPTER_CONFIG).get("peft_type")))
    if kind is None or kind.places is None:
        return
    found = grouped(index.entries, kind.parts, kind.shared, (), str(folder))
    wrong: list[str] = []
    for group in found.parameters.values():
        shapes = {part: entry.shape for part, entry in {**group, **found.shared}.items()}
        wrong += misplaced(source, group, kind.places(shapes, None))
    if wrong:
        yield Fault("misplaced_indices", f"{counted(wrong)}.")


def idle_factors(folder: Path, index: CheckpointIndex, source: TensorSource) -> Iterator[Finding]:
    """Yield that an adapter changes nothing: the second factors that it begins with are zeros."""
    second = [own["B"] for own in _factors(folder, index).values() if "B" in own]
    if second and all(_is_zero(source, name) for name in second):
        yield Note("idle_adapter", level="warning")


def _factors(folder: Path, index: CheckpointIndex) -> Mapping[str, Mapping[str, str]]:
    """Return module -> side -> key of the factors of a LoRA."""
    found: dict[str, dict[str, str]] = {}
    for key, own in plain_keys(index.entries, str(folder)).items():
        if factor := lora_factor(own):
            found.setdefault(factor["module"], {})[factor["side"]] = key
    return found


def _is_zero(source: TensorSource, name: str) -> bool:
    numel = source.entries[name].numel
    pieces = ((s, min(numel, s + _CHUNK)) for s in range(0, numel, _CHUNK))
    return not any(bool(source.read(name, start, stop).any()) for start, stop in pieces)
