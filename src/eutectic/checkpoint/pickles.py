"""Checkpoints in torch's own formats (`.bin`, `.pt`), read without running any code in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.header import CODE_OF
from eutectic.checkpoint.odd_files import start_of
from eutectic.checkpoint.pickle_files import ZIP, PickleFile, opened
from eutectic.checkpoint.pickle_program import Opaque, View
from eutectic.errors import CheckpointError
from eutectic.words import few

_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
# Names under which training scripts file the weights of a model.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
_MAX_DEPTH = 3


@dataclass(frozen=True)
class PickleTable:
    """The tensors of a `.bin` or `.pt` file, and what lies beside them."""

    file: PickleFile
    tensors: Mapping[str, View]
    others: tuple[str, ...]  # "name (type)" of all else that it holds
    wrapper: str  # under which names the table is filed, "" where it is the file itself

    def offset(self, name: str) -> int:
        """Return where the numbers of a tensor lie in the file, −1 where not as they are."""
        return self.file.offset(self.tensors[name])

    def read(self, name: str) -> Tensor:
        """Return a tensor, flattened, in memory of its own."""
        return self.file.read(self.tensors[name])


def read_pickle(path: Path) -> PickleTable:
    """Return the table of a file in one of torch's own formats; no numbers are read.

    Nothing in it is run: its instructions are followed on plain values (`pickle_program`). A
    state dict filed under one of `_WRAPPERS` is unwrapped: what training scripts save (nanoGPT,
    Lightning) holds it beside the optimizer, counters and losses. CheckpointError where several
    tables could be the weights, and where the tensors claim far more than the file holds.
    """
    file = opened(path)
    content = file.content
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a table of named tensors, found {type(content).__name__}.\n"
            "Save the model's state_dict() instead."
        )
    others: list[str] = []
    wrappers: list[str] = []
    while (wrapper := _wrapper(path, content)) is not None and len(wrappers) < _MAX_DEPTH:
        others += [_described(k, v) for k, v in content.items() if k != wrapper]
        wrappers.append(wrapper)
        content = content[wrapper]
    tensors = {
        str(name): _checked(value, str(name), path)
        for name, value in content.items()
        if isinstance(value, View)
    }
    own = [_described(k, v) for k, v in content.items() if not isinstance(v, View)]
    if not tensors:
        raise _without_tensors(path, content, own)
    file.check_sizes(tensors.values())
    return PickleTable(file, tensors, (*own, *others), ".".join(wrappers))


def _checked(view: View, name: str, path: Path) -> View:
    """Return a tensor's record; CheckpointError unless it is dense and can be stored again."""
    kind = view.kind if view.kind or view.dtype in CODE_OF else f"of {view.dtype}"
    if kind:
        raise _not_dense(path, name, kind)
    return view


def _wrapper(path: Path, content: Mapping[Any, Any]) -> str | None:
    """Return the name under which a table files the model's weights; None where it is the table."""
    own = {k: v for k, v in content.items() if isinstance(v, View)}
    known = [name for name in _WRAPPERS if _held(content.get(name), 1)]
    if not known:
        return None
    if any(tensor.numel() > 1 for tensor in own.values()):
        raise CheckpointError(
            f"{path}: holds tensors ({few([str(k) for k in own])}) and a table of tensors under "
            f"'{known[0]}'.\n{_SAVE_ONE.format(name=known[0])}"
        )
    # Beside the weights, scripts keep their running average, a teacher or a second network.
    size = max(_held(content[name], _MAX_DEPTH) for name in known)
    rivals = [
        str(name)
        for name, value in content.items()
        if name not in known and 2 * _held(value, _MAX_DEPTH) > size and not _is_optimizer(value)
    ]
    if len(known) + len(rivals) > 1:
        raise CheckpointError(
            f"{path}: holds several tables of tensors: {few([*known, *rivals])}. Which of them is "
            f"the model?\n{_SAVE_ONE.format(name=known[0])}"
        )
    return known[0]


_SAVE_ONE = (
    "Save the one that you mean in a file of its own, such as: "
    "torch.save(torch.load(file, weights_only=True)['{name}'], 'pytorch_model.bin')"
)


def _held(value: object, depth: int) -> int:
    """Return how many tensors a table holds, in tables within it too."""
    if not isinstance(value, Mapping):
        return 0
    direct = sum(isinstance(v, View) for v in value.values())
    if direct or not depth:
        return direct
    return sum(_held(v, depth - 1) for k, v in value.items() if k in _WRAPPERS)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= {str(k) for k in value}


def _described(name: object, value: object) -> str:
    kind = "Tensor" if isinstance(value, View) else type(value).__name__
    return f"{name} ({value.kind if isinstance(value, Opaque) else kind})"


def _without_tensors(path: Path, content: Mapping[Any, Any], own: list[str]) -> CheckpointError:
    tables = [str(name) for name, value in content.items() if _held(value, 1)]
    if tables:
        return CheckpointError(
            f"{path}: holds no tensors itself, but tables of them under {few(tables)}.\n"
            f"{_SAVE_ONE.format(name=tables[0])}"
        )
    what = "the state of an optimizer, it holds" if _is_optimizer(content) else "holds"
    return CheckpointError(
        f"{path}: {what} no tensors of a model (found: {few(own, 5) or '-'}).\n"
        "Name the file or folder with the model's weights."
    )


def looks_like_pickle(path: Path) -> bool:
    """Tell whether a file begins as torch's own formats do: a zip archive, or a bare pickle."""
    try:
        start = start_of(path)
    except OSError:
        return False
    return start.startswith(ZIP) or (start[:1] == b"\x80" and start[1:2] in _PROTOCOLS)


def check_dense(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return `tensor` detached; raise CheckpointError unless it is dense and has data."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = "quantised" if tensor.is_quantized else "without data (meta)"
        kind = str(tensor.layout) if tensor.layout != torch.strided else kind
        raise _not_dense(where, name, "nested" if tensor.is_nested else kind)
    return tensor.detach().resolve_conj().resolve_neg()


def _not_dense(where: object, name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: tensor '{name}' is {kind}; only dense tensors are supported.\n"
        "Save it as a dense tensor."
    )
