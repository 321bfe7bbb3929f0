"""Statistics as a plan sees them: whose they are, which tensor they belong to, what they hold."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.names import align
from eutectic.checkpoint.reader import TensorSource, same_content, sample_ranges
from eutectic.conventions import PARTS, is_packed
from eutectic.errors import CheckpointError, Fault
from eutectic.models.names import names_in
from eutectic.planning.inputs import Inputs
from eutectic.types import Statistics


def statistics_names(statistics: Statistics, inputs: Inputs) -> dict[str, str]:
    """Return base name -> name in the statistics, whichever prefix either carries.

    A packed in-projection has up to four names: its own, and those of its three parts, which are
    kept apart where query, key and value see different inputs.
    """
    names = list(inputs.base.entries)
    names += [name + part for name in names if is_packed(name) for part in PARTS]
    called = {own: name for name, own in _called(statistics, statistics, names).items()}
    mapping, _ = align(names, called)
    return {base: called[own] for own, base in mapping.items()}


def _called(statistics: Statistics, names: Iterable[str], keys: Iterable[str]) -> Mapping[str, str]:
    """Return what a checkpoint of these keys calls the parameters that statistics know by name."""
    return names_in(keys, names, statistics.provenance.get("saved_as", {}))


def lacks(statistics: Statistics | None, name: str | None, needs: Iterable[str]) -> bool:
    """Tell whether statistics hold nothing under a name, or not all that is needed."""
    if statistics is None or name is None or name not in statistics:
        return True
    return not all(statistics.has(name, need) for need in needs)


def statistics_faults(inputs: Inputs, names: Mapping[str, Mapping[str, str]]) -> list[Fault]:
    """Return the faults of statistics that say what they were collected on."""
    faults: list[Fault] = []
    for expert, statistics in inputs.statistics.items():
        faults += _layout_faults(expert, statistics, names[expert], inputs)
        differing, compared = _differing(statistics, inputs.experts[expert], inputs.base)
        if differing:
            faults.append(
                Fault(
                    "statistics_of_another",
                    f"the statistics of '{expert}' were collected on another checkpoint: "
                    f"{len(differing)} of {compared} tensors have other values there, such as "
                    f"{differing[0]}.",
                    next="Collect them on this expert, or accept them with statistics_of: any.",
                )
            )
    return faults


def unknown_origin(statistics: Statistics, expert: Expert) -> bool:
    """Tell whether nothing proves that statistics belong to an expert, nor that they do not."""
    if statistics.fingerprint is None or statistics.samples:
        return False
    return statistics.fingerprint != expert.fingerprint()


def _layout_faults(
    expert: str, statistics: Statistics, names: Mapping[str, str], inputs: Inputs
) -> list[Fault]:
    layers = statistics.provenance.get("layers")
    if layers is None:
        return []
    faults: list[Fault] = []
    for base, own in names.items():
        shape = tuple(layers[own]["parameter"])
        entry = inputs.base.entries.get(base.partition("[")[0])
        # A tied copy is described by the weight it is tied to.
        if entry is not None and entry.shape != shape:
            what = (
                f"the statistics of '{expert}' are of another layout: {own} is {list(shape)} "
                f"there, {list(entry.shape)} in the base."
            )
            faults.append(Fault("statistics_layout", what))
    return faults


def _differing(statistics: Statistics, expert: Expert, base: TensorSource) -> tuple[list[str], int]:
    """Return the tensors whose samples differ from the expert's, and how many were compared."""
    called = _called(statistics, statistics.samples, base.entries)
    samples = {called[name]: sample for name, sample in statistics.samples.items()}
    mapping, _ = align(list(base.entries), list(samples))
    differing: list[str] = []
    compared = 0
    for own, name in mapping.items():
        held = expert.entries.get(name)
        if held is None and not expert.is_delta:
            continue  # a tied copy that the file leaves out
        if held is not None and held.shape != base.entries[name].shape:
            continue  # a head
        try:
            values = _sample(expert, name, base)
        except CheckpointError:
            continue
        compared += 1
        if not same_content(samples[own], values):
            differing.append(name)
    return differing, compared


def _sample(expert: Expert, name: str, base: TensorSource) -> Tensor:
    ranges = sample_ranges(base.entries[name].numel)
    if not expert.is_delta:
        return torch.cat([expert.read(name, start, stop) for start, stop in ranges])
    if name not in expert.entries:
        return torch.cat([base.read(name, start, stop) for start, stop in ranges])
    parts = [(a, b, base.read(name, a, b).to(torch.float32)) for a, b in ranges]
    return torch.cat([expert.weight(name, a, b, base=w, dtype=w.dtype) for a, b, w in parts])
