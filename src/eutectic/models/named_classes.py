"""Classes of transformers that a checkpoint's files name: only models and processors are taken.

`config.json` and the configurations of processors name classes, and transformers calls whatever it
has under such a name. A stranger's file may name anything (`pipeline`, `Trainer`, `logging`), so
each name is looked at before transformers sees it.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.checkpoint.index import read_json_object
from eutectic.errors import CheckpointError

# Keys of processors' files -> the class of transformers that theirs must be a subclass of.
_PROCESSORS: Mapping[str, str] = {
    "tokenizer_class": "PreTrainedTokenizerBase",
    "image_processor_type": "ImageProcessingMixin",
    "feature_extractor_type": "FeatureExtractionMixin",
    "video_processor_type": "BaseVideoProcessor",
    "processor_class": "ProcessorMixin",
}
# Old checkpoints name either of these under the other's key.
_EITHER = ("ImageProcessingMixin", "FeatureExtractionMixin")
_FILES = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# What the modules of such classes are called; the stand-ins of missing packages have their own.
_HOMES = (
    ".tokenization_",
    ".image_processing_",
    ".feature_extraction_",
    ".processing_",
    ".video_processing_",
    ".dummy_",
)
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def model_class(name: Any, folder: Path, transformers: Any) -> Any:
    """Return the model class of transformers that a configuration names.

    CheckpointError for anything that is no subclass of `PreTrainedModel`; it is not called.
    """
    found = _named(name, (".modeling_",), transformers)
    parent = transformers.PreTrainedModel
    if isinstance(found, type) and issubclass(found, parent) and found is not parent:
        return found
    if not isinstance(name, str) or _is_there(name, transformers):
        raise CheckpointError(
            f"{folder / 'config.json'}: its architecture {name!r} is no model class of "
            "transformers.\nSet `architectures` to the class that the model was saved from."
        )
    raise CheckpointError(
        f"{folder}: its architecture {name!r} is not in transformers.\n"
        "Pass the class, or a module, as model=."
    )


MOST_COUNTED = 100_000
_COUNTED = re.compile(r"^num_labels$|layers?$|depths?$|blocks?$|num_experts|num_local_experts")


def check_named_classes(folder: Path, transformers: Any) -> None:
    """Raise CheckpointError where a folder's files name what is no model or processor class.

    Also where they name a kernel to be fetched from a hub, which would be code. A name that
    transformers does not have is left to it: it refuses, or knows a stand-in.
    """
    for file in _FILES:
        path = folder / file
        if path.is_file():
            found = read_json_object(path)
            _check_kernels(found, path)
            _check_counts(found, path)
            for key, parent in _PROCESSORS.items():
                if isinstance(found.get(key), str):
                    _check_processor(found[key], key, parent, path, transformers)
            if file == "config.json":
                _check_architectures(found, folder, transformers)


def _check_architectures(config: Mapping[str, Any], folder: Path, transformers: Any) -> None:
    names = config.get("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{folder / 'config.json'}: `architectures` must be a list of names, got {names!r:.80}."
        )
    for name in names:
        if _is_there(name, transformers):
            model_class(name, folder, transformers)


def _check_kernels(config: Mapping[str, Any], path: Path) -> None:
    """Refuse an attention implementation that names a repository of kernels, at any depth."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_kernels(value, path)
        elif key in _KERNELS and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{path}: `{key}` names '{value}', code of a hub, which is never fetched or run.\n"
                "Remove the key, or name 'eager' or 'sdpa'."
            )


def _check_counts(config: Mapping[str, Any], path: Path) -> None:
    """Refuse counts of what transformers would make one by one, at any depth."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value, path)
        elif isinstance(value, (int, float)) and value > MOST_COUNTED and _COUNTED.search(str(key)):
            raise CheckpointError(f"{path}: `{key}` is {value:,}, the limit is {MOST_COUNTED:,}.")


def _check_processor(name: str, key: str, parent: str, path: Path, transformers: Any) -> None:
    if not _is_there(name, transformers):
        return
    found = _named(name, _HOMES, transformers)
    allowed = [_parent(p, transformers) for p in (_EITHER if parent in _EITHER else (parent,))]
    if not (isinstance(found, type) and (issubclass(found, tuple(allowed)) or _is_dummy(found))):
        raise CheckpointError(
            f"{path}: `{key}` names '{name}', which is no such class of transformers.\n"
            "Take the file from the base, or save the processor again."
        )


def _parent(name: str, transformers: Any) -> Any:
    places = {
        "ImageProcessingMixin": "image_processing_base",
        "BaseVideoProcessor": "video_processing_utils",
        "FeatureExtractionMixin": "feature_extraction_utils",
    }
    module = places.get(name)
    if module is None:
        return getattr(transformers, name)
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except ModuleNotFoundError:  # what this version does not have, nothing is a subclass of
        return type(None)


def _is_there(name: str, transformers: Any) -> bool:
    """Tell whether transformers may have something of this name; modules are in lower case."""
    known = getattr(transformers, "_class_to_module", {})
    return not name[:1].isupper() or name in known or name in vars(transformers)


def _named(name: Any, homes: tuple[str, ...], transformers: Any) -> Any:
    """Return what transformers has under a name in modules of such names, else None.

    The module's name is looked at first: nothing else is imported. Before transformers 4.50 it is
    the package of a model, `models.bert`, where models, tokenizers and processors are.
    """
    module = getattr(transformers, "_class_to_module", {}).get(str(name), "")
    of_model = re.fullmatch(r"models\.\w+", module) is not None
    if not of_model and not any(home in f".{module}" for home in homes):
        return None
    return getattr(transformers, str(name), None)


def _is_dummy(found: type) -> bool:
    """Tell whether a class stands for one whose package is missing; calling it says so."""
    return type(found).__name__ == "DummyObject"
