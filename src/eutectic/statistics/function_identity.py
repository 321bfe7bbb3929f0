"""An identity for a function that a caller passes: what it computes, not only how it is called."""

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_SIMPLE = (type(None), type(...), bool, int, float, complex, str, bytes)
_NAMED = (type, ModuleType, BuiltinFunctionType)


def describe_callable(function: Any) -> str:
    """Return module and name, and a hash of code, constants, defaults, closure and object state.

    Functions of one name that compute something else are told apart, lambdas too. What the code
    finds by name when it runs (globals, imported functions) is not followed. The code is Python's
    bytecode: another version of Python gives another hash.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__} {_digest(function, {}).hex()[:16]}"


def _digest(value: Any, met: dict[int, tuple[int, Any]]) -> bytes:
    """Return a hash of a value, the same in every process.

    Objects in `met` enter by their place in it, for objects may hold one another.
    """
    digest = sha256(f"{type(value).__module__}.{type(value).__qualname__}\0".encode())
    if isinstance(value, _SIMPLE):
        digest.update(repr(value).encode())
    elif isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {[*tensor.shape]}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif id(value) in met:
        digest.update(str(met[id(value)][0]).encode())
    else:
        # The value too, so that it stays alive and its number its own.
        met[id(value)] = (len(met), value)
        parts = [_digest(part, met) for part in _parts(value)]
        digest.update(b"".join(sorted(parts) if isinstance(value, set | frozenset) else parts))
    return digest.digest()


def _parts(value: Any) -> list[Any]:
    """Return what decides a value that is made of others."""
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Mapping):
        return [item for pair in value.items() for item in pair]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_consts, value.co_names]
    if isinstance(value, FunctionType):
        closure = value.__closure__ or ()
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *map(_content, closure)]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, _NAMED):
        return [value.__name__, *(getattr(value, n, None) for n in ("__module__", "__qualname__"))]
    call = getattr(type(value), "__call__", None)  # noqa: B004  (the code, not whether there is any)
    if isinstance(value, nn.Module):
        return [call, value.forward, value.state_dict()]
    try:
        return [call, value.__reduce_ex__(4)]
    except Exception:  # noqa: BLE001  (an open file, a lock: nothing that could be compared)
        return [call]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
