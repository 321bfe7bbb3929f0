"""Checkpoints in torch's own formats (`.bin`, `.pt`), read without running any code in them."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.odd_files import Oddity, by_archive, by_content, start_of
from eutectic.errors import CheckpointError
from eutectic.words import few

_ZIP = b"PK\x03\x04"
_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
# Names under which training scripts file the weights of a model.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
_MAX_DEPTH = 3


def load_pickle(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """Return the tensors of a `.bin` or `.pt` file, and "name (type)" of all else that it holds.

    Memory-mapped where the format allows. Only `torch.load(weights_only=True)` is ever used. A
    state dict filed under one of `_WRAPPERS` is unwrapped, and the last result is the name: what
    training scripts save (nanoGPT, Lightning) holds it beside the optimizer, counters and losses.
    CheckpointError where several tables could be the weights. Tied tensors and views stay as they
    are.
    """
    content = _load(path)
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
        str(name): check_dense(value, str(name), str(path))
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    own = [_described(k, v) for k, v in content.items() if not isinstance(v, Tensor)]
    if not tensors:
        raise _without_tensors(path, content, own)
    return tensors, (*own, *others), ".".join(wrappers)


def _wrapper(path: Path, content: Mapping[Any, Any]) -> str | None:
    """Return the name under which a table files the model's weights; None where it is the table."""
    own = {k: v for k, v in content.items() if isinstance(v, Tensor)}
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
    direct = sum(isinstance(v, Tensor) for v in value.values())
    if direct or not depth:
        return direct
    return sum(_held(v, depth - 1) for k, v in value.items() if k in _WRAPPERS)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= {str(k) for k in value}


def _described(name: object, value: object) -> str:
    return f"{name} ({type(value).__name__})"


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
    return start.startswith(_ZIP) or (start[:1] == b"\x80" and start[1:2] in _PROTOCOLS)


def check_dense(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return `tensor` detached; raise CheckpointError unless it is dense and has data."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantised" if tensor.is_quantized else "without data (meta)"
        kind = str(tensor.layout) if tensor.layout != torch.strided else kind
        raise CheckpointError(
            f"{where}: tensor '{name}' is {kind}; only dense tensors are supported.\n"
            "Save it as a dense tensor."
        )
    return tensor.detach()


def _load(path: Path) -> Any:
    try:
        start = start_of(path)
        odd = _archive(path) if start.startswith(_ZIP) else by_content(path, start)
        if odd is not None:
            raise odd.error(path)
        with warnings.catch_warnings():
            # torch warns about deprecated storage classes of old files; they load all the same.
            warnings.simplefilter("ignore")
            is_zip = start.startswith(_ZIP)  # older formats cannot be mapped
            if path.suffix == ".safetensors":  # torch would go by the ending
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or holds code besides tensors; it was refused and nothing was run.\n"
            f"torch says: {_first_line(error)}\n"
            "Load it where you trust it, and save its state_dict() as safetensors."
        ) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:
        # A hostile or damaged pickle can raise anything while torch interprets it.
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of torch ({_first_line(error)}).\n"
            "Download or save the file again."
        ) from error


def _archive(path: Path) -> Oddity | None:
    with zipfile.ZipFile(path) as archive:
        return by_archive(path, archive.namelist())


def _first_line(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    telling = (line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line)
    return next(telling, lines[0])[:300]
