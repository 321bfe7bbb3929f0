"""The merged model, its base and its experts, opened, under the merged model's keys."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.experts import open_expert
from eutectic.checkpoint.folder import deciding_files
from eutectic.checkpoint.names import align
from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.reader import CheckpointReader, file_identity
from eutectic.conventions_heads import is_output_layer
from eutectic.errors import CheckpointError, RequestError
from eutectic.models.loading import pretrained
from eutectic.models.names import file_keys, names_in, saved_names


@dataclass(frozen=True)
class OpenedModels:
    """Readers of all checkpoints; headers were read, no tensor."""

    merged: CheckpointReader
    base: Expert | None
    experts: Mapping[str, Expert]  # in the order of their names: no byte depends on the user's

    def of_merged(self, key: str) -> Tensor:
        """Return a tensor of the merged model, float32."""
        return self.merged.read(key).float().view(self.merged.entries[key].shape)

    def of_base(self, key: str) -> Tensor:
        """Return a tensor of the base, float32; the merged model's where the base has none."""
        if self.base is None or key not in self.base.entries:
            return self.of_merged(key)
        return self._shaped(self.base.weight(key, base=None, dtype=torch.float32), key, "the base")

    def of_expert(self, name: str, key: str) -> Tensor:
        """Return a tensor of an expert, float32.

        What an adapter does not change is the base's; so is what a checkpoint lacks. A head of
        another shape is the merged model's: it is not calibrated, and no pass comes to its end.
        """
        expert = self.experts[name]
        if key not in expert.entries:
            return self.of_base(key)
        if self._head_of_its_own(expert, key):
            return self.of_merged(key)
        base = self.of_base(key).view(-1) if expert.is_delta else None
        values = expert.weight(key, base=base, dtype=torch.float32)
        return self._shaped(values, key, f"expert '{name}'")

    def kept(self, keys: Mapping[str, str], parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """Return parameter -> why it cannot be calibrated, as far as the files say."""
        found: dict[str, str] = {}
        for name in parameters:
            key = keys.get(name)
            if key is None:
                found[name] = "no tensor of the files is its like"
                continue
            lacking = [n for n, e in self.experts.items() if key in e.missing]
            own = [n for n, e in self.experts.items() if self._head_of_its_own(e, key)]
            if lacking or own:
                what = "no such tensor" if lacking else "a head of its own shape"
                found[name] = f"{', '.join(lacking or own)} has {what}"
        return found

    def identity(self) -> dict[str, Any]:
        """Return what tells these checkpoints from others, and from their own later states."""
        folder = self.merged.index.folder
        beside = file_identity(folder, [*deciding_files(folder)])
        known: dict[str, Any] = {
            "the merged model": [self.merged.fingerprint(), self.merged.identity()],
            "configuration or tokenizer of the merged model": beside,
        }
        if self.base is not None:
            known["the base"] = [self.base.fingerprint(), self.base.identity()]
        for name, expert in self.experts.items():
            known[f"expert '{name}'"] = [expert.fingerprint(), expert.identity()]
        return known

    def _head_of_its_own(self, expert: Expert, key: str) -> bool:
        entry = expert.entries.get(key)
        differs = entry is not None and entry.shape != self.merged.entries[key].shape
        return differs and is_output_layer(key)

    def _shaped(self, values: Tensor, key: str, whose: str) -> Tensor:
        shape = self.merged.entries[key].shape
        if values.numel() != torch.Size(shape).numel():
            raise CheckpointError(
                f"{whose}: '{key}' has another shape than the merged model's {list(shape)}.\n"
                "Experts must be fine-tunes of the merged model's base."
            )
        return values.view(shape)


@contextmanager
def open_models(
    merged: Path, base: Path | None, experts: Mapping[str, Path]
) -> Iterator[OpenedModels]:
    """Open all checkpoints."""
    with ExitStack() as stack:
        reader = stack.enter_context(open_reader(merged))
        if not isinstance(reader, CheckpointReader):
            raise RequestError(
                f"{merged}: is quantised, and calibrated values could not be written into it.\n"
                "Calibrate the merge in full precision, and quantise the result."
            )

        def opened(path: Path) -> Expert:
            found = open_expert(path, reader.index)
            stack.callback(found.close)
            return found

        below = None if base is None else opened(base)
        if below is not None and below.is_delta:
            raise RequestError(f"{base}: is an adapter; the base is a full checkpoint.")
        found = {name: opened(experts[name]) for name in sorted(experts)}
        adapters = [name for name, expert in found.items() if expert.is_delta]
        if adapters and below is None:
            raise RequestError(
                f"{', '.join(adapters)}: adapters change the base; name it with --base."
            )
        yield OpenedModels(reader, below, found)


def keys_of(model: nn.Module, merged: CheckpointReader) -> tuple[dict[str, str], bool]:
    """Return state name -> file key of a loaded model, and whether that is all of its tensors.

    It is not where transformers joins or splits tensors as it loads them.
    """
    shapes = {key: entry.shape for key, entry in merged.entries.items()}
    try:
        return {name: key for key, name in file_keys(model, shapes).items()}, True
    except CheckpointError:
        pass
    state = model.state_dict()
    called = names_in(shapes, state, saved_names(model))
    keys, _ = align(shapes, called.values())
    found = {name: keys[own] for name, own in called.items() if own in keys}
    return {n: k for n, k in found.items() if tuple(state[n].shape) == shapes[k]}, False


def loaded_expert(models: OpenedModels, name: str, model: Any) -> nn.Module:
    """Return an expert as a whole model of the merged one's class, put together by transformers."""
    state = {key: models.of_expert(name, key) for key in models.merged.entries}
    found, _ = pretrained(type(model), None, config=model.config, state=state)
    return found.eval()
