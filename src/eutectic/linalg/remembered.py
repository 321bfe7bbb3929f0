"""Decompositions that several layers need of one matrix, made once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 32  # of at most a few MB each: see `metric`

Value = TypeVar("Value")
_KEPT: OrderedDict[str, Future[Any]] = OrderedDict()
_LOCK = threading.Lock()


def digest(*parts: object) -> str:
    """Return a key of tensors, by their bytes, and of what else says what is made of them.

    Empty, for nothing that can be remembered, where a tensor lies on a device or a part is "".
    """
    total = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            if part.device.type != "cpu":
                return ""
            total.update(f"{part.dtype}{list(part.shape)}".encode())
            flat = part.detach().contiguous().flatten()
            total.update(flat.view(torch.uint8).numpy().data)  # NumPy has no bfloat16
        elif part == "":
            return ""
        else:
            total.update(f"{part!r}\0".encode())
    return total.hexdigest()


def remembered(key: str, make: Callable[[], Value]) -> Value:
    """Return what `make` gives, or what it gave for the same key: the same bytes.

    Query, key and value see the same inputs, and are merged one after the other or side by side:
    who comes second waits for the first.
    """
    if not key:
        return make()
    with _LOCK:
        kept = _KEPT.get(key)
        own: Future[Any] = kept or Future()
        _KEPT[key] = own
        _KEPT.move_to_end(key)
        while len(_KEPT) > MOST:
            _KEPT.popitem(last=False)
    if kept is None:
        try:
            own.set_result(make())
        except BaseException as error:
            with _LOCK:
                _KEPT.pop(key, None)
            own.set_exception(error)
            raise
    return own.result()
