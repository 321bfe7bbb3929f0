"""An accelerator that is none: tensors that say they lie there, computed on the CPU.

It refuses what a real one refuses: an operation on tensors of both places, and NumPy. So code that
forgets to move a tensor fails here as it would there. It says nothing of speed or rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy:0")  # a type that torch knows and nothing else uses


class There(Tensor):
    """A tensor on the pretended device; `held` has its values."""

    held: Tensor
    float64 = True  # whether the device has it

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        if held.dtype == torch.float64 and not cls.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @property
    def data(self) -> There:  # type: ignore[override]
        """Return the same memory; set, the tensor shares that of another."""
        return _wrapped(self.held)

    @data.setter
    def data(self, other: There) -> None:
        self.held = other.held

    def data_ptr(self) -> int:
        """Return where its values lie: by it, two tensors are known to share memory."""
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Whatever is made on, or moved to, the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """`torch.tensor`, which makes its result without a dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func is torch.tensor and target is not None and torch.device(target) == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _called(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, There)]
    target = kwargs.get("device")
    onto = torch.device(target) if target is not None else None
    name = str(func)
    moves = "_to_copy" in name or "copy_" in name
    here = [x for x in given if not isinstance(x, There) and x.ndim]
    if there and here and not moves:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{name}: tensors of the CPU {shapes} beside those of {DEVICE}")
    if onto is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(_held, (args, kwargs))
    result = func(*args, **kwargs)
    if onto is not None:
        stays = onto.type == DEVICE.type
    elif moves and "copy_" in name and "_to_copy" not in name:
        stays = isinstance(given[0], There)
    else:
        stays = bool(there)
    if not stays:
        return result
    if name.endswith("_.default") or "_." in name and given and isinstance(given[0], There):
        return given[0] if isinstance(result, Tensor) else tree_map(_wrapped, result)
    return tree_map(_wrapped, result)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def _wrapped(x: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, There):
        return x
    with torch.inference_mode(False):  # torch counts versions of a view as it does of its base
        return There(x)


@contextmanager
def pretended(*, float64: bool = True) -> Iterator[torch.device]:
    """Let `.to(DEVICE)` and `device=DEVICE` lead to the pretended device inside the block.

    Without `float64` it refuses such numbers, as Apple's GPUs do.
    """
    entered = mock.patch.multiple(
        torch.inference_mode, __enter__=_enter_no_grad, __exit__=_leave_no_grad
    )
    refusing = mock.patch.object(There, "float64", float64)
    with torch.no_grad(), entered, refusing, _Tensors(), _Factories():
        yield DEVICE


def _enter_no_grad(self: Any) -> None:
    # In inference mode whole operations arrive at the dispatch, in place of their parts.
    self.instead = torch.no_grad()
    self.instead.__enter__()


def _leave_no_grad(self: Any, *raised: Any) -> None:
    self.instead.__exit__(*raised)
