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

_ZIP = b"PK\x03\x04"
_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
# Names under which training scripts file the weights of a model, in order of preference.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def load_pickle(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a `.bin` or `.pt` file, and "name (type)" of all else that it holds.

    Memory-mapped where the format allows. Only `torch.load(weights_only=True)` is ever used. A
    state dict filed under one of `_WRAPPERS` is unwrapped. Tied tensors and views stay as they are.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a table of named tensors, found {type(content).__name__}.\n"
            "Save the model's state_dict() instead."
        )
    outer: list[str] = []
    if not any(isinstance(value, Tensor) for value in content.values()):
        for wrapper in _WRAPPERS:
            inner = content.get(wrapper)
            if isinstance(inner, Mapping):
                outer = [f"{k} ({type(v).__name__})" for k, v in content.items() if k != wrapper]
                content = inner
                break
    tensors = {
        str(name): check_dense(value, str(name), str(path))
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    others = [f"{k} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, Tensor)]
    if not tensors:
        states = {"state", "param_groups"} <= {str(key) for key in content}
        what = (
            "the state of an optimizer, it holds no tensors of" if states else "holds no tensors of"
        )
        raise CheckpointError(
            f"{path}: {what} a model (found: {', '.join(others[:5]) or '-'}).\n"
            "Name the file or folder with the model's weights."
        )
    return tensors, (*others, *outer)


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
