"""Every call of transformers' loaders: one set of rules.

| rule | |
|---|---|
| files | local ones only; nothing is downloaded |
| code | that of transformers; a checkpoint's own code is never run |
| class | by the kind of task, by the class that config.json names, or the caller's |
| dtype | float32 to run a model on data; as stored to build another model from it |
| noise | transformers' reports and progress bars are off while it loads, and then as before |
| missing tensors | reported; the caller decides what they mean |
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eutectic.errors import CheckpointError, MissingExtraError

LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def transformers_for(purpose: str) -> Any:
    """Return the package transformers, which `purpose` needs."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", purpose) from error
    return transformers


def pretrained(
    model_class: Any,
    folder: Path | None,
    *,
    config: Any = None,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> tuple[Any, dict[str, Any]]:
    """Return a model and what loading found out: `missing_keys`, `mismatched_keys`, ….

    Instead of a folder there may be a `state`, tensors by the keys of files, with its `config`;
    tensors of another shape than the model's are left out and reported.
    """
    transformers = transformers_for("Loading models")
    old = int(transformers.__version__.split(".")[0]) < 5
    options = {**LOCAL, "output_loading_info": True, "torch_dtype" if old else "dtype": dtype}
    if state is not None:
        options |= {"config": config, "state_dict": dict(state), "ignore_mismatched_sizes": True}
    with quietly(transformers):
        loaded = model_class.from_pretrained(folder, **options)
    return loaded if isinstance(loaded, tuple) else (loaded, {})  # classes of others may not report


@contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """Silence transformers' reports and progress bars; both are put back as they were."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def load_config(folder: Path) -> Any:
    """Return a folder's configuration as transformers reads it."""
    return transformers_for("Reading configurations").AutoConfig.from_pretrained(folder, **LOCAL)


def load_stored(folder: Path, model_class: Any = None) -> Any:
    """Return a transformers model as stored: its dtype, and the class that config.json names.

    `model_class`, anything with `from_pretrained`, is taken in place of the latter.
    """
    transformers = transformers_for(f"loading {folder}")
    if model_class is None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / 'config.json'}: cannot be read: {error}.") from None
        name = (config.get("architectures") or ["?"])[0]
        model_class = getattr(transformers, str(name), None)
        if model_class is None:
            raise CheckpointError(
                f"{folder}: its architecture '{name}' is not in transformers.\n"
                "Pass the class, or a module, as model=."
            )
    return pretrained(model_class, folder, dtype="auto")[0]
