"""What a pickle of torch describes, found out without running any of it.

A pickle is a program that builds objects. This follows the few instructions of which tables of
tensors are made, on plain values: names stay names, and a tensor becomes a record of where its
numbers lie. Nothing is imported, called or allocated, and what is claimed is checked by whoever
reads the numbers.
"""

import pickletools
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch

MOST_AXES = 64
_LARGEST = 2**62

_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32},
    **{"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16},
    **{"CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}
# Names that torch itself takes for data, not for code. None of them is ever looked up.
_KNOWN = frozenset(
    {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
    | {"torch.nn.parameter.Parameter", "torch.serialization._get_layout", "torch.Size"}
    | {"torch.Tensor", "torch.device", "_codecs.encode", "torch._tensor._rebuild_from_type_v2"}
    | {f"{b}.{n}" for b in ("builtins", "__builtin__") for n in ("set", "complex", "dict", "list")}
    | {"torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.UntypedStorage"}
)
_KNOWN_KINDS = re.compile(
    r"torch(\.cuda|\.sparse|\.cuda\.sparse)?\.\w*(Storage|Tensor)"
    r"|torch\.(u?int|q?u?int|float|bfloat|complex|bits|bool|half|double|long|short)\w*"
    r"|torch\.per_\w+|torch\._utils\._rebuild_\w+"
)
_NOT_DENSE = {
    "_rebuild_qtensor": "quantised",
    "_rebuild_sparse_tensor": "sparse (torch.sparse_coo)",
    "_rebuild_sparse_csr_tensor": "sparse (torch.sparse_csr)",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "without data (meta)",
}


class Foreign(Exception):
    """A pickle holds code, or what no table of tensors needs."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers that tensors are views of."""

    key: str
    dtype: torch.dtype | None  # None: bytes of any type
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that it claims."""
        return self.numel * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class View:
    """A tensor: how it lies in its storage, or of which `kind` it is that is not dense."""

    storage: Storage
    dtype: torch.dtype
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    kind: str = ""

    def numel(self) -> int:
        """Count the elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Named:
    """Something that a pickle refers to by its name."""

    name: str

    @property
    def last(self) -> str:
        """The name without its module."""
        return self.name.rpartition(".")[2]


class Opaque:
    """A value that is none of a table's tensors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Bounded:
    """A file as `pickletools` reads it, of which no more than a limit is read."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left, self._limit = file, limit, limit

    def read(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self._left:
            raise ValueError(f"its pickle has more than {self._limit:,} bytes, the limit")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        """Return the bytes up to the next line end."""
        line = self._file.readline(min(self._left, 1 << 16))
        self._left -= len(line)
        return line

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()


_MARK = object()
_SIMPLE_KEYS = (str, bytes, int, float, bool, type(None))


def described(file: Any, storages: list[Storage] | None = None) -> Any:
    """Return the value that a pickle describes; `file` as `pickletools.genops` takes it.

    The storages that it names go to the list, whether its value holds tensors of them or not.
    Foreign where it names code; ValueError, or what `pickletools` raises, where it is damaged.
    """
    return _Follower([] if storages is None else storages).follow(file)


class _Follower:
    """The stack and the memory of a pickle's program."""

    def __init__(self, storages: list[Storage]) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def follow(self, file: Any) -> Any:
        for operation, argument, _ in pickletools.genops(file):
            name = operation.name
            if name == "STOP":
                return self._pop()
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _MAKERS:
                self._stack.append(_MAKERS[name]())
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[cast(int, argument)])
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self._memo[cast(int, argument)] = self._top()
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            elif name not in ("PROTO", "FRAME"):
                self._step(name, argument)
        raise ValueError("its pickle has no end")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("its pickle takes what is not there")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _marked(self) -> list[Any]:
        """Return what lies above the last mark, which is taken away."""
        last = next(i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK)
        taken = self._stack[last + 1 :]
        del self._stack[last:]
        return taken

    def _step(self, name: str, argument: Any) -> None:
        if name == "MARK":
            self._stack.append(_MARK)
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            self._stack.append(self._top())
        elif name.startswith("TUPLE"):
            count = 0 if name == "TUPLE" else int(name[5:])
            taken = [self._pop() for _ in range(count)][::-1] if count else self._marked()
            self._stack.append(tuple(taken))
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "LIST", "DICT"):
            self._fill(name)
        elif name == "FROZENSET":
            self._marked()
            self._stack.append(Opaque("frozenset"))
        elif name == "GLOBAL":
            self._stack.append(_named(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            last, module = self._pop(), self._pop()
            self._stack.append(_named(f"{module}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self._pop(), self._pop()
            self._stack.append(_made(function, arguments))
        elif name == "BUILD":  # further attributes, such as a state dict's versions
            self._pop()
        elif name == "BINPERSID":
            self._storages.append(_storage(self._pop()))
            self._stack.append(self._storages[-1])
        else:
            raise Foreign(f"the instruction {name}")

    def _fill(self, name: str) -> None:
        if name in ("LIST", "DICT"):
            taken = self._marked()
            self._stack.append([] if name == "LIST" else {})
        else:
            alone = {"APPEND": 1, "SETITEM": 2}.get(name, 0)
            taken = [self._pop() for _ in range(alone)][::-1] if alone else self._marked()
        holder = self._top()
        if isinstance(holder, list):
            cast("list[Any]", holder).extend(taken)
        elif isinstance(holder, dict):
            for key, value in zip(taken[::2], taken[1::2], strict=True):
                # Hashing tuples of tuples may take forever; no table has such names.
                holder[key if type(key) in _SIMPLE_KEYS else Opaque("key")] = value


_VALUES = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"}
    | {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_MAKERS: dict[str, Any] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple},
    "EMPTY_SET": lambda: Opaque("set"),
}


def _named(name: str) -> Named:
    if name not in _KNOWN and not _KNOWN_KINDS.fullmatch(name):
        raise Foreign(f"'{name[:100]}'")
    return Named(name)


def _made(function: Any, arguments: Any) -> Any:
    """Return what a call of a known name stands for."""
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise Foreign("a call of something without a name")
    given = cast("tuple[Any, ...]", arguments)
    last = function.last
    if last == "_rebuild_from_type_v2":
        return _made(given[0], given[2])
    if last in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter"):
        return given[0] if given else Opaque(last)
    if last in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        return _view(last, given)
    if last.startswith("_rebuild_"):
        nothing = Storage("", torch.uint8, 0)
        return View(nothing, torch.uint8, 0, (), (), _NOT_DENSE.get(last, f"made by {last}"))
    if last in ("OrderedDict", "defaultdict", "Counter", "dict"):
        return _table(given)
    if function.name == "torch.Size":
        return tuple(given[0]) if given and isinstance(given[0], (tuple, list)) else ()
    return Opaque(last)


def _table(given: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    made: OrderedDict[Any, Any] = OrderedDict()
    held = given[-1] if given else ()
    pairs: Iterable[Any] = held.items() if isinstance(held, Mapping) else held or ()
    if isinstance(held, (list, tuple, Mapping)):
        for key, value in pairs:
            made[key if type(key) in _SIMPLE_KEYS else Opaque("key")] = value
    return made


def _storage(stated: Any) -> Storage:
    """Return the storage that a persistent id names: ("storage", type, key, location, size, …)."""
    if not isinstance(stated, tuple) or len(cast("tuple[Any, ...]", stated)) < 5:
        raise Foreign("a reference to something other than a storage")
    word, kind, key, _, numel, *view = cast("tuple[Any, ...]", stated)
    if word != "storage" or not isinstance(kind, Named) or not isinstance(key, (str, int)):
        raise Foreign("a reference to something other than a storage")
    if any(part is not None for part in view) or not _is_size(numel):
        raise ValueError(f"the storage {str(key)[:40]!r} has no plain size")
    if kind.last in ("UntypedStorage", "TypedStorage"):
        return Storage(str(key), None, numel)
    if kind.last not in _STORAGES:
        return Storage(str(key), torch.uint8, 0)  # of quantised numbers: fits no dense tensor
    return Storage(str(key), _STORAGES[kind.last], numel)


def _view(function: str, given: tuple[Any, ...]) -> View:
    storage, offset, shape, stride, *rest = given
    if not isinstance(storage, Storage):
        raise Foreign("a tensor without a storage")
    dtype = storage.dtype
    if function == "_rebuild_tensor_v3":
        stated = rest[2] if len(rest) > 2 else None
        dtype = getattr(torch, stated.last, None) if isinstance(stated, Named) else None
    sizes, steps = (tuple(v) if isinstance(v, (tuple, list)) else None for v in (shape, stride))
    if not isinstance(dtype, torch.dtype) or sizes is None or steps is None:
        raise ValueError("a tensor without type, sizes or steps")
    flags = rest[2:3] if function == "_rebuild_tensor_v2" else rest[3:4]
    flagged = flags and isinstance(flags[0], Mapping) and any(flags[0].values())
    if len(sizes) > MOST_AXES or len(sizes) != len(steps):
        raise ValueError(f"a tensor of {len(sizes)} axes and {len(steps)} steps")
    if not all(map(_is_size, (offset, *sizes, *steps))):
        raise ValueError("a tensor whose sizes or steps are no sizes")
    kind = "conjugated or negated when it is read" if flagged else ""
    view = View(storage, dtype, offset, sizes, steps, kind)
    ends = [(size - 1) * step for size, step in zip(sizes, steps, strict=True)]
    end = (offset + sum(ends) + 1) * dtype.itemsize
    if view.numel() and end > storage.nbytes:
        raise ValueError("a tensor that reaches beyond its storage")
    return view


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
