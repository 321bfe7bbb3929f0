"""The files beside the weights: configuration, tokenizer, processors, custom code, licences."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from eutectic.checkpoint.names import check_inside
from eutectic.errors import OutputError
from eutectic.storage import storage_of

# What a model needs to be loaded and used, and what its licence asks to be kept.
_PATTERNS = (
    *("config.json", "configuration.json", "generation_config.json", "modules.json"),
    *("*config_sentence_transformers.json", "sentence_*_config.json"),
    *("*processor_config.json", "feature_extractor*.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt"),
    *("dict.txt", "spiece.model", "spm*.model", "sentencepiece*.model", "*.spm", "tekken.json"),
    *("prophetnet.tokenizer", "emoji.json", "byte_maps.json", "*.tiktoken", "bpe.codes"),
    *("word_shape.json", "word_pronunciation.json", "normalizer.json", "chat_template*"),
    *("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
# Never copied, whatever their name: weights, training states and pickles.
_NEVER = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz"),
    *(".npy", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json"),
)
# Modules of sentence-transformers ("1_Pooling") and further chat templates.
_SUBFOLDER = re.compile(r"\d+_[A-Za-z]\w*|additional_chat_templates")
_SUBFOLDER_PATTERNS = (*_PATTERNS, "*.json", "*.txt", "*.jinja")


def side_files(folder: Path) -> tuple[str, ...]:
    """Return the names, relative to `folder` and sorted, of the files to take along.

    Python files only where a configuration names code (`auto_map`, or sentence-transformers'
    modules): a lone checkpoint may lie among anything.

    Never weights, optimizer or training states, pickles, the README (the output gets a card of its
    own), hidden files or folders other than sentence-transformers' numbered modules. A link that
    leads out of the folder is refused.
    """
    configs = (path for path in folder.glob("*config.json") if path.is_file())
    names_code = (folder / "modules.json").is_file() or any(
        b'"auto_map"' in config.read_bytes() for config in configs
    )
    patterns = (*_PATTERNS, "*.py") if names_code else _PATTERNS
    return _matching(folder, patterns, _SUBFOLDER_PATTERNS, _NEVER)


def module_weights(folder: Path) -> tuple[str, ...]:
    """Return weight files in numbered module folders ("2_Dense/model.safetensors").

    They belong to no key of the checkpoint, so they are neither merged nor copied by
    `copy_side_files`; the caller states what becomes of them.
    """
    return _matching(folder, (), ("*.safetensors", "*.bin"), ())


def copy_side_files(
    folder: Path, destination: Path, names: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Copy side files (all of `side_files`, or `names`) and return their names.

    Links are followed, so that the copy stands alone; one that leads out of the folder is refused.
    """
    chosen = side_files(folder) if names is None else tuple(names)
    for name in chosen:
        source = check_inside(folder, name)
        target = destination / name
        try:
            storage_of(destination).copy(source, target)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error
    return chosen


def _matching(
    folder: Path, patterns: tuple[str, ...], sub_patterns: tuple[str, ...], never: tuple[str, ...]
) -> tuple[str, ...]:
    wanted = {folder: patterns}
    for path in folder.iterdir():
        if _SUBFOLDER.fullmatch(path.name) and path.is_dir():
            wanted[path] = sub_patterns
    found = [
        path.relative_to(folder).as_posix()
        for place, allowed in wanted.items()
        for path in place.iterdir()
        if not path.is_dir()
        and not path.name.startswith(".")
        and not path.name.lower().endswith(never)
        and any(fnmatchcase(path.name, pattern) for pattern in allowed)
    ]
    for name in found:
        check_inside(folder, name)
    return tuple(sorted(found))
