"""Models whose blocks are in memory only while forward passes are inside of them."""

import copy
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.calibration.forward_passes import running_pass, stopping_hook
from eutectic.calibration.places import watch_encoder

Read = Callable[[str], Tensor]  # parameter or buffer of the model -> its values, float32


class Stream:
    """A model that passes run through: the one that is calibrated, or one expert.

    `read` gives the values of the parameters in `named`; those of a block, a repeated module, are
    read when the first pass enters it and let go of when the last one has left it. Everything else
    is read at once. What is not in `named` stays as the model has it.
    """

    def __init__(
        self, model: nn.Module, read: Read, named: Collection[str], blocks: Sequence[str]
    ) -> None:
        self.model = model
        self._read = read
        self._inside: Counter[str] = Counter()
        self._locks = {path: threading.Lock() for path in blocks}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._own: dict[str, dict[str, nn.Parameter]] = {path: {} for path in blocks}
        users = Counter(map(id, parameters.values()))
        resident: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            block = next((path for path in blocks if name.startswith(f"{path}.")), None)
            if name not in named:
                continue
            if block is not None and users[id(parameter)] == 1:
                self._own[block][name] = parameter
                _release(parameter)
            else:
                resident[name] = parameter
        persistent = model.state_dict(keep_vars=True)
        resident |= {n: t for n, t in persistent.items() if n in named and n not in parameters}
        for name, tensor in resident.items():
            tensor.data = read(name).to(tensor.dtype)
        for path in blocks:
            block = model.get_submodule(path)
            block.register_forward_pre_hook(partial(self._enter, path))
            block.register_forward_hook(partial(self._leave, path))
        watch_encoder(model, lambda: None if (p := running_pass()) is None else p.layout)

    def stop_in_front_of(self, paths: Sequence[str]) -> None:
        """Let passes stop in front of modules; a hook each."""
        for path in paths:
            module = self.model.get_submodule(path)
            module.register_forward_pre_hook(stopping_hook(path), with_kwargs=True)

    def put(self, name: str, values: Tensor) -> None:
        """Replace a parameter while passes stand in front of its module."""
        parameter = self.model.get_parameter(name)
        parameter.data = values.to(parameter.dtype)

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        if running_pass() is None:
            return
        with self._locks[path]:
            self._inside[path] += 1
            if self._inside[path] == 1:
                for name, parameter in self._own[path].items():
                    parameter.data = self._read(name)

    def _leave(self, path: str, module: nn.Module, args: Any, outputs: Any) -> None:
        if running_pass() is None:
            return
        with self._locks[path]:
            self._inside[path] -= 1
            if self._inside[path] == 0:
                for parameter in self._own[path].values():
                    _release(parameter)


def twin(model: nn.Module, without: Collection[str]) -> nn.Module:
    """Return a copy of a model whose parameters named in `without` hold nothing yet.

    Others are shared with the model, buffers are copied.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(p): p for p in named.values()}
    empty: Mapping[int, nn.Parameter] = {
        id(named[n]): nn.Parameter(torch.empty(0, dtype=named[n].dtype), requires_grad=False)
        for n in without
        if n in named
    }
    return copy.deepcopy(model, memo | empty)


def _release(parameter: nn.Parameter) -> None:
    parameter.data = torch.empty(0, dtype=parameter.dtype)
