"""The experts of a routed model, opened under the model's names, and whose statistics are whose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eutectic.checkpoint.expert_tensors import Expert, full_expert
from eutectic.checkpoint.experts import is_adapter, open_expert
from eutectic.checkpoint.locating import locate, resolve
from eutectic.checkpoint.names import align
from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.reader import CheckpointSource, StateDictReader
from eutectic.conventions import canonical_name
from eutectic.errors import RequestError, StatisticsError
from eutectic.models.names import names_in, saved_names
from eutectic.routed.routed_layers import in_parts
from eutectic.types import LayerStatistics

StateDict = Mapping[str, Tensor]


@dataclass(eq=False)
class ExpertWeights:
    """The weights of one expert; adapters are applied to their base."""

    name: str
    expert: Expert
    called: Mapping[str, str]  # what the model's parameters are called there; of adapters: in base
    base: CheckpointSource | None = None

    def read(self, name: str) -> Tensor:
        """Return the stored weight under the model's name, float32."""
        key = self.called.get(name)
        held = (self.expert if self.base is None else self.base).entries
        if key is None or key not in held:
            raise RequestError(
                f"expert '{self.name}' has no tensor '{name}'.\n"
                "If the model names its tensors otherwise in memory than in files, pass the "
                "expert's state_dict()."
            )
        values = None if self.base is None else self.base.read(key).float()
        if values is None or key in self.expert.entries:
            values = self.expert.weight(key, base=values, dtype=torch.float32)
        return values.view(held[key].shape)


@contextmanager
def open_experts(
    model: nn.Module, experts: Mapping[str, StateDict | str | Path], base: str | Path | None
) -> Iterator[list[ExpertWeights]]:
    """Open every expert: a state dict, a checkpoint (read tensor by tensor), or a PEFT adapter."""
    if not experts:
        raise RequestError("a routed model needs at least one expert, got none.")
    parameters = model.named_parameters(remove_duplicate=False)
    tensors = {canonical_name(n): p.detach() for n, p in parameters}
    own = StateDictReader(tensors, "the model")
    names, saved = list(own.entries), saved_names(model)
    with ExitStack() as stack:
        opened: list[ExpertWeights] = []
        for name, source in experts.items():
            label = f"expert '{name}'"
            source = source if isinstance(source, Mapping) else resolve(source)
            if isinstance(source, Mapping) or not is_adapter(source):
                if isinstance(source, Mapping):
                    reader = StateDictReader(source, label)
                else:
                    label += f" ({source})"
                    reader = stack.enter_context(open_reader(source))
                called = names_in(reader.entries, names, saved)
                entries = {called[n]: entry for n, entry in own.entries.items()}
                expert = full_expert(reader, entries, label)
                opened.append(ExpertWeights(name, expert, called))
                continue
            if base is None:
                raise RequestError(
                    f"{label} is an adapter, whose weights need the model it was trained on.\n"
                    "Name the checkpoint before merging: base= in Python, --base on a command line."
                )
            reader = stack.enter_context(open_reader(locate(base, full=True).path))
            adapter = stack.enter_context(closing(open_expert(source, reader.index)))
            called = names_in(reader.entries, names, saved)
            mapping, _ = align(called.values(), reader.entries, expert=f"the base of '{name}'")
            keys = {own_name: key for key, own_name in mapping.items()}
            called = {n: keys[c] for n, c in called.items() if c in keys}
            opened.append(ExpertWeights(name, adapter, called, reader))
        yield opened


def expert_statistics(
    given: Mapping[str, Mapping[str, LayerStatistics]],
    experts: Sequence[str],
    names: Sequence[str],
    what: str,
) -> list[dict[str, str]]:
    """Return per expert how the layers are called in its statistics, which hold them all."""
    lacking = [name for name in experts if name not in given]
    unknown = [name for name in given if name not in experts]
    if lacking or unknown:
        lines = [f"{what} are missing for {lacking}."] if lacking else []
        lines += [f"{what} are given for {unknown}, which are no experts."] if unknown else []
        folder = "./merged" if "router" in what else "./expert"
        advice = f"Experts: {', '.join(experts)}."
        if lacking:
            file = f"{lacking[0]}.stats.safetensors"
            advice = f"Collect them: eutectic collect {folder} --data proxy.jsonl -o {file}"
        raise RequestError("\n".join([*lines, advice]))
    found: list[dict[str, str]] = []
    for expert in experts:
        keys = list(given[expert])
        mapping, _ = align(names, keys, expert=f"{what} of '{expert}'")
        called = {name: key for key, name in mapping.items()}
        missing = [name for name in names if name not in called]
        if parts := [name for name in missing if in_parts(name, keys)]:
            raise StatisticsError(
                f"{what} of expert '{expert}' hold {parts[0]} in parts: queries and keys differ.\n"
                "Cross-attention in one packed projection cannot be routed; leave it and its "
                "out_proj out of `layers`."
            )
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise StatisticsError(
                f"{what} of expert '{expert}' hold nothing for {', '.join(missing[:3])}{more}.\n"
                "Collect them on this model, or choose layers that they cover."
            )
        found.append(called)
    return found
